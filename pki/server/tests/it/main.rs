//! The PKI as hosts meet it: a real server on loopback, the real client, real files.

mod absence;
mod admin_api;
mod authority;
mod cli;
mod clocks;
mod conversation;
mod enrolment;
mod http;
mod impostors;
mod operation;
mod profile;
mod records;
mod recovery;
mod renewal;
mod shut_out;
mod support;
