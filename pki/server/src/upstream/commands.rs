//! `meshd-pki csr` and `meshd-pki import`. Both work beside a running server.

use std::path::Path;
use std::time::SystemTime;

use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::check::{Unusable, certificates, check, id_of_key, private_key};
use super::import::{Imported, Source};
use crate::admin::Actor;
use crate::audit::Event;
use crate::authority::{AuthorityError, csr_params};
use crate::deny::Floor;
use crate::lifetimes::Lifetimes;
use crate::rotation::step::Rotator;
use crate::state_dir::{StateDir, StateError};
use crate::store::upstream::{self, Pending};
use crate::store::{DbError, servers};
use crate::times::unix;

#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Db(#[from] DbError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error("the intermediate cannot be used: {0}; what is in force stays")]
    Unusable(#[from] Unusable),
    #[error(
        "the intermediate is over a key that is not here; sign the request of `meshd-pki csr`, or give the key with \
         --key FILE"
    )]
    NoKey,
    #[error("the bundle holds as many roots as it may; one has to leave before another comes")]
    TooManyRoots,
    #[error(
        "root {root} is tainted since {since}: its key may be known to others; bring an intermediate of a root with \
         another key"
    )]
    Tainted { root: String, since: String },
    #[error("the key of intermediate {id} or of its root is in the deny set: whatever it signs is refused everywhere")]
    Denied { id: String },
    #[error(
        "intermediate {id} was replaced by another; to go back to it, bring it by `meshd-pki import`, else put the \
         one in force into the files"
    )]
    Replaced { id: String },
}

/// A certificate request in PEM for an offline root to sign. The key stays here, encrypted; the same request is given
/// until its answer was imported.
pub fn csr(dir: &Path, now: SystemTime) -> Result<String, UpstreamError> {
    let state = StateDir::open(dir)?;
    let kek = state.kek()?;
    let pending = state.change(now, |records, told| -> Result<Pending, UpstreamError> {
        if let Some(pending) = upstream::pending(records)? {
            return Ok(pending);
        }
        let key = KeyPair::generate().map_err(AuthorityError::from)?;
        let id = id_of_key(&key.subject_public_key_info());
        let wrapped_key = kek.wrap(&id, &key.serialize_der()).map_err(StateError::from)?;
        let pending = Pending { id, wrapped_key, created_at: unix(now) };
        upstream::put_pending(records, &pending)?;
        let (by, detail) = (Some(Actor::local().name), Some(format!("over the key {}", pending.id)));
        told.push(Event { event: "upstream_csr", result: "ok", by, detail, ..Event::default() });
        Ok(pending)
    })?;
    let key = kek.unwrap(&pending.id, &pending.wrapped_key).map_err(StateError::from)?;
    let key = KeyPair::try_from(key.as_slice()).map_err(AuthorityError::from)?;
    let params: CertificateParams = csr_params(&state.trust_domain, &pending.id)?;
    let request = params.serialize_request(&key).map_err(AuthorityError::from)?;
    Ok(request.pem().map_err(AuthorityError::from)?)
}

/// Takes over an intermediate: PEM with it and the root that signed it. Its key is the one of the request, unless one
/// (PEM) is given.
pub fn import(dir: &Path, chain: &[u8], key: Option<&[u8]>, now: SystemTime) -> Result<Imported, UpstreamError> {
    let state = StateDir::open(dir)?;
    let chain = certificates(chain)?;
    let key = match key {
        Some(pem) => private_key(pem)?,
        None => pending_key(&state, chain.first())?,
    };
    let running = state.database.read(servers::servers)?;
    let lifetimes = running.iter().max_by_key(|server| server.at).map_or_else(Lifetimes::default, |one| one.lifetimes);
    take_over(&state, (&chain, &key), Source::Operator, &lifetimes, now)
}

fn pending_key(state: &StateDir, intermediate: Option<&Vec<u8>>) -> Result<Vec<u8>, UpstreamError> {
    let pending = state.database.read(upstream::pending)?.ok_or(UpstreamError::NoKey)?;
    let parsed = intermediate.and_then(|der| X509Certificate::from_der(der).ok());
    if parsed.is_some_and(|(_, certificate)| id_of_key(certificate.public_key().raw) != pending.id) {
        return Err(UpstreamError::NoKey);
    }
    Ok(state.kek()?.unwrap(&pending.id, &pending.wrapped_key).map_err(StateError::from)?)
}

pub(super) fn take_over(
    state: &StateDir,
    (chain, key): (&[Vec<u8>], &[u8]),
    source: Source,
    lifetimes: &Lifetimes,
    now: SystemTime,
) -> Result<Imported, UpstreamError> {
    let checked = check(chain, key, &state.trust_domain, lifetimes, now)?;
    let kek = state.kek()?;
    let (domain, deny_floor) = (&state.trust_domain, Floor::new(state).get());
    let rotator = Rotator { domain, kek: &kek, lifetimes, clock_is_good: true, deny_floor, now };
    state.change(now, |records, told| -> Result<_, UpstreamError> {
        let (imported, event) = rotator.import(records, &checked, source)?;
        upstream::forget_pending(records, &checked.key_id)?;
        upstream::set_refused(records, None)?;
        told.extend(event);
        Ok(imported)
    })
}
