//! The PKI as hosts meet it: a real server on loopback, the real client, real files.

mod cli;
mod enrolment;
mod http;
mod impostors;
mod operation;
mod profile;
mod renewal;
mod rotations;
mod support;
mod verifiers;
