//! Which roots this host's own certificates end in. A root that somebody still uses is not taken away.

use std::collections::BTreeSet;

use meshd_identity::{Bundle, root_id, roots_of};
use meshd_pki_api::v1;

use crate::{Credentials, Svid};

pub(crate) fn inventory(held: &Credentials) -> v1::Inventory {
    let svids = held.workloads.values().chain([&held.host]);
    let roots: BTreeSet<String> = svids.flat_map(|svid| roots_under(svid, &held.bundle)).collect();
    v1::Inventory { roots: roots.into_iter().collect() }
}

/// The identifiers of the roots of the bundle that a chain may end in: one, unless two have the same name.
pub(crate) fn roots_under(svid: &Svid, bundle: &Bundle) -> Vec<String> {
    let Some(last) = svid.chain.last() else { return Vec::new() };
    roots_of(last, bundle.roots.iter().map(Vec::as_slice)).into_iter().map(root_id).collect()
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
