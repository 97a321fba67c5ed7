//! Whom every handshake and every open connection is held against.

use std::sync::Arc;

use meshd_identity::denial::{DenyIndex, Marks};
use meshd_identity::statements::DenySet;
use tokio::sync::watch;

/// Cheap to clone; all clones see the set in force.
#[derive(Debug, Clone)]
pub struct Denied(watch::Receiver<Arc<DenyIndex>>);

impl Denied {
    /// For a host that never heard of a deny set.
    pub fn nobody() -> Denied {
        Denied::channel().1
    }

    pub fn channel() -> (watch::Sender<Arc<DenyIndex>>, Denied) {
        let (sender, receiver) = watch::channel(Arc::default());
        (sender, Denied(receiver))
    }

    /// What the PKI's agent has, from now on.
    pub fn follow(mut sets: watch::Receiver<Arc<DenySet>>) -> Denied {
        let index = |set: &Arc<DenySet>| Arc::new(DenyIndex::of(set));
        let (sender, receiver) = watch::channel(index(&sets.borrow_and_update()));
        tokio::spawn(async move {
            while sets.changed().await.is_ok() {
                sender.send_replace(index(&sets.borrow_and_update()));
            }
            // The agent is gone; what it said last stays in force.
            sender.closed().await;
        });
        Denied(receiver)
    }

    pub fn denies(&self, marks: &Marks) -> bool {
        self.0.borrow().denies(marks)
    }

    pub fn index(&self) -> Arc<DenyIndex> {
        self.0.borrow().clone()
    }

    /// Resolves when another set is in force than this clone last waited for; never once nobody can change it.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
