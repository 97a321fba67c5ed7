//! How much one address may ask of us before it has proven who it is, and after.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::fault::Fault;

/// Handshakes under way per source address: each may hold its slot for 3 s and costs about 1 ms of CPU.
const HANDSHAKES_PER_SOURCE: u32 = 64;
/// Connections per source address: a peer of 64 workloads x 4 workers x 4 connections.
const CONNECTIONS_PER_SOURCE: u32 = 1024;

#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    handshakes: u32,
    connections: u32,
}

/// Shared by all workers: a source must not get a quota per worker.
#[derive(Debug, Default, Clone)]
pub(super) struct SourceLimits(Arc<Mutex<HashMap<IpAddr, Counts>>>);

/// A connection counted against its source until dropped.
#[derive(Debug)]
pub(super) struct Admission {
    limits: SourceLimits,
    source: IpAddr,
    shaking: bool,
}

impl SourceLimits {
    pub(super) fn admit(&self, source: IpAddr) -> Result<Admission, Fault> {
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = sources.entry(source).or_default();
        if counts.handshakes >= HANDSHAKES_PER_SOURCE || counts.connections >= CONNECTIONS_PER_SOURCE {
            return Err(Fault::Limit);
        }
        counts.handshakes += 1;
        counts.connections += 1;
        Ok(Admission { limits: self.clone(), source, shaking: true })
    }

    fn change(&self, source: IpAddr, change: impl FnOnce(&mut Counts)) {
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(counts) = sources.get_mut(&source) {
            change(counts);
            if counts.connections == 0 {
                sources.remove(&source);
            }
        }
    }
}

impl Admission {
    /// The handshake is over; the connection goes on.
    pub(super) fn shaken(&mut self) {
        if std::mem::take(&mut self.shaking) {
            self.limits.change(self.source, |counts| counts.handshakes -= 1);
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.shaken();
        self.limits.change(self.source, |counts| counts.connections -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_cannot_take_every_handshake() {
        let limits = SourceLimits::default();
        let (greedy, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mut held: Vec<_> = (0..HANDSHAKES_PER_SOURCE).map(|_| limits.admit(greedy).unwrap()).collect();
        assert_eq!(limits.admit(greedy).unwrap_err(), Fault::Limit);
        assert!(limits.admit(other).is_ok());
        held[0].shaken();
        assert!(limits.admit(greedy).is_ok());
    }

    #[test]
    fn what_ended_is_forgotten() {
        let limits = SourceLimits::default();
        drop(limits.admit(IpAddr::from([10, 0, 0, 1])));
        assert!(limits.0.lock().unwrap().is_empty());
    }
}
