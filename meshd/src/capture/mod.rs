//! Makes the kernel hand connections to virtual IPs to meshd, and refuse plaintext at strict ports.
//!
//! `wanted` says what is to be so, as plain data; a `backend` renders it for one of the kernel's mechanisms and
//! applies it; `keeper` is the thread that keeps the kernel equal to what is wanted; `flow` tells workers whom a
//! captured connection was for. `plan` decides what is in force out of what is configured and what operators did
//! (`state`), `manual` is what they do, `timer` takes an unconfirmed plan back, `flows` says what a plan would touch.
//! Rules outlive the daemon on purpose: without it, virtual IPs are refused at once and strict ports stay closed;
//! `meshd intercept revert` removes everything.

mod backend;
mod flow;
pub mod flows;
mod iptables;
mod keeper;
mod ledger;
mod live;
pub mod manual;
mod nft;
mod owner;
mod pace;
pub mod plan;
mod routes;
mod state;
mod state_file;
pub mod timer;
mod tool;
mod transparent;
mod tun;
mod wanted;

use std::collections::BTreeSet;

use ipnet::{Ipv4Net, Ipv6Net};
use meshd_discovery::ServiceName;
use serde::Deserialize;

pub use backend::{
    Backend, BackendChoice, BackendKind, Capabilities, Chosen, ListenAt, PassedOver, can_enforce, choose,
};
pub use flow::{Flow, Recoverer, Recovery};
pub use flows::{Lifeline, Session};
pub use keeper::{Keeper, KeeperHandle, KeeperView};
pub use ledger::{Book, PlainCaller, PortRecord, PublishedBook, Tally};
pub use live::{Live, lifeline, look, own_session, refuse_lockout};
pub use owner::{OwnerReader, OwnerRecord, RecordedOwner};
pub use state::{Applied, Bypass, CaptureState, Held, Reverted};
pub use state_file::StateFile;
pub use tool::CaptureError;
pub(crate) use transparent::table_beside;
pub use tun::Flows as TunFlows;
pub use wanted::{Caller, Facts, StrictPort, Wanted};

/// `[capture]` in meshd.toml.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaptureConfig {
    /// How connections are captured.
    pub backend: BackendChoice,
    /// Virtual IPs of services. 240/4 is unused on the Internet and accepted as unicast by Linux.
    pub vip4: Ipv4Net,
    /// A unique local prefix (RFC 4193).
    pub vip6: Ipv6Net,
    /// Mark on meshd's own sockets, and which bits of the mark are ours.
    pub mark: u32,
    pub mark_mask: u32,
    /// Routing table of the virtual IPs.
    pub table: u32,
    /// Services whose raw addresses are captured for enrolled callers, too.
    pub raw: BTreeSet<ServiceName>,
}

impl CaptureConfig {
    /// Capture of virtual IPs and nothing else, under this configuration.
    pub fn bare(&self, capture_port: u16) -> Wanted {
        let CaptureConfig { vip4, vip6, mark, mark_mask, table, .. } = *self;
        Wanted {
            vip4,
            vip6,
            capture_port,
            table,
            mark,
            mark_mask,
            daemon_uid: nix::unistd::getuid().as_raw(),
            strict: BTreeSet::new(),
            permissive: BTreeSet::new(),
            raw_callers: BTreeSet::new(),
            enrolled: BTreeSet::new(),
            transparent: BTreeSet::new(),
        }
    }

    /// What would hurt the host or switch off our own rules: the field, and what to do.
    pub fn problem(&self) -> Option<(&'static str, &'static str)> {
        // unspec, default, main and local (rt_tables): removing our routes must never touch the host's.
        if matches!(self.table, 0 | 253..=255) {
            return Some(("capture.table", "this is one of the host's own routing tables; choose another number"));
        }
        if self.table == u32::MAX || matches!(table_beside(self.table), 253..=255) {
            return Some((
                "capture.table",
                "the number after it is used, too, and must be free; choose another number",
            ));
        }
        if self.mark == 0 || self.mark & !self.mark_mask != 0 {
            return Some(("capture.mark", "must have a bit, and only bits of capture.mark_mask"));
        }
        if !self.raw.is_empty() && self.mark == self.mark_mask {
            let reason = "has every bit of capture.mark_mask; capture.raw needs another value for captured connections";
            return Some(("capture.mark", reason));
        }
        None
    }
}

impl Default for CaptureConfig {
    fn default() -> CaptureConfig {
        CaptureConfig {
            backend: BackendChoice::Auto,
            vip4: Ipv4Net::new_assert([240, 240, 0, 0].into(), 16),
            vip6: Ipv6Net::new_assert([0xfd6d, 0x6573, 0x6864, 0, 0, 0, 0, 0].into(), 64),
            mark: 0x004d_0000,
            mark_mask: 0x00ff_0000,
            table: 7471,
            raw: BTreeSet::new(),
        }
    }
}

/// Whether what keeps virtual IPs on this host is there, whoever asks.
pub fn routes_are_there(applied: &Applied) -> Result<bool, CaptureError> {
    match applied.backend {
        BackendKind::Tun => tun::routes_are_there(&applied.wanted),
        _ => routes::intact(&applied.wanted),
    }
}
