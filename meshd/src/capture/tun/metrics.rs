//! What operators see of the device.

use std::sync::atomic::{AtomicU64, Ordering};

use super::flows::Flows;
use crate::telemetry::Exposition;

impl Flows {
    /// As of now.
    pub fn metrics(&self) -> Vec<Exposition> {
        let counters = &self.counters;
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64;
        let by_reason = |reasons: &[(&'static str, &AtomicU64)]| {
            reasons.iter().map(|(reason, counter)| (vec![("reason", (*reason).into())], value(counter))).collect()
        };
        vec![
            Exposition::gauge(
                "meshd_tun_connections",
                "Captured connections in the table, those in TIME_WAIT included",
                vec![(Vec::new(), self.len() as f64)],
            ),
            Exposition::counter(
                "meshd_tun_packets",
                "Packets that came out of the capture device",
                vec![(Vec::new(), value(&counters.packets))],
            ),
            Exposition::counter(
                "meshd_tun_bytes",
                "Bytes that came out of the capture device",
                vec![(Vec::new(), value(&counters.bytes))],
            ),
            Exposition::counter(
                "meshd_tun_unanswered",
                "First packets of connections that had to be said again: a firewall in the way, or too much to do",
                vec![(Vec::new(), self.unanswered() as f64)],
            ),
            Exposition::counter(
                "meshd_tun_refused",
                "Packets answered with a reset: too many connections, or of no known one",
                by_reason(&[("full", &counters.full), ("unknown", &counters.unknown)]),
            ),
            Exposition::counter(
                "meshd_tun_dropped",
                "Packets from the capture device that went nowhere",
                by_reason(&[
                    ("not_tcp", &counters.not_tcp),
                    ("fragment", &counters.fragments),
                    ("malformed", &counters.malformed),
                    ("stray", &counters.strays),
                    ("forgotten", &counters.forgotten),
                    ("unwritten", &counters.unwritten),
                ]),
            ),
        ]
    }
}
