//! Which roots this host's own certificates end in. A root that somebody still uses is not taken away.

use std::collections::BTreeSet;

use meshd_identity::Bundle;
use meshd_pki_api::v1;
use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::Oid;
use x509_parser::prelude::FromDer;
use x509_parser::x509::X509Name;

use crate::{Credentials, Svid};

/// X.520 serialNumber: the identifier of an authority in its subject.
const SERIAL_NUMBER: [u64; 4] = [2, 5, 4, 5];

pub(crate) fn inventory(held: &Credentials) -> v1::Inventory {
    let svids = held.workloads.values().chain([&held.host]);
    let roots: BTreeSet<String> = svids.filter_map(|svid| root_of(svid)).collect();
    v1::Inventory { roots: roots.into_iter().collect() }
}

/// The identifier of the root a chain ends in; `None` when it is not one of ours.
pub(crate) fn root_of(svid: &Svid) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(svid.chain.last()?).ok()?;
    identifier(parsed.issuer())
}

/// The identifiers of all authorities above a leaf.
pub(crate) fn authorities_of(svid: &Svid) -> impl Iterator<Item = String> + '_ {
    svid.chain.iter().filter_map(|certificate| {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        identifier(parsed.issuer())
    })
}

/// Whether the root a chain ends in is in the bundle. What is not ours to judge is taken to be.
pub(crate) fn is_rooted(svid: &Svid, bundle: &Bundle) -> bool {
    let Some(wanted) = root_of(svid) else { return true };
    bundle.roots.iter().any(|root| {
        let parsed = X509Certificate::from_der(root);
        parsed.is_ok_and(|(_, root)| identifier(root.subject()).as_ref() == Some(&wanted))
    })
}

fn identifier(name: &X509Name<'_>) -> Option<String> {
    let wanted = Oid::from(&SERIAL_NUMBER).ok()?;
    let attribute = name.iter_by_oid(&wanted).next()?;
    Some(attribute.as_str().ok()?.to_owned())
}
