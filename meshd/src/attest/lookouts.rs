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
/// Subjects remembered; beyond it those that nobody looks at are forgotten.
const REMEMBERED: usize = 256;

/// A look that did not end in time, or had no turn by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("looking at its process takes too long (3 s); a file system that does not answer, or too much for one look")]
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
        let looking = async {
            let turn = line.acquire_owned().await.map_err(|_| TooSlow)?;
            let looked = spawn_blocking(move || {
                // Kept by a look that hangs: more of the same would hang as well.
                let _turn = turn;
                look()
            });
            looked.await.map_err(|_| TooSlow)
        };
        timeout(DEADLINE, looking).await.unwrap_or(Err(TooSlow))
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

    #[tokio::test(start_paused = true)]
    async fn looks_that_hang_keep_their_own_subject_waiting_and_no_other() {
        let lookouts = Lookouts::default();
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
        assert_eq!(lookouts.run("good", || 7).await, Ok(7));
        // Time stands still while threads of this kind run.
        let (looked, ()) = tokio::join!(lookouts.run("nfs", || 7), tokio::time::advance(DEADLINE));
        assert_eq!(looked, Err(TooSlow));
        hanging.clear();
        assert_eq!(lookouts.run("nfs", || 7).await, Ok(7), "once they have ended");
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
