//! The PKI as hosts meet it: a real server on loopback, the real client, real files.

mod absence;
mod alerts;
mod attestors;
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
mod operation;
mod profile;
mod records;
mod renewal;
mod support;
mod upstream;
