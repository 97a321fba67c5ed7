//! The PKI as hosts meet it: a real server on loopback, the real client, real files.

mod absence;
mod admin_api;
mod attestors;
mod authority;
mod cli;
mod clocks;
mod conversation;
mod enrolment;
mod entries;
mod http;
mod impostors;
mod join_tokens;
mod operation;
mod profile;
mod records;
mod recovery;
mod renewal;
mod rotations;
mod shut_out;
mod support;
mod verifiers;
