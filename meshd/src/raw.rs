//! Raw addresses of services named in `[capture] raw`: follows the directory, and tells the workers what they stand
//! for and the kernel what to capture, in the order that leaves no captured connection without a service.

use std::collections::BTreeSet;
use std::sync::Arc;

use meshd_discovery::{Directory, ServiceName};
use tokio::sync::watch;

use crate::capture::KeeperHandle;
use crate::proxy::{RawPlaces, Shared};

pub(crate) struct RawFollower {
    names: BTreeSet<ServiceName>,
    shared: Arc<Shared>,
    keeper: KeeperHandle,
    current: RawPlaces,
    told: Vec<String>,
}

impl RawFollower {
    pub(crate) fn new(names: &BTreeSet<ServiceName>, shared: Arc<Shared>, keeper: KeeperHandle) -> RawFollower {
        RawFollower { names: names.clone(), shared, keeper, current: RawPlaces::default(), told: Vec::new() }
    }

    pub(crate) async fn follow(&mut self, directory: &mut watch::Receiver<Arc<Directory>>) {
        loop {
            let now = directory.borrow_and_update().clone();
            self.follow_to(&now).await;
            if directory.changed().await.is_err() {
                // Discovery is gone; what it said last stays.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Returns when the kernel captures the raw addresses of this directory, and no others.
    pub(crate) async fn follow_to(&mut self, directory: &Directory) {
        let (places, problems) = RawPlaces::of(directory, &self.names);
        for problem in problems.iter().filter(|problem| !self.told.contains(problem)) {
            tracing::warn!("raw addresses: {problem}");
        }
        self.told = problems;
        if places == self.current {
            return;
        }
        self.shared.raw.store(Arc::new(places.and(&self.current)));
        self.keeper.raw_addresses(places.addresses()).await;
        self.current = places;
    }
}
