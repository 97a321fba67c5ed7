//! When each request of a fixed-rate load is due.

use std::rc::Rc;
use std::time::{Duration, Instant};

use meshd_tests::wait::rest;
use tokio::sync::Mutex;
use tokio::sync::mpsc::{Receiver, Sender, channel};

/// tokio's timer rounds up to a millisecond, which would show in every latency; a thread's sleep does not.
const TICK: Duration = Duration::from_micros(100);
/// Requests that wait for a free connection; the load ends when even this is full.
const BACKLOG: usize = 1 << 20;

/// Hands out the instants at which requests should start, whether or not anyone is free to send them.
pub(crate) struct Pace {
    due: Mutex<Receiver<Instant>>,
}

impl Pace {
    pub(crate) fn start(rate: u32) -> Rc<Self> {
        let (sender, due) = channel(BACKLOG);
        std::thread::spawn(move || plan(f64::from(rate), &sender));
        Rc::new(Self { due: Mutex::new(due) })
    }

    /// The next instant due, waiting for it.
    pub(crate) async fn next(&self) -> Option<Instant> {
        self.due.lock().await.recv().await
    }
}

/// Runs until nobody listens any more.
fn plan(rate: f64, sender: &Sender<Instant>) {
    let start = Instant::now();
    let mut planned = 0_u32;
    loop {
        while let Some(due) = due_by(start, rate, planned, Instant::now()) {
            if sender.try_send(due).is_err() {
                return;
            }
            planned += 1;
        }
        rest(TICK);
    }
}

fn due_by(start: Instant, rate: f64, planned: u32, now: Instant) -> Option<Instant> {
    let due = start + Duration::from_secs_f64(f64::from(planned) / rate);
    (due <= now).then_some(due)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_due_evenly_whenever_one_looks() {
        let start = Instant::now();
        let late = start + Duration::from_millis(10);
        let due: Vec<_> = (0..).map_while(|planned| due_by(start, 1000.0, planned, late)).collect();
        assert_eq!(due.len(), 11);
        assert_eq!(due[3] - start, Duration::from_millis(3));
    }
}
