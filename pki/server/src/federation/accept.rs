//! Judging what a bundle endpoint sent. Pure.

use meshd_identity::{Bundle, BundleError, MAX_BUNDLE_BYTES, TrustDomain};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;

use crate::store::federation::Held;

/// No publisher is asked more often than this.
const SHORTEST_S: u64 = 30;
/// However rarely a publisher wants to be asked: a key that leaks is gone within a day.
const LONGEST_S: u64 = 86_400;
/// What SPIFFE Federation 4.1 names where nothing is said.
const DEFAULT_S: u64 = 300;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unacceptable {
    #[error(transparent)]
    Document(#[from] BundleError),
    #[error(
        "its sequence went back from {held} to {sent}; if its operators made it anew, take it over as they give it to \
         you: `meshd-pki federation add ... --bundle FILE`"
    )]
    Back { held: u64, sent: u64 },
    #[error("one of its authorities is no certificate to verify with: {0}")]
    Unusable(String),
    #[error("it changed under the same sequence {0}; whoever publishes it has to raise that")]
    SameSequence(u64),
}

/// What takes the place of `held`; nothing when it is the same.
pub(crate) fn accept(
    domain: &TrustDomain,
    held: Option<&Held>,
    document: &[u8],
    now: i64,
) -> Result<Option<Held>, Unacceptable> {
    let sent = Bundle::from_jwks(domain.clone(), document)?;
    // As we would write it: what hosts get does not depend on how the publisher formats.
    let jwks = String::from_utf8(sent.to_jwks()).expect("JSON is text");
    if jwks.len() > MAX_BUNDLE_BYTES {
        return Err(BundleError::TooLarge(jwks.len()).into());
    }
    // Handshakes read certificates their own way.
    for root in &sent.roots {
        let added = RootCertStore::empty().add(CertificateDer::from(&root[..]));
        added.map_err(|error| Unacceptable::Unusable(error.to_string()))?;
    }
    if let Some(held) = held {
        if held.jwks == jwks {
            return Ok(None);
        }
        if sent.sequence < held.sequence {
            return Err(Unacceptable::Back { held: held.sequence, sent: sent.sequence });
        }
        // A publisher without sequences says 0 always.
        if sent.sequence == held.sequence && sent.sequence != 0 && !same_keys(domain, held, &sent) {
            return Err(Unacceptable::SameSequence(sent.sequence));
        }
    }
    let refresh_hint_s = sent.refresh_hint_s;
    Ok(Some(Held { sequence: sent.sequence, refresh_hint_s, jwks, changed_at: now }))
}

fn same_keys(domain: &TrustDomain, held: &Held, sent: &Bundle) -> bool {
    let held = Bundle::from_jwks(domain.clone(), held.jwks.as_bytes());
    held.is_ok_and(|held| held.roots == sent.roots && held.jwt_keys == sent.jwt_keys)
}

/// When to ask next, also after a failure (section 4.2: "wait for the next interval"). `chance` is drawn from [0, 1):
/// up to a tenth early, so that followers of one publisher do not come together.
pub(crate) fn next_poll(held: Option<&Held>, now: i64, chance: f64) -> i64 {
    let hint = held.map_or(SHORTEST_S, |held| if held.refresh_hint_s == 0 { DEFAULT_S } else { held.refresh_hint_s });
    let interval = hint.clamp(SHORTEST_S, LONGEST_S) as f64;
    now + (interval * (1.0 - chance / 10.0)) as i64
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CustomExtension, IsCa, KeyPair};

    use super::*;

    fn domain() -> TrustDomain {
        "other.example".parse().unwrap()
    }

    fn root() -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    fn document(sequence: u64, roots: &[&Vec<u8>]) -> Vec<u8> {
        let roots = roots.iter().map(|root| (*root).clone()).collect();
        Bundle::new(domain(), sequence, 300, roots).unwrap().to_jwks()
    }

    fn judge(held: Option<&Held>, document: &[u8]) -> Result<Option<Held>, Unacceptable> {
        accept(&domain(), held, document, 7)
    }

    #[test]
    fn newer_is_taken_the_same_is_nothing_and_older_is_refused() {
        let (one, two) = (root(), root());
        let held = judge(None, &document(5, &[&one])).unwrap().unwrap();
        assert_eq!((held.sequence, held.refresh_hint_s, held.changed_at), (5, 300, 7));
        assert_eq!(judge(Some(&held), &document(5, &[&one])), Ok(None));
        let newer = judge(Some(&held), &document(6, &[&one, &two])).unwrap().unwrap();
        assert_eq!(newer.sequence, 6);
        assert_eq!(judge(Some(&newer), &document(5, &[&one])), Err(Unacceptable::Back { held: 6, sent: 5 }));
        assert_eq!(judge(Some(&held), &document(5, &[&two])), Err(Unacceptable::SameSequence(5)));
    }

    #[test]
    fn a_publisher_without_sequences_is_followed() {
        let (one, two) = (root(), root());
        let held = judge(None, &document(0, &[&one])).unwrap().unwrap();
        assert!(judge(Some(&held), &document(0, &[&two])).unwrap().is_some());
    }

    #[test]
    fn another_hint_under_the_same_sequence_is_no_change_of_keys() {
        let one = root();
        let held = judge(None, &document(5, &[&one])).unwrap().unwrap();
        let other = Bundle::new(domain(), 5, 60, vec![one]).unwrap().to_jwks();
        assert_eq!(judge(Some(&held), &other).unwrap().unwrap().refresh_hint_s, 60);
    }

    #[test]
    fn emptiness_and_nonsense_never_take_the_place_of_a_bundle() {
        for document in [&b"{\"keys\":[],\"spiffe_sequence\":9}"[..], b"<html>", b""] {
            assert!(matches!(judge(None, document), Err(Unacceptable::Document(_))));
        }
    }

    #[test]
    fn an_authority_that_handshakes_cannot_verify_with_takes_no_good_one_s_place() {
        let held = judge(None, &document(5, &[&root()])).unwrap().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // More than webpki reads of one certificate.
        params.custom_extensions.push(CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![0; 66_000]));
        let large = params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec();
        let judged = judge(Some(&held), &document(6, &[&large, &root()]));
        assert!(matches!(judged, Err(Unacceptable::Unusable(_))), "{judged:?}");
    }

    #[test]
    fn the_hint_is_honoured_within_bounds_and_never_late() {
        let with = |refresh_hint_s| Held { sequence: 1, refresh_hint_s, jwks: String::new(), changed_at: 0 };
        assert_eq!(next_poll(Some(&with(600)), 1000, 0.0), 1600);
        assert_eq!(next_poll(Some(&with(600)), 1000, 0.999), 1540);
        assert_eq!(next_poll(Some(&with(1)), 1000, 0.0), 1030);
        assert_eq!(next_poll(Some(&with(0)), 1000, 0.0), 1300);
        assert_eq!(next_poll(Some(&with(u64::MAX)), 0, 0.0), 86_400);
        assert_eq!(next_poll(None, 1000, 0.0), 1030);
    }
}
