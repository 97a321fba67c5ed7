//! Intermediates from an offline root: by request, by files that are replaced, good ones and bad ones.

use std::path::Path;
use std::time::{Duration, SystemTime};

use meshd_identity::Bundle;
use meshd_pki::upstream::commands::{UpstreamError, csr, import};
use meshd_pki::upstream::watch::{Upstream, UpstreamFiles};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SignatureAlgorithm,
};

use crate::authority::taint;
use crate::operation::{DAY, Desk, HOUR, chain_of};
use crate::support::domain;

/// An authority whose key is in a drawer.
pub(crate) struct Offline {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) certificate: String,
}

/// What an authority's certificate says.
pub(crate) struct Says {
    pub(crate) constraints: IsCa,
    pub(crate) usage: Vec<KeyUsagePurpose>,
    pub(crate) extended: Vec<ExtendedKeyUsagePurpose>,
    pub(crate) from: SystemTime,
    pub(crate) days: u64,
}

impl Says {
    pub(crate) fn usual(now: SystemTime, days: u64) -> Says {
        Says {
            constraints: IsCa::Ca(BasicConstraints::Constrained(0)),
            usage: vec![KeyUsagePurpose::KeyCertSign],
            extended: vec![],
            from: now - Duration::from_secs(3 * DAY),
            days,
        }
    }

    fn params(self, name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = self.constraints;
        params.key_usages = self.usage;
        params.extended_key_usages = self.extended;
        params.not_before = self.from.into();
        params.not_after = (self.from + Duration::from_secs(self.days * DAY)).into();
        params
    }
}

impl Offline {
    pub(crate) fn new(now: SystemTime, name: &str) -> Offline {
        Offline::with_key(now, name, &rcgen::PKCS_ECDSA_P384_SHA384)
    }

    fn with_key(now: SystemTime, name: &str, kind: &'static SignatureAlgorithm) -> Offline {
        let key = KeyPair::generate_for(kind).unwrap();
        let constraints = IsCa::Ca(BasicConstraints::Unconstrained);
        let params = Says { constraints, ..Says::usual(now, 3650) }.params(name);
        let certificate = params.self_signed(&key).unwrap().pem();
        Offline { issuer: Issuer::new(params, key), certificate }
    }

    /// The same name and key, certified again.
    pub(crate) fn again(mut self, now: SystemTime, name: &str) -> Offline {
        let constraints = IsCa::Ca(BasicConstraints::Unconstrained);
        let params = Says { constraints, ..Says::usual(now, 3650) }.params(name);
        self.certificate = params.self_signed(self.issuer.key()).unwrap().pem();
        self
    }

    /// Intermediate and root.
    pub(crate) fn sign(&self, key: &impl PublicKeyData, says: Says) -> String {
        let mut params = says.params("intermediate of the drawer");
        params.use_authority_key_identifier_extension = true;
        params.signed_by(key, &self.issuer).unwrap().pem() + &self.certificate
    }

    fn answer(&self, request: &str, says: Says) -> String {
        let request = CertificateSigningRequestParams::from_pem(request).unwrap();
        self.sign(&request.public_key, says)
    }
}

pub(crate) fn renew(desk: &Desk, chain: &[Vec<u8>]) -> Vec<Vec<u8>> {
    chain_of(desk.renew("web", Some(&chain[0])).unwrap())
}

