//! The PKI as hosts meet it: a real server on loopback, the real client, real files.

mod alerts;
mod cli;
mod enrolment;
mod federation;
mod http;
mod impostors;
mod inventory;
mod operation;
mod profile;
mod renewal;
mod support;
mod upstream;
