//! Certificates as they come, and TLS made of them.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use meshd_identity::SpiffeId;
use meshd_pki_client::Credentials;
use tokio::sync::watch;

use super::{SETTLE, StartError};
use crate::config::{Config, identity_in};
use crate::proxy::Shared;
use crate::transport::tls::TlsState;

/// Puts certificates in use.
pub(super) struct Certificates {
    shared: Arc<Shared>,
    default_identity: Option<SpiffeId>,
    changes: watch::Sender<u64>,
    /// What was put in use last.
    installed: Mutex<Arc<Credentials>>,
}

impl Certificates {
    /// `installed` are those `shared` has already.
    pub(super) fn new(
        shared: Arc<Shared>,
        default_identity: Option<SpiffeId>,
        installed: Arc<Credentials>,
    ) -> Certificates {
        Certificates { shared, default_identity, changes: watch::Sender::new(0), installed: installed.into() }
    }

    /// Counts what was put in use.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// New certificates: all or nothing, and nothing changes when they are unusable.
    pub(super) fn install(&self, credentials: Arc<Credentials>) {
        let mut installed = self.installed.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&installed, &credentials) {
            return;
        }
        let before = std::mem::replace(&mut *installed, credentials.clone());
        let tls = self.shared.tls.load();
        let Some(generations) = tls.generations().after(&before, &credentials) else { return };
        let denied = tls.denied().clone();
        match TlsState::build_denying(&credentials, self.default_identity.as_ref(), generations, denied) {
            Ok(tls) => {
                self.shared.tls.store(Arc::new(tls));
                self.changes.send_modify(|count| *count += 1);
            }
            Err(error) => tracing::error!(%error, "new certificates are unusable; keeping the ones in force"),
        }
    }
}

/// "Ready" should mean that workloads can be reached: waits for the certificates of newly enrolled ones,
/// but not for a PKI that is away. What was on disk already is served at once.
pub(super) async fn wait_for_certificates(
    credentials: &mut watch::Receiver<Arc<Credentials>>,
    wanted: &BTreeSet<SpiffeId>,
) {
    let settled = credentials.wait_for(|credentials| {
        wanted.iter().all(|id| credentials.workloads.contains_key(id) || credentials.refused.contains_key(id))
    });
    if tokio::time::timeout(SETTLE, settled).await.is_err() {
        tracing::warn!("the PKI has not issued every certificate yet; serving with those that are there");
    }
}

pub(super) fn default_identity(
    config: &Config,
    path: &Path,
    credentials: &Credentials,
) -> Result<Option<SpiffeId>, StartError> {
    let Some(text) = &config.proxy.default_identity else { return Ok(None) };
    let id = identity_in(&credentials.trust_domain, text, path, "proxy.default_identity");
    id.map(Some).map_err(|error| StartError(error.to_string()))
}
