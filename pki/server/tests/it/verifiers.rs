//! Bundles at their worst, and what verifiers of different makers say to them: always the same.

use std::time::{Duration, SystemTime};

use meshd_identity::Bundle;
use meshd_pki_client::fake::FakeCa;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SignatureAlgorithm,
};

use crate::profile::verifies_at;
use crate::rotations::verifies;
use crate::support::{domain, workload};

const DAY: Duration = Duration::from_secs(86_400);

/// An authority of another make, and a leaf under it.
struct Other {
    root: Vec<u8>,
    chain: Vec<Vec<u8>>,
}

fn other(algorithm: &'static SignatureAlgorithm, ends: SystemTime) -> Other {
    let (root_key, key, now) =
        (KeyPair::generate_for(algorithm).unwrap(), KeyPair::generate().unwrap(), SystemTime::now());
    let root_params = authority("other root", BasicConstraints::Unconstrained, ends);
    let root = root_params.self_signed(&root_key).unwrap();
    let params = authority("other ca", BasicConstraints::Constrained(0), ends);
    let intermediate = params.signed_by(&key, &Issuer::new(root_params, root_key)).unwrap();
    let mut leaf = CertificateParams::default();
    leaf.distinguished_name = DistinguishedName::new();
    leaf.subject_alt_names = vec![SanType::URI(workload("payments").as_str().try_into().unwrap())];
    leaf.is_ca = IsCa::ExplicitNoCa;
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    leaf.use_authority_key_identifier_extension = true;
    (leaf.not_before, leaf.not_after) = ((now - DAY).into(), (now + DAY).into());
    let leaf = leaf.signed_by(&KeyPair::generate().unwrap(), &Issuer::new(params, key)).unwrap();
    Other { root: root.der().to_vec(), chain: vec![leaf.der().to_vec(), intermediate.der().to_vec()] }
}

fn authority(name: &str, constraints: BasicConstraints, ends: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{}", domain()).try_into().unwrap())];
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.use_authority_key_identifier_extension = true;
    (params.not_before, params.not_after) = ((ends - 400 * DAY).into(), ends.into());
    params
}

#[tokio::test]
async fn rustls_and_openssl_agree_on_many_roots_ended_ones_and_other_curves() {
    let now = SystemTime::now();
    let p256 = other(&rcgen::PKCS_ECDSA_P256_SHA256, now + 100 * DAY);
    let p384 = other(&rcgen::PKCS_ECDSA_P384_SHA384, now + 100 * DAY);
    let unknown = other(&rcgen::PKCS_ECDSA_P256_SHA256, now + 100 * DAY);
    let ended = other(&rcgen::PKCS_ECDSA_P256_SHA256, now - DAY);
    let mut roots: Vec<Vec<u8>> = (0..117).map(|_| FakeCa::new(domain()).bundle().roots.remove(0)).collect();
    roots.extend([p256.root.clone(), ended.root.clone(), p384.root.clone()]);
    // As a host gets it: through the document.
    let sent = Bundle::new(domain(), 1, 300, roots).unwrap();
    let bundle = Bundle::from_jwks(domain(), &sent.to_jwks()).unwrap();
    assert_eq!(bundle.roots.len(), 120);
    let scratch = tempfile::tempdir().unwrap();
    for (case, chain, is_good) in [
        ("one of 120 roots", &p256.chain, true),
        ("a P-384 root beside an ended one", &p384.chain, true),
        ("a root that is not in the bundle", &unknown.chain, false),
        ("a root that has ended, its intermediate with it", &ended.chain, false),
    ] {
        let openssl = verifies_at(scratch.path(), &bundle.roots, chain, "sslclient", now).await;
        assert_eq!(verifies(chain, &bundle.roots, now).is_ok(), is_good, "rustls: {case}");
        assert_eq!(openssl.is_ok(), is_good, "openssl: {case}: {openssl:?}");
    }
}
