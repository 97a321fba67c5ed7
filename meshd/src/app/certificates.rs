//! Certificates as they come, with what the PKI says of who may have them, and TLS made of them.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use meshd_identity::SpiffeId;
use meshd_pki_client::Credentials;
use tokio::sync::watch;

use super::reload::withhold;
use super::{SETTLE, StartError};
use crate::config::{Config, identity_in};
use crate::enrol::Enrolment;
use crate::proxy::Shared;
use crate::transport::tls::TlsState;

/// Puts certificates in use.
pub(super) struct Certificates {
    shared: Arc<Shared>,
    default_identity: Option<SpiffeId>,
    changes: watch::Sender<u64>,
    /// What programs may be told of.
    published: watch::Sender<Arc<Credentials>>,
    /// What was put in use last. Enrolment in force agrees with it: that changes under this lock only.
    installed: Mutex<Arc<Credentials>>,
}

impl Certificates {
    /// `installed` are those `shared` has already.
    pub(super) fn new(
        shared: Arc<Shared>,
        default_identity: Option<SpiffeId>,
        installed: Arc<Credentials>,
    ) -> Certificates {
        let (changes, published) = (watch::Sender::new(0), watch::Sender::new(installed.clone()));
        Certificates { shared, default_identity, changes, published, installed: installed.into() }
    }

    /// Counts what was put in use.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// What was put in use, once who may have it was settled.
    pub(super) fn published(&self) -> watch::Receiver<Arc<Credentials>> {
        self.published.subscribe()
    }

    pub(super) fn installed(&self) -> Arc<Credentials> {
        self.lock().clone()
    }

    /// Puts enrolment in force as far as the PKI agrees with it by now; what was in force before.
    pub(super) fn enrol(&self, enrolment: &Enrolment) -> Arc<Enrolment> {
        let installed = self.lock();
        self.shared.enrolment.swap(self.agreed(enrolment, &installed))
    }

    /// New certificates: all or nothing, and nothing changes when they are unusable.
    pub(super) fn install(&self, credentials: Arc<Credentials>) {
        let mut installed = self.lock();
        if Arc::ptr_eq(&installed, &credentials) {
            return;
        }
        let before = std::mem::replace(&mut *installed, credentials.clone());
        // First of all, and whatever becomes of reading enrol.d again: nobody is shown a key that came for others.
        if before.selectors != credentials.selectors {
            let agreed = self.agreed(&self.shared.enrolment.load(), &credentials);
            self.shared.enrolment.store(agreed);
        }
        self.use_for_tls(&before, &credentials);
        self.published.send_replace(credentials);
    }

    fn agreed(&self, enrolment: &Enrolment, credentials: &Credentials) -> Arc<Enrolment> {
        let mut agreed = enrolment.clone();
        withhold(&mut agreed, credentials, self.shared.attestor.sight());
        Arc::new(agreed)
    }

