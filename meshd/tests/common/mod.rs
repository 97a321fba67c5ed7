//! What the tests of the data plane share: hosts in this process, applications, peers that speak the wire.

// Every test program compiles this anew and uses its own part of it.
#![allow(dead_code, reason = "each test program uses a part")]

pub(crate) mod application;
pub(crate) mod far_side;
pub(crate) mod host;
pub(crate) mod peer;

use std::time::Duration;

use meshd_identity::{SpiffeId, TrustDomain};
use tokio::time::{interval, timeout};

/// Far more than anything here needs; a test that hangs fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// How often a condition nobody announces is looked at.
const LOOK: Duration = Duration::from_millis(2);

pub(crate) fn domain() -> TrustDomain {
    "prod.example.org".parse().unwrap()
}

pub(crate) fn identity(name: &str) -> SpiffeId {
    SpiffeId::workload(&domain(), "shop", name).unwrap()
}

/// Waits for what another thread does and announces nowhere.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let look = async {
        let mut look = interval(LOOK);
        while !condition() {
            look.tick().await;
        }
    };
    within(what, look).await;
}

/// The result of something that must happen.
pub(crate) async fn within<T>(what: &str, happens: impl Future<Output = T>) -> T {
    timeout(PATIENCE, happens).await.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}
