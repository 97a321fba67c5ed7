//! From what the PKI answered to what may be installed.

use std::time::SystemTime;

use meshd_identity::{Bundle, SpiffeId, TrustDomain};
use meshd_pki_api::v1;

use crate::Svid;
use crate::key::NewKey;
use crate::state::assemble;
use crate::verify::check_issued;

#[derive(Debug, thiserror::Error)]
#[error("the PKI's answer is unusable: {0}; nothing was changed")]
pub(crate) struct ReplyError(pub(crate) String);

pub(crate) fn problem(text: impl Into<String>) -> ReplyError {
    ReplyError(text.into())
}

/// Reads a bundle of the trust domain we belong to. A lower sequence than the one held is refused: it would bring
/// back roots that were removed for a reason.
pub(crate) fn read_bundle(
    bundle: Option<v1::TrustBundle>,
    domain: &TrustDomain,
    held_sequence: u64,
) -> Result<Bundle, ReplyError> {
    let bundle = bundle.ok_or_else(|| problem("it carries no bundle"))?;
    if bundle.trust_domain != domain.as_str() {
        let theirs = bundle.trust_domain.escape_debug().to_string();
        return Err(problem(format!("its bundle is of `{theirs}`, this host belongs to `{domain}`")));
    }
    let read = Bundle::from_jwks(domain.clone(), &bundle.jwks).map_err(|error| problem(error.to_string()))?;
    if read.sequence < held_sequence {
        let sequence = read.sequence;
        return Err(problem(format!("its bundle has sequence {sequence}, this host already holds {held_sequence}")));
    }
    Ok(read)
}

/// The bundle that a certificate came with, or the one held when that is newer: a PKI restored from a backup hands out an
/// older one until it makes the next, and renewals are not to wait for that. Whether the certificate verifies is then
/// judged by what is held.
pub(crate) fn newer_bundle(bundle: Option<v1::TrustBundle>, held: &Bundle) -> Result<Bundle, ReplyError> {
    let read = read_bundle(bundle, &held.trust_domain, 0)?;
    if read.sequence >= held.sequence {
        return Ok(read);
    }
    tracing::warn!(
        theirs = read.sequence,
        held = held.sequence,
        "the PKI has an older bundle than this host, which it keeps"
    );
    Ok(held.clone())
}

/// Reads one issued certificate: for the identity asked, over our key, under the bundle it came with.
pub(crate) fn read_svid(
    svid: v1::Svid,
    expected: &SpiffeId,
    key: &NewKey,
    bundle: &Bundle,
    pki_time: SystemTime,
) -> Result<Svid, ReplyError> {
    check_issued(&svid.chain, bundle, pki_time)
        .map_err(|error| problem(format!("the chain for {expected} does not verify: {error}")))?;
    if !key.matches(&svid.chain[0]) {
        return Err(problem(format!("the certificate for {expected} is over another key")));
    }
    let read = assemble(svid.chain, key.pkcs8(), pki_time).map_err(problem)?;
    if read.id != *expected {
        return Err(problem(format!("asked for {expected}, got {}", read.id)));
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeCa;

    fn domain() -> TrustDomain {
        "prod.example.org".parse().unwrap()
    }

    fn wire(bundle: &Bundle) -> Option<v1::TrustBundle> {
        let trust_domain = bundle.trust_domain.to_string();
        Some(v1::TrustBundle { trust_domain, sequence: bundle.sequence, jwks: bundle.to_jwks() })
    }

    #[test]
    fn a_bundle_of_another_domain_an_older_one_and_none_are_refused() {
        let bundle = FakeCa::new(domain()).bundle();
        assert_eq!(read_bundle(wire(&bundle), &domain(), 1).unwrap(), bundle);
        assert!(read_bundle(wire(&bundle), &domain(), 2).unwrap_err().to_string().contains("already holds 2"));
        let foreign = FakeCa::new("other".parse::<TrustDomain>().unwrap()).bundle();
        assert!(read_bundle(wire(&foreign), &domain(), 0).unwrap_err().to_string().contains("`other`"));
        assert!(read_bundle(None, &domain(), 0).is_err());
    }

    #[test]
    fn what_an_older_bundle_comes_with_is_judged_by_the_newer_one_held() {
        let bundle = FakeCa::new(domain()).bundle();
        let mut held = FakeCa::new(domain()).bundle();
        assert_eq!(newer_bundle(wire(&bundle), &held).unwrap(), bundle, "as new as what is held");
        held.sequence = 2;
        assert_eq!(newer_bundle(wire(&bundle), &held).unwrap(), held);
        let foreign = FakeCa::new("other".parse::<TrustDomain>().unwrap()).bundle();
        assert!(newer_bundle(wire(&foreign), &held).is_err());
    }

    #[test]
    fn a_certificate_over_a_foreign_key_or_for_somebody_else_is_refused() {
        let ca = FakeCa::new(domain());
        let id = SpiffeId::workload(&domain(), "shop", "payments").unwrap();
        let issued = ca.svid(&id);
        let chain: Vec<Vec<u8>> = issued.chain.iter().map(|der| der.to_vec()).collect();
        let svid = || v1::Svid { spiffe_id: id.to_string(), chain: chain.clone() };
        let key = NewKey::from_pkcs8(issued.key.secret_der()).unwrap();
        let read = |id: &SpiffeId, key: &NewKey| read_svid(svid(), id, key, &ca.bundle(), SystemTime::now());
        assert_eq!(read(&id, &key).unwrap().serial, issued.serial);
        let other = SpiffeId::workload(&domain(), "shop", "other").unwrap();
        assert!(read(&other, &key).unwrap_err().to_string().contains("asked for"));
        assert!(read(&id, &NewKey::generate().unwrap()).unwrap_err().to_string().contains("another key"));
    }
}
