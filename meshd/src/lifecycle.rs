//! How the daemon ends: running -> draining (no new work, old work goes on) -> stopped.

use tokio::sync::watch;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Everything is accepted.
    Running,
    /// Listeners are closed, peers told to go elsewhere (GOAWAY); open connections go on.
    Draining,
    /// Whatever is still open is cut.
    Stopped,
}

/// Held by whoever decides; dropping it stops everything.
#[derive(Debug)]
pub struct Conductor(watch::Sender<Stage>);

/// Held by whoever must obey.
#[derive(Clone, Debug)]
pub struct Lifecycle(watch::Receiver<Stage>);

pub fn channel() -> (Conductor, Lifecycle) {
    let (sender, receiver) = watch::channel(Stage::Running);
    (Conductor(sender), Lifecycle(receiver))
}

impl Conductor {
    pub fn enter(&self, stage: Stage) {
        self.0.send_replace(stage);
    }
}

impl Lifecycle {
    pub fn stage(&self) -> Stage {
        *self.0.borrow()
    }

    /// Returns once `stage` or a later one is reached.
    pub async fn reached(&mut self, stage: Stage) {
        // An error means the conductor is gone: everything is reached.
        let _ = self.0.wait_for(|current| *current >= stage).await;
    }
}
