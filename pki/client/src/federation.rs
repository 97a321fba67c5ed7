//! Other trust domains this host has to do with, as its PKI tells it. Each is verified under its own bundle; bundles are
//! never merged.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use meshd_identity::{Bundle, SpiffeId, TrustDomain};
use meshd_pki_api::v1;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::state::{from_unix_ms, unix_ms};

/// What the PKI told last, with the last good bundle where it told a bad one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Federation {
    /// The PKI's name for this content; 0 for none.
    pub revision: u64,
    pub domains: BTreeMap<TrustDomain, Federated>,
    /// What was told and not taken over, by the name it came under, with the reason.
    pub refused: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Federated {
    pub bundle: Bundle,
    /// The host's own identities that may have dealings with that domain.
    pub identities: BTreeSet<SpiffeId>,
    /// When this bundle came here.
    pub since: SystemTime,
}

/// How following one publisher goes, by the PKI's clock, in seconds since 1970. 0: never.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freshness {
    pub last_good_unix: i64,
    pub next_unix: i64,
}

#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Document {
    revision: u64,
    domains: Vec<DomainDocument>,
    #[serde(default)]
    refused: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
struct DomainDocument {
    trust_domain: TrustDomain,
    bundle: String,
    identities: BTreeSet<SpiffeId>,
    since_unix_ms: u64,
}

impl Federation {
    /// The foreign bundles that `own` has to do with.
    pub fn of<'a>(&'a self, own: &'a SpiffeId) -> impl Iterator<Item = &'a Bundle> {
        self.domains.values().filter(|one| one.identities.contains(own)).map(|one| &one.bundle)
    }

    /// What takes the place of this. Whether a bundle is older than another was for the PKI to judge, which follows the
    /// publisher.
    pub(crate) fn replaced_by(&self, told: v1::Federation, own: &TrustDomain, now: SystemTime) -> Federation {
        let mut next = Federation { revision: told.revision, ..Federation::default() };
        for one in told.bundles {
            let named = one.bundle.as_ref().map(|bundle| bundle.trust_domain.clone()).unwrap_or_default();
            if let Err(reason) = next.add(one, self, own, now) {
                let named = printable(&named);
                tracing::error!(domain = named, reason, "a federated bundle is refused; the last good one stays");
                next.refused.insert(named, reason);
            }
        }
        for domain in self.domains.keys().filter(|domain| !next.domains.contains_key(*domain)) {
            tracing::warn!(%domain, "a trust domain is not federated any more; its identities are not believed");
        }
        next
    }

    /// A bundle that is refused leaves the one held in place.
    fn add(
        &mut self,
        told: v1::FederatedBundle,
        held: &Federation,
        own: &TrustDomain,
        now: SystemTime,
    ) -> Result<(), String> {
        let bundle = told.bundle.ok_or("it carries no bundle")?;
        let domain: TrustDomain = bundle.trust_domain.parse().map_err(|error| format!("{error}"))?;
        if domain == *own {
            return Err("it claims to be of this host's own trust domain, whose bundle comes another way".to_owned());
        }
        if self.domains.contains_key(&domain) {
            return Err("there are two bundles of one trust domain".to_owned());
        }
        // Of other trust domains, or of no shape we know, they are none of this host's.
        let identities = told.spiffe_ids.iter().filter_map(|id| id.parse().ok());
        let identities = identities.filter(|id: &SpiffeId| id.trust_domain() == own).collect();
        let held = held.domains.get(&domain);
        let read = read(&domain, &bundle.jwks);
        let (bundle, since, problem) = match (read, held) {
            (Ok(read), Some(held)) if read == held.bundle => (read, held.since, None),
            (Ok(read), _) => (read, now, None),
            (Err(reason), Some(held)) => (held.bundle.clone(), held.since, Some(reason)),
            (Err(reason), None) => return Err(reason),
        };
        self.domains.insert(domain, Federated { bundle, identities, since });
        problem.map_or(Ok(()), Err)
    }

    pub(crate) fn to_document(&self) -> Document {
        let domain = |(trust_domain, one): (&TrustDomain, &Federated)| DomainDocument {
            trust_domain: trust_domain.clone(),
            bundle: String::from_utf8(one.bundle.to_jwks()).expect("JSON is text"),
            identities: one.identities.clone(),
            since_unix_ms: unix_ms(one.since),
        };
        let domains = self.domains.iter().map(domain).collect();
        Document { revision: self.revision, domains, refused: self.refused.clone() }
    }

