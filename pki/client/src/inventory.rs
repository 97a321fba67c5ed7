//! Which roots this host's own certificates end in. A root that somebody still uses is not taken away.

use std::collections::BTreeSet;

use meshd_pki_api::v1;
use rustls::pki_types::CertificateDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::Oid;
use x509_parser::prelude::FromDer;

use crate::Credentials;

/// X.520 serialNumber: the identifier of an authority in its subject.
const SERIAL_NUMBER: [u64; 4] = [2, 5, 4, 5];

pub(crate) fn inventory(held: &Credentials) -> v1::Inventory {
    let svids = held.workloads.values().chain([&held.host]);
    let roots: BTreeSet<String> = svids.filter_map(|svid| issuer_id(svid.chain.last()?)).collect();
    v1::Inventory { roots: roots.into_iter().collect() }
}

/// The identifier of the authority that signed a certificate; `None` when it is not one of ours.
fn issuer_id(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let wanted = Oid::from(&SERIAL_NUMBER).ok()?;
    let attribute = parsed.issuer().iter_by_oid(&wanted).next()?;
    Some(attribute.as_str().ok()?.to_owned())
}
