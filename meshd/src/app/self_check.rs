//! Every minute this host shakes hands with itself, for each identity it serves: a certificate or bundle that peers
//! would refuse is noticed before they do.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use crate::proxy::Shared;
use crate::transport::self_check::handshake;

const EVERY: Duration = Duration::from_secs(60);

pub(super) async fn watch(shared: Arc<Shared>) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let tls = shared.tls.load_full();
        let ids: Vec<_> = tls.identities().cloned().collect();
        for id in &ids {
            let shaken = handshake(&tls, id);
            if let Err(error) = &shaken {
                tracing::error!(%id, error, "this host would not believe itself: peers will refuse it, too");
            }
            shared.telemetry.self_handshakes.note(id, shaken);
            // A host with many identities answers others in between.
            tokio::task::yield_now().await;
        }
        shared.telemetry.self_handshakes.keep(&ids);
    }
}