    /// What this version cannot make sense of, or an earlier one could not, is asked for again: never may somebody else's
    /// bundle be in the way of this host's own identity.
    pub(crate) fn from_document(document: Document) -> Federation {
        let mut held = Federation { refused: document.refused, ..Federation::default() };
        let mut is_whole = held.refused.is_empty();
        for one in document.domains {
            match Bundle::from_jwks(one.trust_domain.clone(), one.bundle.as_bytes()) {
                Ok(bundle) => {
                    let since = from_unix_ms(one.since_unix_ms);
                    held.domains.insert(one.trust_domain, Federated { bundle, identities: one.identities, since });
                }
                Err(error) => {
                    let domain = one.trust_domain;
                    tracing::warn!(%domain, %error, "a federated bundle on disk is unreadable; asking for it again");
                    is_whole = false;
                }
            }
        }
        held.revision = if is_whole { document.revision } else { 0 };
        held
    }
}

/// A bundle document does not name its trust domain, but its authorities may.
fn read(domain: &TrustDomain, jwks: &[u8]) -> Result<Bundle, String> {
    let bundle = Bundle::from_jwks(domain.clone(), jwks).map_err(|error| error.to_string())?;
    for root in &bundle.roots {
        // What handshakes verify with reads certificates its own way.
        RootCertStore::empty()
            .add(CertificateDer::from(&root[..]))
            .map_err(|error| format!("one of its authorities is no certificate to verify with: {error}"))?;
        if let Some(other) = domains_of(root).into_iter().find(|named| named != domain.as_str()) {
            let other = printable(&other);
            return Err(format!("one of its authorities is of trust domain `{other}`; a bundle is of one domain only"));
        }
    }
    Ok(bundle)
}

/// X.509-SVID section 3: an authority may name its trust domain in a URI.
fn domains_of(root: &[u8]) -> Vec<String> {
    let Ok((_, parsed)) = X509Certificate::from_der(root) else { return Vec::new() };
    let Ok(Some(names)) = parsed.subject_alternative_name() else { return Vec::new() };
    let uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix("spiffe://"),
        _ => None,
    });
    uris.map(|rest| rest.split('/').next().unwrap_or(rest).to_owned()).collect()
}

