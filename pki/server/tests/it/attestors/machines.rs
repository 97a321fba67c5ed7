use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, SystemTime};

use meshd_identity::signed::sign_bytes;
use meshd_identity::statements::{machine_challenge, machine_message};
use meshd_pki::lifetimes::Lifetimes;
use meshd_pki::{Options, Pki, Refused, state_dir};
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{HostBan, HostEvict, HostUnban};
use meshd_pki_api::v1;
use meshd_pki_api::v1::enroll_request::Attestation;
use meshd_pki_client::{MachineCertificate, Proof, join_by};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_RSA_SHA256, RsaKeySize,
};

use crate::support::{Lab, domain, request_over, workload};

const MACHINES: &str = "[[x509pop]]\nname = \"machines\"\nca_file = \"@DIR@/ca.pem\"\nhost = \"m-{cn}\"\n\
                        allow = [\"ns/shop/sa/payments\"]\nlabels = { role = \"web\" }\n";
const ECDSA_P256: u32 = 0x0403;

/// An authority that is none of ours.
struct Corporate {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Corporate {
    fn new() -> Corporate {
        let key = KeyPair::generate().unwrap();
        let params = authority("corporate root");
        let pem = params.self_signed(&key).unwrap().pem();
        Corporate { issuer: Issuer::new(params, key), pem }
    }

    /// One below it, with its certificate.
    fn intermediate(&self, name: &str) -> (Corporate, Vec<u8>) {
        let (key, params) = (KeyPair::generate().unwrap(), authority(name));
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (Corporate { issuer: Issuer::new(params, key), pem: certificate.pem() }, certificate.der().to_vec())
    }

    fn leaf(&self, cn: &str, key: &KeyPair) -> rcgen::Certificate {
        self.leaf_until(cn, key, SystemTime::now() + Duration::from_secs(86_400))
    }

    fn leaf_until(&self, cn: &str, key: &KeyPair, end: SystemTime) -> rcgen::Certificate {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.distinguished_name.push(DnType::CommonName, cn);
        (params.not_before, params.not_after) = ((end - Duration::from_secs(90 * 86_400)).into(), end.into());
        params.signed_by(key, &self.issuer).unwrap()
    }
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

/// A PKI that is asked without a network, whose clock only the test moves.
struct Desk {
    dir: tempfile::TempDir,
    pki: Pki,
    passed: Arc<AtomicU64>,
}

impl Desk {
    fn new(ca: &str) -> Desk {
        let dir = tempfile::tempdir().unwrap();
        let start = SystemTime::now();
        state_dir::init(&dir.path().join("pki"), &domain(), None, start).unwrap();
        fs::write(dir.path().join("ca.pem"), ca).unwrap();
        let file = dir.path().join("attestors.toml");
        fs::write(&file, MACHINES.replace("@DIR@", &dir.path().display().to_string())).unwrap();
        let passed = Arc::new(AtomicU64::new(0));
        let ticks = passed.clone();
        let clock = Arc::new(move || start + Duration::from_secs(ticks.load(SeqCst)));
        let options = Options { attestors: Some(file), ..Options::with_clock(Lifetimes::default(), clock) };
        let pki = Pki::open(&dir.path().join("pki"), options).unwrap();
        Desk { dir, pki, passed }
    }

    fn half_a_minute_later(&self) {
        self.passed.fetch_add(30, SeqCst);
        self.pki.read_attestors().unwrap();
    }

    /// What this machine would send.
    fn proof(&self, chain: &[Vec<u8>], machine: &KeyPair, csr: &[u8]) -> v1::MachineCertificateProof {
        let host_id = machine_challenge(&chain[0]);
        let nonce = self.pki.challenge(&v1::ChallengeRequest { host_id }).unwrap().nonce;
        let signature = asn1(&sign_bytes(&machine.serialize_der(), &machine_message(&domain(), &nonce, csr)).unwrap());
        v1::MachineCertificateProof { chain: chain.to_vec(), nonce, signature, scheme: ECDSA_P256 }
    }

    fn enrol_with(&self, proof: v1::MachineCertificateProof, csr: Vec<u8>) -> Result<v1::EnrollReply, Refused> {
        let attestation = Some(Attestation::MachineCertificate(proof));
        self.pki.enrol(&v1::EnrollRequest { attestation, csr, ..v1::EnrollRequest::default() }, "10.0.0.9:1")
    }

    fn enrol(&self, chain: &[Vec<u8>], machine: &KeyPair) -> Result<v1::EnrollReply, Refused> {
        let csr = request_over(&KeyPair::generate().unwrap());
        self.enrol_with(self.proof(chain, machine, &csr), csr)
    }

