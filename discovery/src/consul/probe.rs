//! Asks now and then, beside the watches, which cluster it is; and what it means when nobody answers.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::remote::{Error, Remote};
use crate::backoff::jittered;

/// How soon an agent that stands still, or a cluster without a leader, is noticed: this and a call's deadline (5 s). A
/// thousand hosts ask 100 times a second.
pub(super) const PROBE_EVERY: Duration = Duration::from_secs(10);
/// After one that failed: whether all is to begin anew is not to hang on a single answer.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// What one of them shows.
#[derive(Debug)]
pub(super) enum Sign {
    /// It answers, as this cluster if it knows.
    Well(Option<Arc<str>>),
    /// What is followed goes on: to begin anew would give a Consul that is slow the more to do.
    Trouble(Error),
    /// Nothing that was asked before is going to be answered.
    Lost(Error),
}

type Answer = Result<Option<Arc<str>>, Error>;

pub(super) struct Probe<R> {
    tasks: JoinSet<(R, Answer)>,
    /// Unless it asks.
    idle: Option<R>,
    at: Instant,
    has_failed: bool,
}

impl<R: Remote> Probe<R> {
    pub(super) fn new(remote: R) -> Probe<R> {
        Probe { tasks: JoinSet::new(), idle: Some(remote), at: Instant::now() + PROBE_EVERY, has_failed: false }
    }

    /// Waits for it. May be dropped and called again.
    pub(super) async fn sign(&mut self) -> Sign {
        if self.idle.is_some() {
            sleep_until(self.at).await;
        }
        if let Some(mut remote) = self.idle.take() {
            self.tasks.spawn(async move {
                let said = remote.cluster().await;
                (remote, said)
            });
        }
        match self.tasks.join_next().await {
            Some(Ok((remote, said))) => self.judge(remote, said),
            _ => Sign::Lost(Error::Inside),
        }
    }

    fn judge(&mut self, remote: R, said: Answer) -> Sign {
        let pause = if said.as_ref().is_err_and(|error| !error.is_busy()) { AGAIN_AFTER } else { PROBE_EVERY };
        self.at = Instant::now() + jittered(pause, fastrand::f64() / 2.0);
        match said {
            Ok(cluster) => {
                (self.idle, self.has_failed) = (Some(remote), false);
                Sign::Well(cluster)
            }
            Err(error) => {
                self.idle = Some(remote.another());
                let is_lost = error.is_gone() || (self.has_failed && !error.is_busy());
                self.has_failed |= !error.is_busy();
                if is_lost { Sign::Lost(error) } else { Sign::Trouble(error) }
            }
        }
    }
}