/// Text from the PKI, made safe for a log line.
fn printable(text: &str) -> String {
    text.chars().take(300).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fake::FakeCa;

    fn own() -> TrustDomain {
        "prod.example.org".parse().unwrap()
    }

    fn other() -> TrustDomain {
        "other.example".parse().unwrap()
    }

    fn payments() -> SpiffeId {
        SpiffeId::workload(&own(), "shop", "payments").unwrap()
    }

    fn told_as(domain: &str, jwks: Vec<u8>) -> v1::FederatedBundle {
        let bundle = v1::TrustBundle { trust_domain: domain.to_owned(), sequence: 1, jwks };
        let strangers = ["spiffe://other.example/ns/shop/sa/payments".to_owned(), "nonsense".to_owned()];
        let spiffe_ids = strangers.into_iter().chain([payments().to_string()]).collect();
        v1::FederatedBundle { bundle: Some(bundle), spiffe_ids }
    }

    fn told(revision: u64, bundles: Vec<v1::FederatedBundle>) -> v1::Federation {
        v1::Federation { revision, bundles }
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn holding(ca: &FakeCa) -> Federation {
        let first = told(7, vec![told_as("other.example", ca.bundle().to_jwks())]);
        Federation::default().replaced_by(first, &own(), at(1))
    }

    #[test]
    fn a_bundle_is_taken_over_for_identities_of_this_host_only() {
        let ca = FakeCa::new(other());
        let held = holding(&ca);
        let one = &held.domains[&other()];
        assert_eq!((held.revision, &one.bundle, one.since), (7, &ca.bundle(), at(1)));
        assert_eq!(one.identities, BTreeSet::from([payments()]));
        assert_eq!(held.of(&payments()).count(), 1);
        let stranger = SpiffeId::workload(&own(), "shop", "other").unwrap();
        assert_eq!(held.of(&stranger).count(), 0);
    }

    #[test]
    fn what_is_told_again_keeps_its_age_and_what_is_not_told_is_gone() {
        let ca = FakeCa::new(other());
        let held = holding(&ca);
        let same = held.replaced_by(told(8, vec![told_as("other.example", ca.bundle().to_jwks())]), &own(), at(9));
        assert_eq!((same.revision, same.domains[&other()].since), (8, at(1)));
        let newer = FakeCa::new(other()).bundle();
        let changed = same.replaced_by(told(9, vec![told_as("other.example", newer.to_jwks())]), &own(), at(9));
        assert_eq!((&changed.domains[&other()].bundle, changed.domains[&other()].since), (&newer, at(9)));
        assert_eq!(changed.replaced_by(told(0, vec![]), &own(), at(10)), Federation::default());
    }

    #[test]
    fn a_bad_bundle_is_refused_and_the_last_good_one_stays() {
        let (ca, third) = (FakeCa::new(other()), FakeCa::new("third.example".parse::<TrustDomain>().unwrap()));
        let held = holding(&ca);
        for (jwks, reason) in [
            (b"{\"keys\":[]}".to_vec(), "no root"),
            (b"<html>".to_vec(), "not a JWKS document"),
            (third.bundle().to_jwks(), "is of trust domain `third.example`"),
            (FakeCa::new(own()).bundle().to_jwks(), "is of trust domain `prod.example.org`"),
        ] {
            let next = held.replaced_by(told(8, vec![told_as("other.example", jwks)]), &own(), at(9));
            assert_eq!(next.domains, held.domains, "{reason}");
            assert!(next.refused["other.example"].contains(reason), "{:?}", next.refused);
            // It is not asked for again until the PKI has another.
            assert_eq!(next.revision, 8);
        }
        let good = held.replaced_by(told(9, vec![told_as("other.example", ca.bundle().to_jwks())]), &own(), at(9));
        assert!(good.refused.is_empty());
    }

    #[test]
    fn our_own_trust_domain_nonsense_and_a_second_bundle_are_refused() {
        let (ours, ca) = (FakeCa::new(own()).bundle().to_jwks(), FakeCa::new(other()));
        let bundles = vec![
            told_as("prod.example.org", ours),
            told_as("No Domain\n", ca.bundle().to_jwks()),
            told_as("other.example", ca.bundle().to_jwks()),
            told_as("other.example", FakeCa::new(other()).bundle().to_jwks()),
            v1::FederatedBundle::default(),
        ];
        let next = Federation::default().replaced_by(told(1, bundles), &own(), at(1));
        assert_eq!(next.domains.keys().collect::<Vec<_>>(), [&other()]);
        assert_eq!(next.domains[&other()].bundle, ca.bundle());
        assert!(next.refused["prod.example.org"].contains("own trust domain"));
        assert!(next.refused["other.example"].contains("two bundles"));
        assert_eq!(next.refused.len(), 4, "{:?}", next.refused);
    }

    #[test]
    fn it_survives_the_disk_form() {
        let mut held = holding(&FakeCa::new(other()));
        assert_eq!(stored(&held), held);
        held.refused.insert("third".to_owned(), "why".to_owned());
        // A newer version may read what this one could not.
        assert_eq!(stored(&held), Federation { revision: 0, ..held });
    }

    fn stored(held: &Federation) -> Federation {
        let json = serde_json::to_string(&held.to_document()).unwrap();
        Federation::from_document(serde_json::from_str(&json).unwrap())
    }

    #[test]
    fn a_bundle_on_disk_that_is_unreadable_is_asked_for_again_and_the_others_stay() {
        let third: TrustDomain = "third.example".parse().unwrap();
        let mut held = holding(&FakeCa::new(other()));
        let more = Federated { bundle: FakeCa::new(&third).bundle(), identities: BTreeSet::new(), since: at(1) };
        held.domains.insert(third, more);
        let mut document = held.to_document();
        document.domains[0].bundle = "{}".to_owned();
        let read = Federation::from_document(document);
        assert_eq!((read.revision, read.domains.keys().map(TrustDomain::as_str).collect()), (0, vec!["third.example"]));
    }

    #[test]
    fn an_authority_that_handshakes_cannot_verify_with_is_refused_before_it_replaces_a_good_one() {
        let held = holding(&FakeCa::new(other()));
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        // More than webpki reads of one certificate.
        let filler = rcgen::CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![0; 66_000]);
        params.custom_extensions.push(filler);
        let root = params.self_signed(&key).unwrap();
        let bundle = Bundle::new(other(), 2, 300, vec![root.der().to_vec()]).unwrap();
        let next = held.replaced_by(told(8, vec![told_as("other.example", bundle.to_jwks())]), &own(), at(9));
        assert_eq!(next.domains, held.domains);
        assert!(next.refused["other.example"].contains("to verify with"), "{:?}", next.refused);
    }
}
