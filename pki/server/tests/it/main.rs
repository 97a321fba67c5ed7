//! The PKI as hosts meet it: a real server on loopback, the real client, real files.

mod attestors;
mod cli;
mod enrolment;
mod entries;
mod http;
mod impostors;
mod join_tokens;
mod operation;
mod profile;
mod renewal;
mod support;
