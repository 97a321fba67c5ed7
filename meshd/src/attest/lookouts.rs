//! Threads that look at what may not answer, each subject with its own few, so that one cannot keep others waiting.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// Looks of one subject at once.
const AT_ONCE: usize = 2;
/// Long for a look, and short enough for whoever waits for its connection.
const DEADLINE: Duration = Duration::from_secs(3);
/// For those before it: some 200 looks a second are possible, and an application that was restarted opens 2,000
/// connections at once.
const PATIENCE: Duration = Duration::from_secs(10);
/// Subjects remembered; beyond it those that nobody looks at are forgotten.
const REMEMBERED: usize = 256;

/// A look that did not end in time, or had no turn by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "looking at its process takes too long (3 s, or 10 s with those before it); a file system that does not answer, or too much for one look"
)]
pub struct TooSlow;

#[derive(Debug, Default)]
pub(super) struct Lookouts(Mutex<HashMap<String, Arc<Semaphore>>>);

impl Lookouts {
    pub(super) async fn run<T: Send + 'static>(
        &self,
        subject: &str,
        look: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, TooSlow> {
        let line = self.line(subject);
        let Ok(Ok(turn)) = timeout(PATIENCE, line.acquire_owned()).await else { return Err(TooSlow) };
        let looking = spawn_blocking(move || {
            // Kept by a look that hangs: more of the same would hang as well.
            let _turn = turn;
            look()
        });
        match timeout(DEADLINE, looking).await {
            Ok(Ok(seen)) => Ok(seen),
            _ => Err(TooSlow),
        }
    }

    fn line(&self, subject: &str) -> Arc<Semaphore> {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = lines.get(subject) {
            return line.clone();
        }
        if lines.len() >= REMEMBERED {
            lines.retain(|_, line| line.available_permits() < AT_ONCE || Arc::strong_count(line) > 1);
        }
        let line = Arc::new(Semaphore::new(AT_ONCE));
        lines.insert(subject.to_owned(), line.clone());
        line
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::sync::oneshot;

    use super::*;

    /// As many looks as a subject may have, which hang until what is returned is dropped.
    async fn hang(lookouts: &Lookouts) -> Vec<mpsc::Sender<()>> {
        let mut hanging = Vec::new();
        for _ in 0..AT_ONCE {
            let ((release, hung), (begin, begun)) = (mpsc::channel::<()>(), oneshot::channel());
            let look = move || {
                begin.send(()).unwrap();
                hung.recv().is_err()
            };
            tokio::select! {
                _ = lookouts.run("nfs", look) => panic!("it hangs"),
                started = begun => started.unwrap(),
            }
            hanging.push(release);
        }
        hanging
    }

    // Time stands still while threads of this kind run.
    #[tokio::test(start_paused = true)]
    async fn looks_that_hang_keep_their_own_subject_waiting_and_no_other() {
        let lookouts = Lookouts::default();
        let hanging = hang(&lookouts).await;
        assert_eq!(lookouts.run("good", || 7).await, Ok(7));
        let (looked, ()) = tokio::join!(lookouts.run("nfs", || 7), tokio::time::advance(PATIENCE));
        assert_eq!(looked, Err(TooSlow));
        drop(hanging);
        assert_eq!(lookouts.run("nfs", || 7).await, Ok(7), "once they have ended");
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_for_a_turn_does_not_count_as_looking() {
        let lookouts = Lookouts::default();
        let hanging = hang(&lookouts).await;
        let others = async {
            tokio::time::advance(2 * DEADLINE).await;
            drop(hanging);
        };
        let (looked, ()) = tokio::join!(lookouts.run("nfs", || 7), others);
        assert_eq!(looked, Ok(7));
    }

    #[tokio::test]
    async fn subjects_are_forgotten_when_nobody_looks_at_them() {
        let lookouts = Lookouts::default();
        for number in 0..10 * REMEMBERED {
            lookouts.run(&number.to_string(), || ()).await.unwrap();
        }
        assert!(lookouts.0.lock().unwrap().len() <= REMEMBERED);
    }
}
