//! `meshd_dns_queries_total{outcome}`.

use std::sync::atomic::{AtomicU64, Ordering};

/// What became of a question to our DNS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DnsOutcome {
    /// A name of ours, with records.
    Answered,
    /// A name of ours without records of the type.
    Nodata,
    /// No such name in a zone of ours.
    Nxdomain,
    /// A server of the host answered, whatever it said.
    Forwarded,
    /// No server of the host answered in time.
    ForwardFailed,
    /// Too many questions were waiting for servers already.
    ForwardLimited,
    /// Not a name of ours, and nobody or no permission to forward it.
    Refused,
    /// Malformed, or an operation we do not do.
    Invalid,
    /// The service exists, and there are no virtual IPs left.
    NoAddress,
    /// A source that may know the name has not answered.
    Unsure,
}

impl DnsOutcome {
    pub const ALL: [DnsOutcome; 10] = [
        DnsOutcome::Answered,
        DnsOutcome::Nodata,
        DnsOutcome::Nxdomain,
        DnsOutcome::Forwarded,
        DnsOutcome::ForwardFailed,
        DnsOutcome::ForwardLimited,
        DnsOutcome::Refused,
        DnsOutcome::Invalid,
        DnsOutcome::NoAddress,
        DnsOutcome::Unsure,
    ];

    pub fn label(self) -> &'static str {
        match self {
            DnsOutcome::Answered => "answered",
            DnsOutcome::Nodata => "nodata",
            DnsOutcome::Nxdomain => "nxdomain",
            DnsOutcome::Forwarded => "forwarded",
            DnsOutcome::ForwardFailed => "forward_failed",
            DnsOutcome::ForwardLimited => "forward_limited",
            DnsOutcome::Refused => "refused",
            DnsOutcome::Invalid => "invalid",
            DnsOutcome::NoAddress => "no_address",
            DnsOutcome::Unsure => "unsure",
        }
    }
}

#[derive(Debug, Default)]
pub struct DnsCounters([AtomicU64; DnsOutcome::ALL.len()]);

impl DnsCounters {
    pub fn count(&self, outcome: DnsOutcome) {
        self.0[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn value(&self, outcome: DnsOutcome) -> u64 {
        self.0[outcome as usize].load(Ordering::Relaxed)
    }
}
