//! The PKI as hosts meet it: a real server on loopback, the real client, real files.

mod absence;
mod admin_api;
mod alerts;
mod attestors;
mod authority;
mod cli;
mod clocks;
mod conversation;
mod enrolment;
mod entries;
mod federation;
mod http;
mod impostors;
mod inventory;
mod join_tokens;
mod keeping;
mod operation;
mod profile;
mod records;
mod recovery;
mod renewal;
mod rotations;
mod shut_out;
mod support;
mod upstream;
mod verifiers;
