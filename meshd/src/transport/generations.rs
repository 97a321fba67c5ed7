//! Which changes of credentials make connections old: those after which a handshake would show or believe something
//! else. What a foreign trust domain changes is no reason to dial anew within our own. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use meshd_identity::{SpiffeId, TrustDomain};
use meshd_pki_client::{Credentials, Federated, Svid};

/// Of a connection: it takes no new streams once that of its peer's trust domain is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation {
    ours: u64,
    theirs: u64,
}

/// Those in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Generations {
    /// Changes of our certificates and roots.
    ours: u64,
    /// Changes of the roots of other trust domains, also of those that are not federated any more.
    theirs: BTreeMap<TrustDomain, u64>,
}

impl Generations {
    /// After so many changes of ours.
    pub fn with(ours: u64) -> Generations {
        Generations { ours, theirs: BTreeMap::new() }
    }

    /// For peers of a trust domain.
    pub fn of(&self, domain: &TrustDomain) -> Generation {
        Generation { ours: self.ours, theirs: self.theirs.get(domain).copied().unwrap_or(0) }
    }

    /// With `next` instead of `before`. None: TLS has no use for what changed.
    pub fn after(&self, before: &Credentials, next: &Credentials) -> Option<Generations> {
        let mut generations = self.clone();
        let is_ours = before.bundle.roots != next.bundle.roots || !are_same_svids(before, next);
        generations.ours += u64::from(is_ours);
        let (old, new) = (&before.federation.domains, &next.federation.domains);
        let mut has_changed = is_ours;
        for domain in old.keys().chain(new.keys().filter(|domain| !old.contains_key(*domain))) {
            let [old, new] = [old, new].map(|domains| domains.get(domain));
            if roots(old) != roots(new) {
                *generations.theirs.entry(domain.clone()).or_default() += 1;
                has_changed = true;
            }
            has_changed |= old.map(|one| &one.identities) != new.map(|one| &one.identities);
        }
        has_changed.then_some(generations)
    }
}

fn roots(federated: Option<&Federated>) -> Option<&[Vec<u8>]> {
    federated.map(|one| &one.bundle.roots[..])
}

fn are_same_svids(before: &Credentials, next: &Credentials) -> bool {
    let is_same = |(id, svid): (&SpiffeId, &Arc<Svid>)| {
        next.workloads.get(id).is_some_and(|newer| Arc::ptr_eq(svid, newer) || svid.chain == newer.chain)
    };
    before.workloads.len() == next.workloads.len() && before.workloads.iter().all(is_same)
}

#[cfg(test)]
mod tests {
    use meshd_identity::Bundle;
    use meshd_pki_client::fake::FakeCa;

    use super::*;

    fn ours() -> TrustDomain {
        "a.example".parse().unwrap()
    }

    fn theirs() -> TrustDomain {
        "b.example".parse().unwrap()
    }

    fn web() -> SpiffeId {
        SpiffeId::workload(&ours(), "shop", "web").unwrap()
    }

    fn federated() -> Credentials {
        let mut held = FakeCa::new(ours()).credentials("web-1", &[web()]);
        held.federation = FakeCa::new(theirs()).federated_for(&[web()]);
        held
    }

    /// With another bundle of the foreign trust domain.
    fn told(held: &Credentials, change: impl FnOnce(&Bundle) -> Bundle) -> Credentials {
        let mut next = held.clone();
        let one = next.federation.domains.get_mut(&theirs()).unwrap();
        one.bundle = change(&one.bundle);
        next
    }

    #[test]
    fn what_tls_has_no_use_for_makes_no_connection_old() {
        let (first, held) = (Generations::default(), federated());
        assert_eq!(first.after(&held, &held.clone()), None);
        let sequence = |bundle: &Bundle| {
            let Bundle { trust_domain, sequence, refresh_hint_s, roots, .. } = bundle.clone();
            Bundle::new(trust_domain, sequence + 1, refresh_hint_s + 1, roots).unwrap()
        };
        let mut next = told(&held, sequence);
        assert_ne!(next.federation, held.federation);
        next.federation.revision += 1;
        next.federation.refused.insert("c.example".to_owned(), "no root".to_owned());
        next.refused.insert(web(), "not permitted".to_owned());
        assert_eq!(first.after(&held, &next), None);
    }

    #[test]
    fn another_foreign_root_makes_connections_with_that_domain_old_and_no_others() {
        let (first, held) = (Generations::default(), federated());
        let next = told(&held, |_| FakeCa::new(theirs()).bundle());
        let rotated = first.after(&held, &next).unwrap();
        assert_ne!(rotated.of(&theirs()), first.of(&theirs()));
        assert_eq!(rotated.of(&ours()), first.of(&ours()));
        let mut gone = next.clone();
        gone.federation.domains.clear();
        let ended = rotated.after(&next, &gone).unwrap();
        assert_ne!(ended.of(&theirs()), rotated.of(&theirs()));
        assert_ne!(ended.after(&gone, &held).unwrap().of(&theirs()), first.of(&theirs()), "never one that was");
    }

    #[test]
    fn whom_a_domain_deals_with_is_in_force_at_once_and_makes_nothing_old() {
        let (first, held) = (Generations::default(), federated());
        let mut next = held.clone();
        next.federation.domains.get_mut(&theirs()).unwrap().identities.clear();
        assert_eq!(first.after(&held, &next), Some(first.clone()));
    }

    #[test]
    fn a_certificate_or_root_of_ours_makes_all_connections_old() {
        let (first, held) = (Generations::default(), federated());
        let mut renewed = held.clone();
        renewed.workloads = FakeCa::new(ours()).credentials("web-1", &[web()]).workloads;
        let mut rerooted = held.clone();
        rerooted.bundle = FakeCa::new(ours()).bundle();
        let mut fewer = held.clone();
        fewer.workloads.clear();
        for next in [renewed, rerooted, fewer] {
            let after = first.after(&held, &next).unwrap();
            for domain in [ours(), theirs()] {
                assert_ne!(after.of(&domain), first.of(&domain));
            }
        }
    }
}
