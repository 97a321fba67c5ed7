//! How the connections of `meshd probe` ended: announced by their source port before they are made.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ConnectionEvent;

/// A probe that takes longer has been given up.
const LIFE: Duration = Duration::from_secs(120);
/// Operators who probe at the same time.
const MAX: usize = 16;

#[derive(Debug, Default)]
pub struct Probes {
    /// Whether there is any: all that ordinary connections ask.
    any: AtomicBool,
    announced: Mutex<Vec<Probe>>,
}

#[derive(Debug)]
struct Probe {
    port: u16,
    at: Instant,
    event: Option<ConnectionEvent>,
}

impl Probes {
    /// A connection from this port will come.
    pub fn announce(&self, port: u16, now: Instant) {
        let mut announced = self.lock();
        announced.retain(|probe| probe.port != port && now.saturating_duration_since(probe.at) < LIFE);
        if announced.len() >= MAX {
            announced.remove(0);
        }
        announced.push(Probe { port, at: now, event: None });
        self.any.store(true, Ordering::Relaxed);
    }

    pub fn any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// The end of an outbound connection; kept if it was announced.
    pub fn record(&self, event: &ConnectionEvent) {
        let mut announced = self.lock();
        announced.retain(|probe| probe.at.elapsed() < LIFE);
        if let Some(probe) = announced.iter_mut().find(|probe| probe.port == event.peer.port()) {
            probe.event = Some(event.clone());
        }
        self.any.store(!announced.is_empty(), Ordering::Relaxed);
    }

    /// How the announced connection ended, once it has.
    pub fn take(&self, port: u16) -> Option<ConnectionEvent> {
        let mut announced = self.lock();
        let at = announced.iter().position(|probe| probe.port == port && probe.event.is_some())?;
        let event = announced.swap_remove(at).event;
        self.any.store(!announced.is_empty(), Ordering::Relaxed);
        event
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Probe>> {
        self.announced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::telemetry::Direction;

    fn ended(peer: &str) -> ConnectionEvent {
        ConnectionEvent {
            at: SystemTime::now(),
            duration: Duration::ZERO,
            direction: Direction::Outbound,
            unit: None,
            client_id: None,
            server_id: None,
            service: None,
            port: 80,
            peer: peer.parse().unwrap(),
            endpoint: None,
            bytes_sent: 0,
            bytes_received: 0,
            outcome: "no_endpoints",
        }
    }

    #[test]
    fn only_what_was_announced_is_kept_and_told_once() {
        let probes = Probes::default();
        assert!(!probes.any());
        probes.announce(40000, Instant::now());
        assert!(probes.any());
        probes.record(&ended("10.0.0.1:40001"));
        assert!(probes.take(40001).is_none() && probes.take(40000).is_none());
        probes.record(&ended("10.0.0.1:40000"));
        assert_eq!(probes.take(40000).unwrap().outcome, "no_endpoints");
        assert!(probes.take(40000).is_none() && !probes.any());
    }

    #[test]
    fn probes_nobody_asked_about_are_forgotten() {
        let probes = Probes::default();
        let now = Instant::now();
        for port in 0..100 {
            probes.announce(port, now);
        }
        assert_eq!(probes.lock().len(), MAX);
        probes.announce(200, now + LIFE);
        assert_eq!(probes.lock().len(), 1);
    }
}