pub(crate) fn pem_of(der: &[u8]) -> String {
    let base64: String = data_encoding::BASE64.encode(der);
    let lines: Vec<&str> = base64.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

#[test]
fn the_answer_to_a_request_signs_when_every_verifier_has_its_root() {
    let mut desk = Desk::new();
    let mut chain = desk.enrol("web");
    let ours = chain[1].clone();
    let request = csr(desk.dir(), desk.now()).unwrap();
    assert_eq!(csr(desk.dir(), desk.now()).unwrap().lines().count(), request.lines().count());
    let offline = Offline::new(desk.now(), "root of the drawer");
    let answer = offline.answer(&request, Says::usual(desk.now(), 365));
    let told = import(desk.dir(), answer.as_bytes(), None, desk.now()).unwrap().to_string();
    assert!(told.contains("signs when every verifier has it"), "{told}");
    let again = import(desk.dir(), answer.as_bytes(), None, desk.now()).unwrap_err().to_string();
    assert!(again.contains("meshd-pki csr"), "the key of an answered request is not asked for again: {again}");
    desk.pass(10);
    chain = renew(&desk, &chain);
    assert_eq!(chain[1], ours, "the new root is published, and does not sign yet");
    assert_eq!(Bundle::from_jwks(domain(), &desk.pki().bundle(&[]).unwrap().jwks).unwrap().roots.len(), 2);
    for _ in 0..3 {
        desk.pass(9 * HOUR);
        chain = renew(&desk, &chain);
    }
    assert!(answer.contains(&pem_of(&chain[1])), "after a leaf's life it signs");
    let status = desk.status();
    assert!(status.problems.is_empty(), "{:?}", status.problems);
    assert!(status.rotation.waiting.iter().any(|gate| gate.reason == "import"), "{:?}", status.rotation);

    // The next under the same root needs no distribution.
    let request = csr(desk.dir(), desk.now()).unwrap();
    let next = offline.answer(&request, Says::usual(desk.now(), 365));
    let told = import(desk.dir(), next.as_bytes(), None, desk.now()).unwrap().to_string();
    assert!(told.contains("signs from now on"), "{told}");
    desk.pki().refresh().unwrap();
    chain = renew(&desk, &chain);
    assert!(next.contains(&pem_of(&chain[1])));
    // Months later: our own first root still signs what hosts are told, nobody made another, and nothing is wrong.
    for _ in 0..60 * 3 {
        desk.pass(8 * HOUR);
        chain = renew(&desk, &chain);
    }
    let status = desk.status();
    let roots = status.authorities.iter().filter(|one| one.kind == "root").count();
    assert_eq!(roots, 2, "{:?}", status.authorities);
    assert!(status.rotation.waiting.iter().any(|gate| gate.reason == "speaks"), "{:?}", status.rotation);
    assert!(status.problems.is_empty(), "{:?}", status.problems);
    assert!(next.contains(&pem_of(&chain[1])), "it signs on");
    desk.open();
    chain = renew(&desk, &chain);
    assert!(next.contains(&pem_of(&chain[1])), "also after a restart");
}

#[test]
fn whatever_cannot_be_used_is_refused_with_the_reason_and_what_is_in_force_stays() {
    let desk = Desk::new();
    let chain = desk.enrol("web");
    let now = desk.now();
    let offline = Offline::new(now, "root of the drawer");
    let key = KeyPair::generate().unwrap();
    let stranger = Offline::new(now, "another root");
    let only_root = &offline.certificate;
    let usual = || Says::usual(now, 365);
    let p521 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap();
    let signed = |says: Says| offline.sign(&key, says);
    let mixed = signed(usual()).replace(only_root.as_str(), &stranger.certificate);
    let mut constrained = usual().params("constrained");
    constrained.name_constraints = Some(rcgen::NameConstraints {
        permitted_subtrees: vec![rcgen::GeneralSubtree::DnsName("example.org".to_owned())],
        excluded_subtrees: vec![],
    });
    let constrained = constrained.signed_by(&key, &offline.issuer).unwrap().pem() + only_root;
    let cases: Vec<(&str, String, &KeyPair)> = vec![
        ("CA:TRUE is missing", signed(Says { constraints: IsCa::ExplicitNoCa, ..usual() }), &key),
        ("keyCertSign is missing", signed(Says { usage: vec![KeyUsagePurpose::CrlSign], ..usual() }), &key),
        ("ended at", signed(Says { days: 2, ..usual() }), &key),
        ("not valid before", signed(Says { from: now + Duration::from_secs(DAY), ..usual() }), &key),
        ("moment ago", signed(Says { from: now - Duration::from_secs(60), ..usual() }), &key),
        ("as a client", signed(Says { extended: vec![ExtendedKeyUsagePurpose::ServerAuth], ..usual() }), &key),
        ("have to be left", signed(Says { days: 8, ..usual() }), &key),
        ("name constraints", constrained, &key),
        ("does not verify", mixed, &key),
        ("does not belong", offline.sign(&KeyPair::generate().unwrap(), usual()), &key),
        ("P-256, P-384 nor RSA", offline.sign(&p521, usual()), &p521),
        ("1 certificates were given", only_root.clone(), &key),
        ("0 certificates were given", "rubbish".to_owned(), &key),
        ("not X.509", signed(usual()).replace("MII", "AII"), &key),
    ];
    for (expected, given, key) in cases {
        let pem = key.serialize_pem();
        let refused = import(desk.dir(), given.as_bytes(), Some(pem.as_bytes()), desk.now()).unwrap_err();
        assert!(matches!(refused, UpstreamError::Unusable(_)), "{expected}: {refused}");
        assert!(refused.to_string().contains(expected), "{expected}: {refused}");
    }
    desk.pass(60);
    assert_eq!(renew(&desk, &chain)[1], chain[1]);
    assert_eq!(desk.status().authorities.len(), 2);
}

#[test]
fn a_full_bundle_takes_the_root_that_replaces_one_whose_key_leaked() {
    let desk = Desk::new();
    // It has acknowledged none of them, so that none signs yet.
    desk.enrol("web");
    let bring = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let chain = Offline::new(desk.now(), name).sign(&key, Says::usual(desk.now(), 365));
        import(desk.dir(), chain.as_bytes(), Some(key.serialize_pem().as_bytes()), desk.now())
    };
    for name in ["first", "second", "third"] {
        bring(name).unwrap();
    }
    assert!(matches!(bring("fourth").unwrap_err(), UpstreamError::TooManyRoots));
    desk.done(taint(&desk.root("active").unwrap()));
    bring("fourth").unwrap();
    assert!(matches!(bring("fifth").unwrap_err(), UpstreamError::TooManyRoots));
}

