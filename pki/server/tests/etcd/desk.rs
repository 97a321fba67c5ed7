//! Replicas in this process, with one clock in our hands.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, SystemTime};

use meshd_identity::{JoinToken, SpiffeId, TrustDomain};
use meshd_pki::commands::{CommandError, TokenRequest, create_token};
use meshd_pki::keeping::moving::{init_replica, to_etcd};
use meshd_pki::lifetimes::Lifetimes;
use meshd_pki::pki::PkiError;
use meshd_pki::state_dir::StateError;
use meshd_pki::store::etcd::config::EtcdConfig;
use meshd_pki::times::unix_ms;
use meshd_pki::{Options, Pki, Refused, state_dir};
use meshd_pki_api::v1;
use rcgen::KeyPair;
use tempfile::TempDir;

use crate::cluster::{Cluster, until};

pub(crate) const HOUR: u64 = 3600;
pub(crate) const DAY: u64 = 24 * HOUR;

pub(crate) fn domain() -> TrustDomain {
    "prod.example.org".parse().unwrap()
}

/// An etcd with a PKI in it, and state directories of its servers.
pub(crate) struct Desk {
    pub(crate) cluster: Cluster,
    start: SystemTime,
    passed: Arc<AtomicU64>,
    pub(crate) dir: TempDir,
}

impl Desk {
    /// A PKI that was moved into etcd; its first server is `a`.
    pub(crate) fn new() -> Desk {
        Desk::with(Cluster::start)
    }

    pub(crate) fn with(make: impl FnOnce(&Path) -> Cluster) -> Desk {
        let desk = Desk::in_a_file(make);
        to_etcd(&desk.state("a"), desk.cluster.config(), desk.now()).unwrap();
        desk
    }

    pub(crate) fn in_a_file(make: impl FnOnce(&Path) -> Cluster) -> Desk {
        let dir = tempfile::tempdir().unwrap();
        let cluster = make(dir.path());
        let start = SystemTime::now();
        state_dir::init(&dir.path().join("a"), &domain(), None, start).unwrap();
        Desk { cluster, start, passed: Arc::default(), dir }
    }

    pub(crate) fn state(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A state directory for one more server.
    pub(crate) fn replica(&self, name: &str, config: EtcdConfig) -> anyhow::Result<String> {
        let dir = self.state(name);
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        fs::copy(self.state("a").join("kek"), dir.join("kek")).unwrap();
        init_replica(&dir, &domain(), config)
    }

    pub(crate) fn now(&self) -> SystemTime {
        self.start + Duration::from_secs(self.passed.load(SeqCst))
    }

    /// Time goes on; nobody is told.
    pub(crate) fn pass(&self, seconds: u64) {
        self.passed.fetch_add(seconds, SeqCst);
    }

    pub(crate) fn try_open(&self, name: &str) -> Result<Pki, PkiError> {
        self.try_open_ahead(name, 0)
    }

    /// On a machine whose clock is ahead by so many seconds.
    pub(crate) fn try_open_ahead(&self, name: &str, ahead: u64) -> Result<Pki, PkiError> {
        let (start, passed) = (self.start, self.passed.clone());
        let clock = Arc::new(move || start + Duration::from_secs(passed.load(SeqCst) + ahead));
        let options = Options::with_clock(Lifetimes::default(), clock);
        Pki::open(&self.state(name), Options { advertise: vec![format!("{name}.example.org:15012")], ..options })
    }

    pub(crate) fn open(&self, name: &str) -> Pki {
        // A program that another test starts holds what this process has open until it runs.
        let mut opened = None;
        until("the directory is free", || {
            opened = match self.try_open(name) {
                Err(PkiError::State(StateError::Running { .. })) => None,
                result => Some(result.unwrap()),
            };
            opened.is_some()
        });
        opened.unwrap()
    }

    pub(crate) fn token(&self, state: &str, host: &str) -> JoinToken {
        self.try_token(state, host).unwrap()
    }

    pub(crate) fn try_token(&self, state: &str, host: &str) -> Result<JoinToken, CommandError> {
        let pki = ["10.0.0.1:15012".to_owned()];
        let request = TokenRequest { host, pki: &pki, ..TokenRequest::default() };
        create_token(&self.state(state), &request, self.now())
    }
}

pub(crate) fn enrol(pki: &Pki, token: &JoinToken) -> Result<v1::EnrollReply, Refused> {
    let proof = v1::JoinTokenProof { id: token.id.clone(), secret: token.secret.0.to_vec() };
    let request = v1::EnrollRequest {
        attestation: Some(v1::enroll_request::Attestation::JoinToken(proof)),
        csr: request_over_a_new_key(),
        host_time_unix_ms: unix_ms(pki.now()),
        ..v1::EnrollRequest::default()
    };
    pki.enrol(&request, "test")
}

fn request_over_a_new_key() -> Vec<u8> {
    let key = KeyPair::generate().unwrap();
    rcgen::CertificateParams::default().serialize_request(&key).unwrap().der().to_vec()
}

/// The chain that a host gets for the certificate it has.
pub(crate) fn renew(pki: &Pki, host: &str, chain: &[Vec<u8>]) -> Result<Vec<Vec<u8>>, Refused> {
    renew_with(pki, host, chain, 0).map(|(chain, _)| chain)
}

/// Chain and bundle sequence, for a host that has a bundle of this sequence.
pub(crate) fn renew_with(
    pki: &Pki,
    host: &str,
    chain: &[Vec<u8>],
    sequence: u64,
) -> Result<(Vec<Vec<u8>>, u64), Refused> {
    let spiffe_id = SpiffeId::host(&domain(), host).unwrap().to_string();
    let items = vec![v1::IssueItem { spiffe_id, csr: request_over_a_new_key() }];
    let host_time_unix_ms = unix_ms(pki.now());
    let request = v1::IssueBatchRequest { items, bundle_sequence: sequence, host_time_unix_ms, ..Default::default() };
    let reply = pki.issue_batch(Some(&chain[0]), &request, "test")?;
    let sequence = reply.bundle.unwrap().sequence;
    match reply.results.into_iter().next().unwrap().outcome {
        Some(v1::issue_result::Outcome::Svid(svid)) => Ok((svid.chain, sequence)),
        other => panic!("expected a certificate, got {other:?}"),
    }
}

/// One value of a server's metrics.
pub(crate) fn metric(pki: &Pki, name: &str) -> String {
    let page = pki.metrics.encode();
    let line = page.lines().find_map(|line| line.strip_prefix(&format!("meshd_pki_{name} ")));
    line.unwrap_or_else(|| panic!("no {name} in {page}")).to_owned()
}

/// The value of the series whose name and first labels are these.
pub(crate) fn metric_like(pki: &Pki, start: &str) -> String {
    let page = pki.metrics.encode();
    let line = page.lines().find(|line| line.starts_with(&format!("meshd_pki_{start}")));
    let value = line.and_then(|line| line.split(' ').next_back());
    value.unwrap_or_else(|| panic!("no {start} in {page}")).to_owned()
}
