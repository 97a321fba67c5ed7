//! From the bundle a host holds to a later one, on signatures alone.

use data_encoding::HEXLOWER;
use meshd_identity::signed::{self, VerifyingKey};
use meshd_identity::statements::BundleStatement;
use meshd_identity::{Bundle, sha256};
use meshd_pki_api::v1;

use crate::reply::{ReplyError, problem};

/// Goes from bundle to bundle; a root of each has signed the next. Where it ends is as good as where it began, whoever
/// handed over the steps.
pub(crate) fn follow(held: &Bundle, steps: Vec<v1::SignedBundle>) -> Result<Bundle, ReplyError> {
    steps.into_iter().try_fold(held.clone(), |held, step| take(&held, step))
}

fn take(held: &Bundle, step: v1::SignedBundle) -> Result<Bundle, ReplyError> {
    let offered = step.bundle.ok_or_else(|| problem("a step carries no bundle"))?;
    let from = held.sequence;
    let keys: Vec<VerifyingKey> = held.roots.iter().filter_map(|root| VerifyingKey::from_certificate(root)).collect();
    let statement = step.signatures.iter().find_map(|jws| signed::verify::<BundleStatement>(jws, &keys).ok());
    let statement = statement.ok_or_else(|| {
        problem(format!(
            "the step to bundle {} is not signed by a root of bundle {from}, which this host holds; the server is not \
             this host's PKI, or roots were replaced without the old ones: then a statement signed with the recovery \
             key is needed",
            offered.sequence
        ))
    })?;
    if statement.sequence <= from {
        return Err(problem(format!("a step leads from bundle {from} back to {}", statement.sequence)));
    }
    named(held, &statement, &offered)
}

/// The bundle document a statement names.
pub(crate) fn named(
    held: &Bundle,
    statement: &BundleStatement,
    offered: &v1::TrustBundle,
) -> Result<Bundle, ReplyError> {
    let sequence = statement.sequence;
    if statement.trust_domain != held.trust_domain {
        let (theirs, ours) = (&statement.trust_domain, &held.trust_domain);
        return Err(problem(format!("bundle {sequence} is of `{theirs}`, this host belongs to `{ours}`")));
    }
    if HEXLOWER.encode(&sha256(&offered.jwks)) != statement.sha256 {
        return Err(problem(format!("bundle {sequence} is not the one that was signed (SHA-256 differs)")));
    }
    let bundle = Bundle::from_jwks(held.trust_domain.clone(), &offered.jwks);
    let bundle = bundle.map_err(|error| problem(error.to_string()))?;
    match bundle.sequence == sequence {
        true => Ok(bundle),
        false => Err(problem(format!("bundle {} was signed as bundle {sequence}", bundle.sequence))),
    }
}

#[cfg(test)]
mod tests {
    use meshd_identity::TrustDomain;
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};

    use super::*;

    fn domain() -> TrustDomain {
        "prod.example.org".parse().unwrap()
    }

    struct Root {
        key: KeyPair,
        certificate: Vec<u8>,
    }

    fn root(name: &str) -> Root {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        Root { certificate: params.self_signed(&key).unwrap().der().to_vec(), key }
    }

    fn bundle(sequence: u64, roots: &[&Root]) -> Bundle {
        let roots = roots.iter().map(|root| root.certificate.clone()).collect();
        Bundle::new(domain(), sequence, 300, roots).unwrap()
    }

    fn step(bundle: &Bundle, signers: &[&Root]) -> v1::SignedBundle {
        let statement = BundleStatement::about(bundle);
        let sign = |root: &&Root| signed::sign(&root.key.serialize_der(), &statement).unwrap();
        v1::SignedBundle { bundle: Some(wire(bundle)), signatures: signers.iter().map(sign).collect() }
    }

    fn wire(bundle: &Bundle) -> v1::TrustBundle {
        let trust_domain = bundle.trust_domain.to_string();
        v1::TrustBundle { trust_domain, sequence: bundle.sequence, jwks: bundle.to_jwks() }
    }

    #[test]
    fn a_chain_of_signed_steps_leads_to_a_bundle_without_any_known_root() {
        let (a, b, c) = (root("a"), root("b"), root("c"));
        let (one, two, three) = (bundle(1, &[&a]), bundle(2, &[&b]), bundle(3, &[&c]));
        let steps = vec![step(&two, &[&a, &b]), step(&three, &[&b, &c])];
        assert_eq!(follow(&one, steps).unwrap(), three);
        assert_eq!(follow(&one, vec![]).unwrap(), one);
    }

    #[test]
    fn a_step_signed_by_a_stranger_is_refused_with_the_remedy() {
        let (a, b) = (root("a"), root("b"));
        let (one, two) = (bundle(1, &[&a]), bundle(2, &[&b]));
        let error = follow(&one, vec![step(&two, &[&b])]).unwrap_err().to_string();
        assert!(error.contains("bundle 2 is not signed by a root of bundle 1") && error.contains("recovery key"));
        assert!(follow(&one, vec![v1::SignedBundle { bundle: Some(wire(&two)), signatures: vec![] }]).is_err());
    }

    #[test]
    fn another_document_than_the_signed_one_is_refused() {
        let (a, b) = (root("a"), root("b"));
        let (one, two) = (bundle(1, &[&a]), bundle(2, &[&a]));
        let mut swapped = step(&two, &[&a]);
        swapped.bundle = Some(wire(&bundle(2, &[&b])));
        assert!(follow(&one, vec![swapped]).unwrap_err().to_string().contains("SHA-256 differs"));
    }

    #[test]
    fn no_step_leads_back_or_elsewhere() {
        let a = root("a");
        let held = bundle(5, &[&a]);
        for sequence in [4, 5] {
            let error = follow(&held, vec![step(&bundle(sequence, &[&a]), &[&a])]).unwrap_err().to_string();
            assert!(error.contains("back to"), "{error}");
        }
        let mut foreign = bundle(6, &[&a]);
        foreign.trust_domain = "other".parse().unwrap();
        assert!(follow(&held, vec![step(&foreign, &[&a])]).unwrap_err().to_string().contains("`other`"));
    }
}
