//! The kernel, behind safe functions: the only crate of the project that may say `unsafe`.
//!
//! `sock_diag` asks the kernel who owns a TCP socket, `sock_dump` lists them all; `conntrack` knows what NAT rewrote,
//! `nft_map` what rules recorded, `nflog` what they tell as it happens;
//! `sockets` opens the sockets meshd listens on and dials with; `kernel_events` tells when rules or routes change;
//! `inherit` adopts listeners handed over by systemd; `clock` asks how good it is; `memory` tunes the allocator;
//! `tun` makes a network device whose packets this process reads and writes; `peer` holds on to the process at the other
//! end of a Unix socket; `child` starts programs with less than this process may.

pub mod child;
pub mod clock;
pub mod conntrack;
pub mod inherit;
pub mod kernel_events;
pub mod memory;
pub mod nflog;
mod nfnetlink;
pub mod nft_map;
pub mod peer;
pub mod sock_diag;
pub mod sock_dump;
pub mod sockets;
pub mod tun;