fn openssl(arguments: &[&str]) -> String {
    let output = std::process::Command::new("openssl").args(arguments).output();
    let output = output.expect("the openssl program is installed (Debian package openssl)");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_rsa_root_and_an_rsa_intermediate_can_be_used() {
    let desk = Desk::new();
    let [root_key, key] = [(); 2].map(|()| {
        let pem = openssl(&["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]);
        KeyPair::from_pem(&pem).unwrap()
    });
    let constraints = IsCa::Ca(BasicConstraints::Unconstrained);
    let params = Says { constraints, ..Says::usual(desk.now(), 3650) }.params("RSA root");
    let root = params.self_signed(&root_key).unwrap().pem();
    let issuer = Issuer::new(params, root_key);
    let mut params = Says::usual(desk.now(), 365).params("RSA intermediate");
    params.use_authority_key_identifier_extension = true;
    let given = params.signed_by(&key, &issuer).unwrap().pem() + &root;
    import(desk.dir(), given.as_bytes(), Some(key.serialize_pem().as_bytes()), desk.now()).unwrap();
}

/// The files as an operator's tool replaces them.
pub(crate) struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    pub(crate) fn new() -> Files {
        Files { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn paths(&self) -> UpstreamFiles {
        UpstreamFiles { chain: self.path("chain.pem"), key: self.path("key.pem"), roots: None }
    }

    pub(crate) fn write(&self, name: &str, content: &str) {
        std::fs::write(self.dir.path().join(name), content).unwrap();
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }
}

pub(crate) fn blocked(desk: &Desk) -> bool {
    let told = desk.status().problems.iter().any(|problem| problem.starts_with("rotation blocked (upstream)"));
    let exported = desk.metrics().contains("meshd_pki_rotation_blocked{reason=\"upstream\"} 1");
    assert_eq!(told, exported);
    told
}

#[test]
fn files_that_are_replaced_are_taken_over_when_they_are_good_however_that_is_done() {
    let desk = Desk::new();
    let files = Files::new();
    let mut upstream = Upstream::new(&files.paths());
    upstream.look(desk.pki());
    assert!(blocked(&desk), "files that are not there are told");

    let offline = Offline::new(desk.now(), "root of the drawer");
    let new = || {
        let key = KeyPair::generate().unwrap();
        (offline.sign(&key, Says::usual(desk.now(), 365)), key.serialize_pem())
    };
    let used = |given: &str| {
        let status = desk.status();
        let log = std::fs::read_to_string(desk.dir().join("audit.jsonl")).unwrap();
        let root = status.authorities.iter().find(|one| one.kind == "root" && one.state != "active");
        root.is_some() && log.contains("from outside") && !given.is_empty()
    };
    let (chain, key) = new();
    files.write("chain.pem", &chain);
    files.write("key.pem", &key);
    upstream.look(desk.pki());
    assert!(!blocked(&desk) && used(&chain));
    let lines = || std::fs::read_to_string(desk.dir().join("audit.jsonl")).unwrap().lines().count();

    // Replaced one after the other: between the two nothing fits, and nothing is lost.
    let (chain, key) = new();
    files.write("new", &chain);
    std::fs::rename(files.path("new"), files.path("chain.pem")).unwrap();
    upstream.look(desk.pki());
    assert!(blocked(&desk));
    let before = lines();
    upstream.look(desk.pki());
    assert_eq!(lines(), before, "told once");
    files.write("key.pem", &key);
    upstream.look(desk.pki());
    assert!(!blocked(&desk));

    // As Kubernetes does it: a directory behind a symbolic link.
    let (chain, key) = new();
    std::fs::create_dir(files.path("generation-1")).unwrap();
    files.write("generation-1/chain.pem", &chain);
    files.write("generation-1/key.pem", &key);
    link(&files.path("..data"), "generation-1");
    for name in ["chain.pem", "key.pem"] {
        std::fs::remove_file(files.path(name)).unwrap();
        link(&files.path(name), &format!("..data/{name}"));
    }
    upstream.look(desk.pki());
    assert!(!blocked(&desk));

    // Cut short by a full disk.
    files.write("generation-1/chain.pem", &chain[..chain.len() / 3]);
    upstream.look(desk.pki());
    assert!(blocked(&desk));
    files.write("generation-1/chain.pem", &chain);
    upstream.look(desk.pki());
    assert!(!blocked(&desk), "what is put back is good again");
}

fn link(at: &Path, to: &str) {
    std::os::unix::fs::symlink(to, at).unwrap();
}
