//! The PKI as hosts meet it: a real server on loopback, the real client, real files.

mod absence;
mod cli;
mod clocks;
mod conversation;
mod enrolment;
mod http;
mod impostors;
mod keeping;
mod operation;
mod profile;
mod records;
mod renewal;
mod support;