    fn refusal(&self, chain: &[Vec<u8>], machine: &KeyPair) -> String {
        self.enrol(chain, machine).unwrap_err().to_string()
    }

    fn bad(&self) -> bool {
        self.pki.metrics.encode().contains("meshd_pki_attestors_bad 1")
    }
}

/// DER of r and s, as certificates sign.
fn asn1(fixed: &[u8]) -> Vec<u8> {
    let integer = |bytes: &[u8]| {
        let digits: Vec<u8> = bytes.iter().copied().skip_while(|byte| *byte == 0).collect();
        let sign: &[u8] = if digits.first().is_none_or(|first| *first > 0x7f) { &[0] } else { &[] };
        let digits = [sign, &digits].concat();
        [&[2, u8::try_from(digits.len()).unwrap()], &digits[..]].concat()
    };
    let both = [integer(&fixed[..32]), integer(&fixed[32..])].concat();
    [&[0x30, u8::try_from(both.len()).unwrap()], &both[..]].concat()
}

#[tokio::test]
async fn machines_with_a_certificate_of_a_named_authority_join_by_it() {
    let corporate = Corporate::new();
    let (site, site_certificate) = corporate.intermediate("site");
    let lab = Lab::start_with_attestors(&[("ca.pem", &corporate.pem), ("attestors.toml", MACHINES)]).await;
    let rsa = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
    for (cn, key) in [("ec", KeyPair::generate().unwrap()), ("rsa", rsa)] {
        let leaf = site.leaf(cn, &key).pem();
        let write = |name: &str, text: &str| -> PathBuf {
            fs::write(lab.file(name), text).unwrap();
            lab.file(name)
        };
        let chain = write("machine.pem", &format!("{leaf}{}", site.pem));
        let machine = MachineCertificate::read(&chain, &write("machine.key", &key.serialize_pem())).unwrap();
        let held = join_by(&lab.host_dir(cn), &lab.pin(), &Proof::Machine(machine), None).await.unwrap();
        assert_eq!(held.host_id, format!("m-{cn}"));
        let mut host = lab.host(cn);
        host.want(&[&workload("payments")]);
        host.until(|held| held.workloads.contains_key(&workload("payments"))).await;
    }
    assert!(lab.audit_log().contains("\"detail\":\"by x509pop:machines\""));
    assert!(!site_certificate.is_empty());
}

#[test]
fn a_certificate_that_proves_nothing_makes_no_host() {
    let (corporate, stranger) = (Corporate::new(), Corporate::new());
    let desk = Desk::new(&corporate.pem);
    let key = KeyPair::generate().unwrap();
    let of = |authority: &Corporate, cn: &str| vec![authority.leaf(cn, &key).der().to_vec()];
    let good = of(&corporate, "a");
    assert!(desk.refusal(&of(&stranger, "a"), &key).contains("verifies with no [[x509pop]]"));
    assert!(desk.refusal(&good, &KeyPair::generate().unwrap()).contains("does not hold the key"));
    let ended = corporate.leaf_until("a", &key, SystemTime::now() - Duration::from_secs(60));
    assert!(desk.refusal(&[ended.der().to_vec()], &key).contains("expired"));
    assert!(desk.refusal(&of(&corporate, "a/sa/b"), &key).contains("cannot be in a host id"));
    assert!(desk.refusal(&vec![good[0].clone(); 5], &key).contains("1 to 4"));

    let csr = request_over(&KeyPair::generate().unwrap());
    let mut proof = desk.proof(&good, &key, &csr);
    let other = request_over(&KeyPair::generate().unwrap());
    assert!(desk.enrol_with(proof.clone(), other).unwrap_err().to_string().contains("does not hold the key"));
    proof.nonce = desk.proof(&of(&corporate, "b"), &key, &csr).nonce;
    assert!(desk.enrol_with(proof, csr.clone()).unwrap_err().to_string().contains("for another certificate"));
    let proof = desk.proof(&good, &key, &csr);
    desk.passed.fetch_add(61, SeqCst);
    assert!(desk.enrol_with(proof, csr).unwrap_err().to_string().contains("older than a minute"));
    assert_eq!(desk.enrol(&good, &key).unwrap().host_id, "m-a");
}

#[test]
fn a_chain_of_four_is_the_longest() {
    let corporate = Corporate::new();
    let desk = Desk::new(&corporate.pem);
    let key = KeyPair::generate().unwrap();
    let mut above = vec![];
    let mut authority = corporate;
    for name in ["one", "two", "three"] {
        let (next, certificate) = authority.intermediate(name);
        above.insert(0, certificate);
        authority = next;
    }
    let chain = [vec![authority.leaf("a", &key).der().to_vec()], above].concat();
    assert_eq!(desk.enrol(&chain, &key).unwrap().host_id, "m-a");
}

#[test]
fn a_machine_comes_back_with_a_new_key_and_takes_no_host_over_that_came_by_a_token() {
    let corporate = Corporate::new();
    let desk = Desk::new(&corporate.pem);
    let key = KeyPair::generate().unwrap();
    let chain = vec![corporate.leaf("a", &key).der().to_vec()];
    for _ in 0..2 {
        assert_eq!(desk.enrol(&chain, &key).unwrap().host_id, "m-a");
    }
    let request = meshd_pki::commands::TokenRequest {
        host: "m-b",
        pki: &["10.0.0.1:15012".to_owned()],
        ..meshd_pki::commands::TokenRequest::default()
    };
    let token = meshd_pki::commands::create_token(&desk.dir.path().join("pki"), &request, SystemTime::now()).unwrap();
    desk.pki.enrol(&crate::enrolment::enrol_request(&token, &KeyPair::generate().unwrap()), "test").unwrap();
    let error = desk.refusal(&[corporate.leaf("b", &key).der().to_vec()], &key);
    assert!(
        error.contains("enrolled already, by a join token") && error.contains("token create --host m-b"),
        "{error}"
    );
}

#[test]
fn a_banned_machine_stays_out_and_an_evicted_one_joins_again() {
    let corporate = Corporate::new();
    let desk = Desk::new(&corporate.pem);
    let key = KeyPair::generate().unwrap();
    let chain = vec![corporate.leaf("a", &key).der().to_vec()];
    desk.enrol(&chain, &key).unwrap();
    let done = |command| match desk.pki.command(&crate::authority::alice(), command).unwrap() {
        Reply::Done(done) => done,
        other => panic!("unexpected {other:?}"),
    };
    let host = || "m-a".to_owned();
    let evicted = done(Command::HostEvict(HostEvict { host: host(), reason: String::new() }));
    assert!(
        evicted.follows[0].contains("joins by x509pop:") && evicted.follows[0].contains("host ban m-a"),
        "{evicted:?}"
    );
    assert_eq!(desk.enrol(&chain, &key).unwrap().host_id, "m-a");
    done(Command::HostBan(HostBan { host: host(), reason: String::new() }));
    assert!(desk.refusal(&chain, &key).contains("`m-a` is banned"));
    done(Command::HostUnban(HostUnban { host: host() }));
    desk.enrol(&chain, &key).unwrap();
}

#[test]
fn another_authority_is_taken_over_within_half_a_minute_and_a_bad_file_changes_nothing() {
    let (first, second) = (Corporate::new(), Corporate::new());
    let desk = Desk::new(&first.pem);
    let key = KeyPair::generate().unwrap();
    let of = |authority: &Corporate| vec![authority.leaf("a", &key).der().to_vec()];
    let ca = desk.dir.path().join("ca.pem");
    for bad in ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        fs::write(&ca, bad).unwrap();
        desk.half_a_minute_later();
        assert!(desk.bad());
        desk.enrol(&of(&first), &key).unwrap();
    }
    fs::remove_file(&ca).unwrap();
    desk.half_a_minute_later();
    assert!(desk.bad() && desk.enrol(&of(&first), &key).is_ok());

    // As a tool replaces it, and as Kubernetes mounts it: by rename, and behind a link.
    let next = desk.dir.path().join("next.pem");
    fs::write(&next, format!("{}{}", first.pem, second.pem)).unwrap();
    fs::rename(&next, &ca).unwrap();
    desk.half_a_minute_later();
    assert!(!desk.bad());
    desk.enrol(&of(&first), &key).unwrap();
    desk.enrol(&of(&second), &key).unwrap();
    fs::write(&next, &second.pem).unwrap();
    fs::remove_file(&ca).unwrap();
    std::os::unix::fs::symlink(&next, &ca).unwrap();
    desk.half_a_minute_later();
    assert!(desk.refusal(&of(&first), &key).contains("verifies with no"));

    // What is no longer named is gone; a file that cannot be read is no reason to forget.
    let file = desk.dir.path().join("attestors.toml");
    fs::write(&file, "[[x509pop]]\nname = 7\n").unwrap();
    desk.half_a_minute_later();
    assert!(desk.bad() && desk.enrol(&of(&second), &key).is_ok());
    fs::write(&file, "").unwrap();
    desk.half_a_minute_later();
    assert!(desk.refusal(&of(&second), &key).contains("none is configured"));
}
