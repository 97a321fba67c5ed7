//! The kernel, behind safe functions: the only crate of the project that may say `unsafe`.
//!
//! `sock_diag` asks the kernel who owns a TCP socket; `sockets` opens the sockets meshd listens on
//! and dials with; `inherit` adopts listeners handed over by systemd; `memory` tunes the allocator.

pub mod inherit;
pub mod memory;
pub mod sock_diag;
pub mod sockets;
