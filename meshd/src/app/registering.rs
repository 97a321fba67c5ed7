//! This host in the registers of backends, from the moment it serves until it leaves.

use std::net::TcpListener as StdListener;
use std::sync::Arc;
use std::time::Duration;

use meshd_discovery::{Configured, Registrations};
use meshd_pki_client::Credentials;
use tokio::sync::watch;
use tokio::time::sleep;

use super::Supervisor;
use crate::config::Config;
use crate::offers::Offering;
use crate::proxy::Shared;

/// Watches deliver within milliseconds; a peer that is busy, or follows by questions, has this long.
const PEERS_HEAR: Duration = Duration::from_secs(1);

/// In the sources that were told `register = true`.
pub(super) fn registrations(sources: &[Configured]) -> Arc<Registrations> {
    Arc::new(Registrations::new(sources.iter().filter_map(|source| source.registrar.clone()).collect()))
}

/// Whether peers' connections wait in listeners that outlive this process.
pub(super) fn hands_over(inherited: &[(String, StdListener)]) -> bool {
    inherited.iter().any(|(name, _)| name.starts_with("mesh-"))
}

pub(super) fn keep_registered(
    tasks: &Supervisor,
    config: &Config,
    shared: &Arc<Shared>,
    credentials: &watch::Receiver<Arc<Credentials>>,
    registrations: &Arc<Registrations>,
) {
    let Some(mesh) = config.proxy.mesh_listen.first().filter(|_| registrations.is_wanted()) else { return };
    let offering = Offering {
        registrations: registrations.clone(),
        shared: shared.clone(),
        credentials: credentials.clone(),
        host: config.host.clone(),
        mesh_port: mesh.port(),
    };
    tasks.keep("registration", offering, |offering| Box::pin(offering.run()));
}

/// How this host goes.
pub(super) struct Leaving {
    pub registrations: Arc<Registrations>,
    /// The next process takes over listeners, and registrations with them: their leases last until then.
    pub hands_over: bool,
}

impl Leaving {
    /// Before connections are ended: peers begin no new ones.
    pub(super) async fn announce(&self) {
        if !self.hands_over && self.registrations.drain().await {
            sleep(PEERS_HEAR).await;
        }
    }

    pub(super) async fn leave(&self) {
        if !self.hands_over {
            self.registrations.withdraw().await;
        }
    }
}
