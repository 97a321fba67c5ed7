//! Makes the kernel hand connections to virtual IPs to meshd, and refuse plaintext at strict ports.
//!
//! `rules` renders the whole rule set as text (pure), `apply` hands it to the kernel in one
//! transaction and takes it away again. Rules outlive the daemon on purpose: without it, virtual IPs
//! are refused at once and strict ports stay closed; `meshd intercept revert` removes everything.

mod apply;
mod rules;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::Deserialize;

pub use apply::{CaptureError, apply, revert};
pub use rules::{StrictPort, render};

/// `[capture]` in meshd.toml.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaptureConfig {
    /// Virtual IPs of services. 240/4 is unused on the Internet and accepted as unicast by Linux.
    pub vip4: Ipv4Net,
    /// A unique local prefix (RFC 4193).
    pub vip6: Ipv6Net,
    /// Mark on meshd's own sockets, and which bits of the mark are ours.
    pub mark: u32,
    pub mark_mask: u32,
    /// Routing table of the virtual IPs.
    pub table: u32,
}

impl CaptureConfig {
    /// What would hurt the host or switch off our own rules: the field, and what to do.
    pub fn problem(&self) -> Option<(&'static str, &'static str)> {
        // unspec, default, main and local (rt_tables): removing our routes must never touch the host's.
        if matches!(self.table, 0 | 253..=255) {
            return Some(("capture.table", "this is one of the host's own routing tables; choose another number"));
        }
        if self.mark == 0 || self.mark & !self.mark_mask != 0 {
            return Some(("capture.mark", "must have a bit, and only bits of capture.mark_mask"));
        }
        None
    }
}

impl Default for CaptureConfig {
    fn default() -> CaptureConfig {
        CaptureConfig {
            vip4: Ipv4Net::new_assert([240, 240, 0, 0].into(), 16),
            vip6: Ipv6Net::new_assert([0xfd6d, 0x6573, 0x6864, 0, 0, 0, 0, 0].into(), 64),
            mark: 0x004d_0000,
            mark_mask: 0x00ff_0000,
            table: 7471,
        }
    }
}
