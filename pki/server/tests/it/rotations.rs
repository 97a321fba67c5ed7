//! Rotations of roots, one after the other, and a fleet that must never notice: every host believes every other's
//! certificate at every moment. `MESHD_SOAK` set: 500 of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, SystemTime};

use meshd_identity::{Bundle, SpiffeId, inspect_svid};
use meshd_pki::commands::{TokenRequest, create_token};
use meshd_pki::lifetimes::Lifetimes;
use meshd_pki::status::Status;
use meshd_pki::times::unix_ms;
use meshd_pki::{Options, Pki, state_dir};
use meshd_pki_api::v1;
use rcgen::KeyPair;
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use tempfile::TempDir;
use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::OID_X509_SERIALNUMBER;
use x509_parser::prelude::FromDer;

use crate::profile::verifies_at;
use crate::support::{domain, request_over};

const LEAF: Duration = Duration::from_secs(40);
const STEP: Duration = Duration::from_secs(4);
/// Every bundle stays, signed, for hosts that slept through it: 4.3 KiB each. Nothing else may grow.
const BYTES_A_ROTATION: u64 = 64 * 1024;
const RESIDENT_GROWTH: u64 = 16 << 20;

fn wanted() -> usize {
    if std::env::var_os("MESHD_SOAK").is_some() { 500 } else { 20 }
}

struct Member {
    name: String,
    chain: Vec<Vec<u8>>,
    bundle: Bundle,
    renew_at: SystemTime,
    not_after: SystemTime,
}

struct Fleet {
    dir: TempDir,
    pki: Option<Pki>,
    start: SystemTime,
    passed: Arc<AtomicU64>,
    members: Vec<Member>,
    /// Who cannot reach the PKI, and until when.
    cut_off: BTreeMap<String, SystemTime>,
}

impl Fleet {
    fn new() -> Fleet {
        let (dir, start) = (tempfile::tempdir().unwrap(), SystemTime::now());
        state_dir::init(dir.path(), &domain(), None, start).unwrap();
        let mut fleet =
            Fleet { dir, pki: None, start, passed: Arc::default(), members: Vec::new(), cut_off: BTreeMap::new() };
        fleet.open();
        fleet
    }

    /// Starts the PKI, or starts it again.
    fn open(&mut self) {
        self.pki = None;
        let (start, passed) = (self.start, self.passed.clone());
        let clock = Arc::new(move || start + Duration::from_millis(passed.load(SeqCst)));
        let options = Options::with_clock(Lifetimes::rehearsal(LEAF), clock);
        self.pki = Some(Pki::open(self.dir.path(), options).unwrap());
    }

    fn pki(&self) -> &Pki {
        self.pki.as_ref().unwrap()
    }

    fn now(&self) -> SystemTime {
        self.start + Duration::from_millis(self.passed.load(SeqCst))
    }

    fn join(&mut self, name: &str) {
        let ttl = Duration::from_secs(60);
        let request = TokenRequest {
            host: name,
            allow: &[],
            pki: &["10.0.0.1:15012".to_owned()],
            ttl,
            ..TokenRequest::default()
        };
        let token = create_token(self.dir.path(), &request, self.now()).unwrap();
        let proof = v1::JoinTokenProof { id: token.id.clone(), secret: token.secret.0.to_vec() };
        let request = v1::EnrollRequest {
            attestation: Some(v1::enroll_request::Attestation::JoinToken(proof)),
            csr: request_over(&KeyPair::generate().unwrap()),
            host_time_unix_ms: unix_ms(self.now()),
            ..v1::EnrollRequest::default()
        };
        let reply = self.pki().enrol(&request, "test").unwrap();
        let member = self.member(name, reply.svid.unwrap(), &reply.bundle.unwrap());
        self.members.push(member);
    }

    fn member(&self, name: &str, svid: v1::Svid, bundle: &v1::TrustBundle) -> Member {
        let not_after = inspect_svid(&svid.chain[0]).unwrap().not_after;
        // Where a host draws it, spread by name.
        let share = 0.30 + 0.15 * f64::from(name.bytes().fold(0_u8, u8::wrapping_add)) / 255.0;
        let life = not_after.duration_since(self.now()).unwrap();
        let bundle = Bundle::from_jwks(domain(), &bundle.jwks).unwrap();
        Member {
            name: name.to_owned(),
            chain: svid.chain,
            bundle,
            renew_at: self.now() + life.mul_f64(share),
            not_after,
        }
    }

    fn renew(&mut self, index: usize) {
        let held = &self.members[index];
        let spiffe_id = SpiffeId::host(&domain(), &held.name).unwrap().to_string();
        let csr = request_over(&KeyPair::generate().unwrap());
        let inventory = v1::Inventory { roots: vec![issuer_id(&held.chain[1])] };
        let request = v1::IssueBatchRequest {
            items: vec![v1::IssueItem { spiffe_id, csr }],
            host_time_unix_ms: unix_ms(self.now()),
            bundle_sequence: held.bundle.sequence,
            inventory: Some(inventory),
            ..v1::IssueBatchRequest::default()
        };
        let reply = self.pki().issue_batch(Some(&held.chain[0]), &request, "test").unwrap();
        let Some(v1::issue_result::Outcome::Svid(svid)) = reply.results.into_iter().next().unwrap().outcome else {
            panic!("{} is refused a certificate", held.name)
        };
        let renewed = self.member(&held.name, svid, &reply.bundle.unwrap());
        assert!(renewed.bundle.sequence >= held.bundle.sequence, "a bundle went back");
        assert!(renewed.bundle.roots.len() <= 4, "{} roots", renewed.bundle.roots.len());
        self.members[index] = renewed;
    }