    fn use_for_tls(&self, before: &Credentials, credentials: &Credentials) {
        let tls = self.shared.tls.load();
        let Some(generations) = tls.generations().after(before, credentials) else { return };
        let denied = tls.denied().clone();
        match TlsState::build_denying(credentials, self.default_identity.as_ref(), generations, denied) {
            Ok(tls) => {
                self.shared.tls.store(Arc::new(tls));
                self.changes.send_modify(|count| *count += 1);
            }
            Err(error) => tracing::error!(%error, "new certificates are unusable; keeping the ones in force"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Arc<Credentials>> {
        self.installed.lock().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
mod tests {
    use arc_swap::ArcSwap;
    use meshd_discovery::Directory;
    use meshd_identity::TrustDomain;
    use meshd_pki_client::fake::FakeCa;
    use meshd_sys::sockets::Mark;
    use tempfile::TempDir;

    use super::*;
    use crate::attest::Attestor;
    use crate::dns::Vips;
    use crate::enrol::{PortWatch, Reserved, Sight, load};
    use crate::proxy::{Locality, ProxyConfig, RawPlaces};
    use crate::telemetry::{AccessLog, Telemetry};
    use crate::transport::generations::Generation;

    const SELECTOR: &str = "unix:path:/usr/bin/checkout";

    struct Daemon {
        ca: FakeCa,
        first: Arc<Credentials>,
        shared: Arc<Shared>,
        certificates: Certificates,
        state: TempDir,
    }

    fn domain() -> TrustDomain {
        "mesh.example".parse().unwrap()
    }

    fn checkout() -> SpiffeId {
        SpiffeId::workload(&domain(), "shop", "checkout").unwrap()
    }

    fn enrolled(dir: &Path) -> Enrolment {
        let enrol = dir.join("enrol.d");
        std::fs::create_dir_all(&enrol).unwrap();
        let text = "[[workload]]\nunit = \"checkout.service\"\nnamespace = \"shop\"\nname = \"checkout\"\n";
        std::fs::write(enrol.join("a.toml"), text).unwrap();
        load(&enrol, &domain(), &Reserved::default()).unwrap()
    }

    impl Daemon {
        fn new() -> Daemon {
            let (state, ca) = (tempfile::tempdir().unwrap(), FakeCa::new(domain()));
            let first = Arc::new(ca.credentials("host", &[checkout()]));
            let vips = Vips::open(
                &state.path().join("vips.json"),
                "240.240.0.0/16".parse().unwrap(),
                "fd77::/64".parse().unwrap(),
            );
            let shared = Arc::new(Shared {
                config: ProxyConfig::default(),
                mark: Mark(0),
                directory: ArcSwap::<Directory>::default(),
                enrolment: ArcSwap::from_pointee(enrolled(state.path())),
                attestor: Arc::new(Attestor::new(Sight::On)),
                ports: PortWatch::default(),
                tls: ArcSwap::from_pointee(TlsState::build(&first, None, 0).unwrap()),
                vips: Arc::new(vips.unwrap()),
                raw: ArcSwap::<RawPlaces>::default(),
                telemetry: Telemetry::new(1, AccessLog::off()),
                locality: Locality::default(),
                suspects: meshd_discovery::Suspects::ignored(),
                lookups: meshd_discovery::Lookups::off(),
            });
            let certificates = Certificates::new(shared.clone(), None, first.clone());
            Daemon { ca, first, shared, certificates, state }
        }

        /// A certificate that comes with these selectors.
        fn issued(&self, selectors: &[&str]) -> Arc<Credentials> {
            let mut next = self.ca.credentials("host", &[checkout()]);
            let selectors = selectors.iter().map(|one| (*one).to_owned()).collect();
            next.selectors.insert(checkout(), selectors);
            Arc::new(next)
        }

        fn guarded(&self) -> bool {
            self.shared.enrolment.load().guard(&checkout()).is_some_and(|guard| guard.needs_program())
        }

        fn generation(&self) -> Generation {
            self.shared.tls.load().generation(&domain())
        }
    }

    #[test]
    fn selectors_are_in_force_with_the_certificate_they_came_with_whatever_becomes_of_enrol_d() {
        let daemon = Daemon::new();
        assert!(!daemon.guarded());
        let published = daemon.certificates.published();
        daemon.certificates.install(daemon.issued(&[SELECTOR]));
        assert!(daemon.guarded() && published.has_changed().unwrap());
        daemon.certificates.install(daemon.issued(&["systemd:unit:other.service"]));
        let enrolment = daemon.shared.enrolment.load();
        assert_eq!((enrolment.workloads().len(), enrolment.withheld().len()), (0, 1));
        assert_eq!(enrolment.identities().len(), 1, "it is asked for all the same");
    }

    #[test]
    fn enrolment_that_was_read_before_the_selectors_came_is_held_against_them() {
        let daemon = Daemon::new();
        let read = enrolled(daemon.state.path());
        daemon.certificates.install(daemon.issued(&[SELECTOR]));
        let before = daemon.certificates.enrol(&read);
        assert!(daemon.guarded());
        daemon.certificates.enrol(&before);
        assert!(daemon.guarded(), "also when it goes back to what was");
    }

    #[test]
    fn a_foreign_bundle_that_only_counts_on_is_published_and_renews_no_connection() {
        let daemon = Daemon::new();
        let (changes, generation) = (daemon.certificates.changes(), daemon.generation());
        let mut next = (*daemon.first).clone();
        next.federation.revision = 7;
        next.federation.refused.insert("other.example".to_owned(), "no root".to_owned());
        let published = daemon.certificates.published();
        daemon.certificates.install(Arc::new(next));
        assert!(published.has_changed().unwrap());
        assert!(!changes.has_changed().unwrap() && daemon.generation() == generation);
        daemon.certificates.install(daemon.issued(&[]));
        assert!(changes.has_changed().unwrap() && daemon.generation() != generation);
    }

    #[test]
    fn a_federation_that_begins_is_in_force_and_renews_no_connection_of_ours() {
        let daemon = Daemon::new();
        let other: TrustDomain = "other.example".parse().unwrap();
        let generation = daemon.generation();
        let mut next = (*daemon.first).clone();
        next.federation = FakeCa::new(&other).federated_for(&[checkout()]);
        daemon.certificates.install(Arc::new(next));
        assert!(daemon.shared.tls.load().knows(&other) && daemon.generation() == generation);
    }
}
