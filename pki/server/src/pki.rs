//! The running PKI, independent of how requests reach it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::SystemTime;

use meshd_identity::TrustDomain;
use meshd_pki_api::v1;

use crate::audit::{Allowance, Audit, Event};
use crate::db::{self, authorities};
use crate::keys::Kek;
use crate::lifetimes::Lifetimes;
use crate::metrics::{Certificate, Metrics};
use crate::refused::Refused;
use crate::signer::{Signer, SignerError};
use crate::state_dir::{StateDir, StateError};
use crate::times::{Clock, from_unix, unix, unix_ms};

/// Records of certificates and tokens are kept this long after their end.
const KEEP_S: i64 = 30 * 86_400;

pub struct Options {
    pub lifetimes: Lifetimes,
    /// `HOST:PORT` hosts are told to use; empty leaves them with those of their token.
    pub advertise: Vec<String>,
    pub clock: Clock,
}

impl Default for Options {
    fn default() -> Options {
        Options { lifetimes: Lifetimes::default(), advertise: Vec::new(), clock: Arc::new(SystemTime::now) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("{0}")]
    Lifetimes(String),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Signer(#[from] SignerError),
}

pub struct Pki {
    pub trust_domain: TrustDomain,
    pub metrics: Metrics,
    pub(crate) lifetimes: Lifetimes,
    pub(crate) advertise: Vec<String>,
    clock: Clock,
    kek: Kek,
    /// One connection behind one lock: the single writer of this process.
    state: Mutex<StateDir>,
    signer: RwLock<Arc<Signer>>,
    refusals: Mutex<Allowance>,
    _running: File,
}

impl Pki {
    pub fn open(dir: &Path, options: Options) -> Result<Pki, PkiError> {
        options.lifetimes.check().map_err(PkiError::Lifetimes)?;
        let mut state = StateDir::open(dir)?;
        let running = state.lock()?;
        state.check()?;
        let kek = state.kek()?;
        if !options.advertise.is_empty() {
            let addresses = options.advertise.join(" ");
            db::set_meta(state.database.reader(), "advertise", &addresses).map_err(StateError::from)?;
        }
        let now = (options.clock)();
        let signer = Signer::load(&mut state, &kek, &options.lifetimes, now)?;
        let pki = Pki {
            trust_domain: state.trust_domain.clone(),
            metrics: Metrics::new(),
            lifetimes: options.lifetimes,
            advertise: options.advertise,
            clock: options.clock,
            kek,
            state: Mutex::new(state),
            signer: RwLock::new(Arc::new(signer)),
            refusals: Mutex::new(Allowance::new(unix(now))),
            _running: running,
        };
        pki.export_expiry()?;
        Ok(pki)
    }

    /// Replaces what is due and forgets what is long over. Called every few seconds; does nothing most times.
    pub fn maintain(&self) -> Result<(), PkiError> {
        let now = self.now();
        if self.signer().is_fresh(now) {
            return Ok(());
        }
        let mut state = self.state();
        let signer = Signer::load(&mut state, &self.kek, &self.lifetimes, now)?;
        authorities::prune(state.database.reader(), unix(now) - KEEP_S).map_err(StateError::from)?;
        drop(state);
        *self.signer.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(signer);
        self.export_expiry()
    }

    /// The trust bundle with this digest, or the latest.
    pub fn bundle(&self, digest: &[u8]) -> Result<v1::TrustBundle, Refused> {
        let state = self.state();
        let reader = state.database.reader();
        let found = match digest.len() {
            0 => authorities::latest_bundle(reader)?,
            32 => authorities::bundle_by_digest(reader, digest)?,
            length => {
                return Err(Refused::Invalid(format!("the bundle digest has {length} bytes; SHA-256 has 32")));
            }
        };
        let row = found.ok_or_else(|| {
            let domain = &self.trust_domain;
            let text = format!("the PKI of `{domain}` never had the bundle asked for; make a new join token from it");
            Refused::NotFound(text)
        })?;
        Ok(v1::TrustBundle { trust_domain: self.trust_domain.to_string(), sequence: row.sequence, jwks: row.jwks })
    }

    pub(crate) fn now(&self) -> SystemTime {
        (self.clock)()
    }

    pub(crate) fn now_ms(&self) -> u64 {
        unix_ms(self.now())
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, StateDir> {
        // Every change is one transaction, so a panic leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn signer(&self) -> Arc<Signer> {
        self.signer.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn trust_bundle(&self) -> v1::TrustBundle {
        let signer = self.signer();
        let trust_domain = self.trust_domain.to_string();
        v1::TrustBundle { trust_domain, sequence: signer.bundle.sequence, jwks: signer.bundle.to_jwks() }
    }

    /// Writes to the audit log; on failure to the ordinary log, with an alarm.
    pub(crate) fn record(&self, audit: &Audit, events: &[Event]) -> io::Result<()> {
        let written = audit.append(unix(self.now()), events);
        if let Err(error) = &written {
            self.metrics.audit_failures.inc();
            for event in events {
                let event = serde_json::to_string(event).unwrap_or_default();
                tracing::error!(%error, %event, "the audit log cannot be written");
            }
        }
        written
    }

    /// Writes that a call was refused as a whole, unless strangers have already written enough. The refusal stands
    /// either way, and the metrics count each.
    pub(crate) fn record_refusal(&self, event: Event) {
        let allowed = self.refusals.lock().unwrap_or_else(PoisonError::into_inner).take(unix(self.now()));
        if allowed {
            _ = self.record(&self.state().audit, &[event]);
        }
    }

    fn export_expiry(&self) -> Result<(), PkiError> {
        let signer = self.signer();
        let root = authorities::active(self.state().database.reader(), "root").map_err(StateError::from)?;
        let ends = [
            ("root", root.map_or(SystemTime::UNIX_EPOCH, |row| from_unix(row.not_after))),
            ("intermediate", signer.intermediate.not_after),
            ("endpoint", signer.endpoint_not_after),
        ];
        for (kind, end) in ends {
            self.metrics.not_after.get_or_create(&Certificate { kind }).set(unix(end));
        }
        Ok(())
    }
}
