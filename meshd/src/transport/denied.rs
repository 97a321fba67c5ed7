//! Whom every handshake and every open connection is held against.

use std::sync::Arc;

use meshd_identity::denial::{DenyIndex, Marks};
use meshd_identity::statements::DenySet;
use tokio::sync::watch;

/// Puts the sets in force that the PKI's agent has.
#[derive(Debug)]
pub struct Follower {
    sets: watch::Receiver<Arc<DenySet>>,
    sender: watch::Sender<Arc<DenyIndex>>,
}

impl Follower {
    /// For ever.
    pub async fn run(&mut self) {
        loop {
            let set = self.sets.borrow_and_update().clone();
            if self.sender.borrow().sequence != set.sequence {
                self.sender.send_replace(Arc::new(DenyIndex::of(&set)));
            }
            if self.sets.changed().await.is_err() {
                // The agent is gone; what it said last stays in force.
                std::future::pending::<()>().await;
            }
        }
    }
}

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

    /// What the PKI's agent has, for as long as the follower runs.
    pub fn follow(mut sets: watch::Receiver<Arc<DenySet>>) -> (Denied, Follower) {
        let (sender, receiver) = watch::channel(Arc::new(DenyIndex::of(&sets.borrow_and_update())));
        (Denied(receiver), Follower { sets, sender })
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
