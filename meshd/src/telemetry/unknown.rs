//! `meshd_identify_unknown_total{state}`: connections whose socket had no owner when the kernel was asked.

use std::sync::atomic::{AtomicU64, Ordering};

/// By the kernel's numbers (include/net/tcp_states.h); 0 is none of its states.
const STATES: [&str; 15] = [
    "missing",
    "established",
    "syn_sent",
    "syn_recv",
    "fin_wait1",
    "fin_wait2",
    "time_wait",
    "close",
    "close_wait",
    "last_ack",
    "listen",
    "closing",
    "new_syn_recv",
    "no_answer",
    "not_looked_for",
];

#[derive(Debug, Default)]
pub struct UnknownOwners([AtomicU64; STATES.len()]);

impl UnknownOwners {
    /// The socket was there, in a state nobody owns (or without its inode: closed by its process).
    pub fn orphaned(&self, state: u8) {
        self.count(usize::from(state));
    }

    /// There was no such socket any more.
    pub fn missing(&self) {
        self.count(0);
    }

    /// The kernel did not answer.
    pub fn no_answer(&self) {
        self.count(STATES.len() - 2);
    }

    /// Its cgroup is one of too many that nobody knows.
    pub fn not_looked_for(&self) {
        self.count(STATES.len() - 1);
    }

    fn count(&self, at: usize) {
        // A state this list does not know of is as good as none.
        let counter = self.0.get(at).unwrap_or(&self.0[0]);
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        STATES.into_iter().zip(self.0.iter().map(|counter| counter.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_state_is_counted_under_the_kernels_name() {
        let unknown = UnknownOwners::default();
        unknown.orphaned(6);
        unknown.orphaned(5);
        unknown.orphaned(200);
        unknown.missing();
        unknown.no_answer();
        let counted: Vec<_> = unknown.counts().filter(|(_, count)| *count > 0).collect();
        assert_eq!(counted, [("missing", 2), ("fin_wait2", 1), ("time_wait", 1), ("no_answer", 1)]);
    }
}
