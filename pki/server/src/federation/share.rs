//! What hosts are told of other trust domains: only what an identity they may hold has dealings with.

use std::sync::{Arc, Mutex, PoisonError};

use meshd_identity::sha256;
use meshd_pki_api::v1;

use crate::pki::Pki;
use crate::store::federation::{self, EVERYBODY, Federated, Held, Relationship};
use crate::store::{DbError, View};

/// What hosts can be told, read and hashed once for each revision: every report of every host asks for it.
#[derive(Default)]
pub(crate) struct Followed(Mutex<(u64, Arc<Vec<Domain>>)>);

/// One trust domain with a bundle.
struct Domain {
    relationship: Relationship,
    held: Held,
    /// SHA-256 of the bundle.
    digest: [u8; 32],
}

impl Domain {
    fn of(one: Federated) -> Option<Domain> {
        let held = one.held?;
        Some(Domain { relationship: one.relationship, digest: sha256(held.jwks.as_bytes()), held })
    }

    fn name(&self) -> String {
        self.relationship.trust_domain.to_string()
    }

    /// Those of these identities that have dealings with it.
    fn among(&self, permitted: &[String]) -> Vec<String> {
        let named = &self.relationship.identities;
        let everybody = named.iter().any(|identity| identity == EVERYBODY);
        permitted.iter().filter(|id| everybody || named.contains(id)).cloned().collect()
    }
}

impl Followed {
    fn read(&self, view: &mut dyn View) -> Result<Arc<Vec<Domain>>, DbError> {
        let revision = federation::revision(view)?;
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.0 != revision {
            let all = federation::all(view)?.into_iter().filter_map(Domain::of).collect();
            *known = (revision, Arc::new(all));
        }
        Ok(known.1.clone())
    }
}

/// What a host is to have, and how following it goes.
pub(crate) struct Shared {
    all: Arc<Vec<Domain>>,
    /// Which of them, with whom they are for.
    shares: Vec<(usize, Vec<String>)>,
    revision: u64,
    pub(crate) freshness: Vec<v1::FederationFreshness>,
}

impl Shared {
    /// Nothing for a host that has just that.
    pub(crate) fn unless_known(&self, revision: u64) -> Option<v1::Federation> {
        if self.revision == revision {
            return None;
        }
        let bundles = self.shares.iter().map(|(place, spiffe_ids)| {
            let Domain { held, .. } = &self.all[*place];
            let (sequence, jwks) = (held.sequence, held.jwks.clone().into_bytes());
            let bundle = v1::TrustBundle { trust_domain: self.all[*place].name(), sequence, jwks };
            v1::FederatedBundle { bundle: Some(bundle), spiffe_ids: spiffe_ids.clone() }
        });
        Some(v1::Federation { revision: self.revision, bundles: bundles.collect() })
    }
}

impl Pki {
    /// For a host that may hold these identities.
    pub(crate) fn federation_for(&self, view: &mut dyn View, permitted: &[String]) -> Result<Shared, DbError> {
        let all = self.followed.read(view)?;
        let shares = all.iter().map(|one| one.among(permitted)).enumerate();
        let shares: Vec<(usize, Vec<String>)> = shares.filter(|(_, spiffe_ids)| !spiffe_ids.is_empty()).collect();
        let mut freshness = Vec::new();
        for (place, _) in &shares {
            let polled = federation::polled(view, &all[*place].relationship.trust_domain)?;
            freshness.push(v1::FederationFreshness {
                trust_domain: all[*place].name(),
                last_good_unix: polled.last_good_at,
                next_unix: polled.next_at,
            });
        }
        let revision = revision(shares.iter().map(|(place, ids)| (&all[*place], ids.as_slice())));
        Ok(Shared { all, shares, revision, freshness })
    }
}

/// Of the content: it changes as well when the host may hold other identities, and is the same on every replica.
fn revision<'a>(shares: impl Iterator<Item = (&'a Domain, &'a [String])>) -> u64 {
    let mut content = Vec::new();
    for (domain, spiffe_ids) in shares {
        for part in [domain.name().as_bytes(), &domain.digest, spiffe_ids.join(" ").as_bytes()] {
            content.extend((part.len() as u64).to_be_bytes());
            content.extend(part);
        }
    }
    if content.is_empty() {
        return 0;
    }
    let digest = sha256(&content);
    u64::from_be_bytes(digest[..8].try_into().expect("SHA-256 has 32 bytes")).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::federation::{Polled, Profile};

    fn domain(name: &str, jwks: &str) -> Domain {
        let relationship = Relationship {
            trust_domain: name.parse().unwrap(),
            url: String::new(),
            profile: Profile::HttpsWeb { authorities: None },
            identities: Vec::new(),
            added_at: 0,
        };
        let held = Held { sequence: 1, refresh_hint_s: 300, jwks: jwks.to_owned(), changed_at: 0 };
        Domain::of(Federated { relationship, held: Some(held), polled: Polled::default() }).unwrap()
    }

    #[test]
    fn the_revision_is_of_the_content() {
        let ids = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<String>>();
        let (a, changed, b) = (domain("a", "x"), domain("a", "y"), domain("b", "x"));
        let of = |shares: &[(&Domain, &str)]| {
            let shares: Vec<(&Domain, Vec<String>)> = shares.iter().map(|(one, text)| (*one, ids(text))).collect();
            revision(shares.iter().map(|(one, ids)| (*one, ids.as_slice())))
        };
        let one = of(&[(&a, "1")]);
        assert_eq!(one, of(&[(&domain("a", "x"), "1")]));
        let others =
            [of(&[]), of(&[(&b, "1")]), of(&[(&changed, "1")]), of(&[(&a, "1 2")]), of(&[(&a, "1"), (&b, "1")])];
        assert!(others.iter().all(|other| *other != one));
        assert_eq!(of(&[]), 0);
    }
}