    /// A while passes: the PKI does what is due, and so does every host that reaches it.
    fn live(&mut self) {
        self.passed.fetch_add(u64::try_from(STEP.as_millis()).unwrap(), SeqCst);
        self.pki().maintain().unwrap();
        let now = self.now();
        self.cut_off.retain(|_, until| *until > now);
        for index in 0..self.members.len() {
            let member = &self.members[index];
            if member.renew_at <= now && !self.cut_off.contains_key(&member.name) {
                self.renew(index);
            }
        }
        self.check();
    }

    /// Nobody refuses anybody.
    fn check(&self) {
        let now = self.now();
        for verifier in &self.members {
            for peer in &self.members {
                assert!(peer.not_after > now, "the certificate of {} has ended", peer.name);
                let verified = verifies(&peer.chain, &verifier.bundle.roots, now);
                assert!(verified.is_ok(), "{} refuses {}: {verified:?}", verifier.name, peer.name);
            }
        }
        for peer in self.members.iter().filter(|peer| peer.chain.len() > 2) {
            self.check_bridge(peer);
        }
    }

    /// A verifier of another make that knows but the root before believes it, too, for as long as it lives.
    fn check_bridge(&self, peer: &Member) {
        let [_, intermediate, bridge] = &peer.chain[..] else { panic!("{} certificates", peer.chain.len()) };
        let by = issuer_id(bridge);
        assert_ne!(by, issuer_id(intermediate));
        let before = peer.bundle.roots.iter().find(|root| issuer_id(root) == by);
        let believed = verifies(&peer.chain, &[before.expect("it is in the bundle still")], peer.not_after);
        assert!(believed.is_ok(), "{} by the root before: {believed:?}", peer.name);
    }

    fn active_root(&self) -> String {
        let status = Status::read(self.dir.path(), self.now()).unwrap();
        let mut active = status.authorities.into_iter().filter(|one| one.kind == "root" && one.state == "active");
        let root = active.next().expect("an active root");
        assert!(active.next().is_none(), "two active roots");
        root.id
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn database_bytes(&self) -> u64 {
        fs::metadata(self.file("pki.db")).unwrap().len() + fs::metadata(self.file("pki.db-wal")).unwrap().len()
    }
}

/// As a server of the mesh verifies its clients.
pub(crate) fn verifies(chain: &[Vec<u8>], roots: &[impl AsRef<[u8]>], now: SystemTime) -> Result<(), rustls::Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(CertificateDer::from(root.as_ref()))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider).build().unwrap();
    let certificates: Vec<CertificateDer<'_>> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let now = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap());
    verifier.verify_client_cert(&certificates[0], &certificates[1..], now).map(drop)
}

/// What a host tells of the root above it.
fn issuer_id(certificate: &[u8]) -> String {
    let (_, parsed) = X509Certificate::from_der(certificate).unwrap();
    let serial_number = parsed.issuer().iter_by_oid(&OID_X509_SERIALNUMBER).next().unwrap();
    serial_number.as_str().unwrap().to_owned()
}

fn resident_bytes() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[tokio::test]
async fn root_after_root_is_replaced_and_no_host_ever_refuses_another() {
    let mut fleet = Fleet::new();
    for name in ["web", "api", "cache"] {
        fleet.join(name);
    }
    let (mut rotations, mut active, mut steps, mut bridged) = (0, fleet.active_root(), 0, 0);
    let mut at_a_fifth = (0, 0);
    while rotations < wanted() {
        fleet.live();
        steps += 1;
        bridged += usize::from(fleet.members[0].chain.len() > 2);
        assert!(steps < 100 * wanted(), "stuck at {rotations} rotations");
        match steps % 37 {
            // Restarts fall everywhere within rotations, and so do partitions that end within the budget.
            0 => fleet.open(),
            11 => _ = fleet.cut_off.insert("cache".to_owned(), fleet.now() + LEAF / 2),
            _ => {}
        }
        let signs = issuer_id(&fleet.members[0].chain[1]);
        if signs != active {
            assert_eq!(signs, fleet.active_root());
            rotations += 1;
            active = signs;
            if rotations == 3 {
                fleet.join("late");
            }
            let (verifier, peer) = (&fleet.members[0], &fleet.members[1]);
            let scratch = tempfile::tempdir().unwrap();
            let (roots, now) = (&verifier.bundle.roots, fleet.now());
            verifies_at(scratch.path(), roots, &peer.chain, "sslclient", now).await.unwrap();
        }
        if rotations == wanted() / 5 && at_a_fifth.0 == 0 {
            at_a_fifth = (fleet.database_bytes(), resident_bytes());
        }
    }
    let grown = fleet.database_bytes().saturating_sub(at_a_fifth.0) / (4 * wanted() as u64 / 5);
    let resident = resident_bytes();
    println!(
        "figure: {rotations} rotations in {steps} steps; database {} KiB, {grown} bytes a rotation; resident {} MiB \
         after a fifth, {} MiB at the end; {} roots in the bundle",
        fleet.database_bytes() / 1024,
        at_a_fifth.1 >> 20,
        resident >> 20,
        fleet.members[0].bundle.roots.len(),
    );
    assert!(bridged >= rotations, "{bridged} of {steps} steps with a bridge");
    assert!(grown <= BYTES_A_ROTATION, "the database grows by {grown} bytes a rotation");
    assert!(resident <= at_a_fifth.1 + RESIDENT_GROWTH, "resident: {} and {resident} bytes", at_a_fifth.1);
    let status = Status::read(fleet.dir.path(), fleet.now()).unwrap();
    assert!(status.audit_lines.is_some(), "the audit chain is broken");
}
