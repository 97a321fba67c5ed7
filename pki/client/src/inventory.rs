//! Which roots this host's own certificates end in. A root that somebody still uses is not taken away.

use std::cell::RefCell;
use std::collections::BTreeSet;

use meshd_identity::{Bundle, root_id, roots_of};
use meshd_pki_api::v1;
use rustls::pki_types::CertificateDer;

use crate::{Credentials, Svid};

/// Where it is in a chain: behind the leaf.
const INTERMEDIATE: usize = 1;

pub(crate) fn inventory(held: &Credentials) -> v1::Inventory {
    // What was issued together differs in the leaf only, and to read certificates is what a report costs.
    let mut told: Vec<&[CertificateDer<'_>]> = Vec::new();
    let mut roots = BTreeSet::new();
    for svid in held.workloads.values().chain([&held.host]) {
        let above = above_leaf(svid);
        if above.is_empty() || !told.contains(&above) {
            told.push(above);
            roots.extend(roots_under(svid, &held.bundle));
        }
    }
    v1::Inventory { roots: roots.into_iter().collect() }
}

fn above_leaf(svid: &Svid) -> &[CertificateDer<'static>] {
    svid.chain.get(INTERMEDIATE..).unwrap_or_default()
}

/// The identifiers of the roots of the bundle that a chain may end in: one, unless two have the same name. It ends where
/// the bundle begins: a bridge behind that is for others.
pub(crate) fn roots_under(svid: &Svid, bundle: &Bundle) -> Vec<String> {
    let signers = svid.chain.iter().map(|certificate| roots_of(certificate, bundle.roots.iter().map(Vec::as_slice)));
    let first = signers.into_iter().find(|roots| !roots.is_empty());
    first.unwrap_or_default().into_iter().map(root_id).collect()
}

/// The identifiers of all authorities above a leaf.
pub(crate) fn authorities_of(svid: &Svid, bundle: &Bundle) -> Vec<String> {
    let intermediates = svid.chain.iter().skip(1).map(|certificate| root_id(certificate));
    intermediates.chain(roots_under(svid, bundle)).collect()
}

/// Whether the root a chain ends in is in the bundle.
pub(crate) fn is_rooted(svid: &Svid, bundle: &Bundle) -> bool {
    !roots_under(svid, bundle).is_empty()
}

/// Tells chains that may stay from those that must go at once. Remembers what it has read.
pub(crate) struct Settled<'a> {
    bundle: &'a Bundle,
    known: RefCell<Vec<(&'a [CertificateDer<'static>], bool)>>,
}

impl<'a> Settled<'a> {
    pub(crate) fn by(bundle: &'a Bundle) -> Settled<'a> {
        Settled { bundle, known: RefCell::default() }
    }

    /// Whether a chain ends in the bundle, and not by a bridge alone, when the root that its intermediate is under has left.
    pub(crate) fn is(&self, svid: &'a Svid) -> bool {
        let above = above_leaf(svid);
        let mut known = self.known.borrow_mut();
        if let Some((_, is_settled)) = known.iter().find(|(chain, _)| *chain == above && !above.is_empty()) {
            return *is_settled;
        }
        let roots = || self.bundle.roots.iter().map(Vec::as_slice);
        let ends_at = svid.chain.iter().position(|certificate| !roots_of(certificate, roots()).is_empty());
        let is_settled = ends_at.is_some_and(|behind| behind <= INTERMEDIATE);
        known.push((above, is_settled));
        is_settled
    }
}

#[cfg(test)]
mod tests {
    use meshd_identity::{SpiffeId, TrustDomain};

    use super::*;
    use crate::fake::FakeCa;

    #[test]
    fn a_chain_ends_at_the_first_root_that_is_known_whatever_is_behind() {
        let domain: TrustDomain = "prod.example.org".parse().unwrap();
        let (signs, before) = (FakeCa::new(&domain), FakeCa::new(&domain));
        let id = SpiffeId::workload(&domain, "shop", "payments").unwrap();
        let mut svid = Svid::clone(&signs.svid(&id));
        svid.chain.push(before.svid(&id).chain[1].clone());
        let root = |ca: &FakeCa| ca.bundle().roots.remove(0);
        let bundle = |roots: &[&FakeCa]| {
            let roots = roots.iter().map(|ca| root(ca)).collect();
            Bundle::new(domain.clone(), 1, 300, roots).unwrap()
        };
        assert_eq!(roots_under(&svid, &bundle(&[&before, &signs])), [root_id(&root(&signs))]);
        assert_eq!(roots_under(&svid, &bundle(&[&before])), [root_id(&root(&before))]);
        assert!(!Settled::by(&bundle(&[&before])).is(&svid), "by a bridge alone");
        assert!(Settled::by(&bundle(&[&before, &signs])).is(&svid));
        assert!(!is_rooted(&svid, &bundle(&[&FakeCa::new(&domain)])));
    }
}
