//! What hosts are told of other trust domains: only what an identity they may hold has dealings with.

use meshd_identity::sha256;
use meshd_pki_api::v1;

use crate::pki::Pki;
use crate::store::federation::{self, EVERYBODY, Federated};
use crate::store::{DbError, View};

/// What a host is to have, and how following it goes.
pub(crate) struct Shared {
    pub(crate) federation: v1::Federation,
    pub(crate) freshness: Vec<v1::FederationFreshness>,
}

impl Shared {
    /// Nothing for a host that has just that.
    pub(crate) fn unless_known(&self, revision: u64) -> Option<v1::Federation> {
        (self.federation.revision != revision).then(|| self.federation.clone())
    }
}

impl Pki {
    /// For a host that may hold these identities.
    pub(crate) fn federation_for(&self, view: &mut dyn View, permitted: &[String]) -> Result<Shared, DbError> {
        let all = federation::all(view)?;
        let (bundles, freshness): (Vec<_>, Vec<_>) = all.iter().filter_map(|one| share(one, permitted)).unzip();
        Ok(Shared { federation: v1::Federation { revision: revision(&bundles), bundles }, freshness })
    }
}

fn share(one: &Federated, permitted: &[String]) -> Option<(v1::FederatedBundle, v1::FederationFreshness)> {
    let held = one.held.as_ref()?;
    let named = &one.relationship.identities;
    let everybody = named.iter().any(|identity| identity == EVERYBODY);
    let spiffe_ids: Vec<String> = permitted.iter().filter(|id| everybody || named.contains(id)).cloned().collect();
    if spiffe_ids.is_empty() {
        return None;
    }
    let trust_domain = one.relationship.trust_domain.to_string();
    let freshness = v1::FederationFreshness {
        trust_domain: trust_domain.clone(),
        last_good_unix: one.polled.last_good_at,
        next_unix: one.polled.next_at,
    };
    let bundle = v1::TrustBundle { trust_domain, sequence: held.sequence, jwks: held.jwks.clone().into_bytes() };
    Some((v1::FederatedBundle { bundle: Some(bundle), spiffe_ids }, freshness))
}

/// Of the content: it changes as well when the host may hold other identities, and is the same on every replica.
fn revision(bundles: &[v1::FederatedBundle]) -> u64 {
    if bundles.is_empty() {
        return 0;
    }
    let mut content = Vec::new();
    let mut add = |part: &[u8]| {
        content.extend((part.len() as u64).to_be_bytes());
        content.extend(part);
    };
    for one in bundles {
        let bundle = one.bundle.as_ref();
        add(bundle.map(|bundle| bundle.trust_domain.as_bytes()).unwrap_or_default());
        add(bundle.map(|bundle| &bundle.jwks[..]).unwrap_or_default());
        add(one.spiffe_ids.join(" ").as_bytes());
    }
    let digest = sha256(&content);
    u64::from_be_bytes(digest[..8].try_into().expect("SHA-256 has 32 bytes")).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(domain: &str, jwks: &str, ids: &[&str]) -> v1::FederatedBundle {
        let bundle = v1::TrustBundle { trust_domain: domain.to_owned(), sequence: 1, jwks: jwks.into() };
        v1::FederatedBundle { bundle: Some(bundle), spiffe_ids: ids.iter().map(|id| (*id).to_owned()).collect() }
    }

    #[test]
    fn the_revision_is_of_the_content() {
        let one = [bundle("a", "x", &["1"])];
        assert_eq!(revision(&one), revision(&one.clone()));
        let others = [
            vec![],
            vec![bundle("b", "x", &["1"])],
            vec![bundle("a", "y", &["1"])],
            vec![bundle("a", "x", &["1", "2"])],
            vec![bundle("a", "x", &["1"]), bundle("b", "x", &["1"])],
        ];
        assert!(others.iter().all(|other| revision(other) != revision(&one)));
        assert_eq!(revision(&[]), 0);
    }
}
