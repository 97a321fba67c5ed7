//! Whoever proves to be invited gets credentials.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use data_encoding::BASE64;
use meshd_identity::{Bundle, IdError, JoinToken, PkiPin, SpiffeId, TrustDomain, sha256};
use meshd_pki_api::v1;
use tonic::{Code, Status};

use crate::connect::{ConnectError, call, connect, unverified_tls, verified_tls};
use crate::key::NewKey;
use crate::proof::Proof;
use crate::recovery::Pins;
use crate::reply::{problem, read_bundle, read_svid};
use crate::schedule::retry_delay;
use crate::state::{State, from_unix_ms, unix_ms};
use crate::store::{Store, StoreError};
use crate::surroundings::{Clock, Surroundings};
use crate::{Credentials, Federation, refusal_text};

/// The key of an enrolment under way. Kept so that a second try proves to be the same host: the token is bound to
/// the key of its first use, and the reply to that one may have been lost.
const PENDING_KEY: &str = "enrol.key";
/// Each round tries every address that may still do once.
const ROUNDS: u32 = 3;

#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(
        "this host already joined as `{host_id}` ({}) and its certificate is still good; to join again, stop meshd \
         and remove that directory", dir.display()
    )]
    AlreadyJoined { host_id: String, dir: PathBuf },
    #[error("bad host id: {0}")]
    HostId(#[from] IdError),
    #[error("no PKI server could be used:\n{attempts}check that `meshd-pki run` is up and the addresses are right")]
    Unreachable { attempts: String },
    #[error("the PKI at {address} refused this host: {message}")]
    Refused { address: String, message: String },
    #[error(
        "the PKI at {address} has other recovery keys than are pinned; do not join this PKI before you \
         know why, then make a new token with `meshd-pki token create`, or pin it anew"
    )]
    RecoveryKey { address: String },
    #[error("cannot make a key: {0}")]
    Key(#[from] rcgen::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Enrols this host by a join token; see [`join_by`].
pub async fn join(dir: &Path, token: &JoinToken, host_id: Option<&str>) -> Result<Credentials, JoinError> {
    join_by(dir, &token.pin(), &Proof::JoinToken(token.clone()), host_id).await
}

/// Enrols this host and writes its identity to `dir`. Safe to repeat with the same proof until it worked.
pub async fn join_by(dir: &Path, pin: &PkiPin, proof: &Proof, host_id: Option<&str>) -> Result<Credentials, JoinError> {
    join_in(dir, pin, proof, host_id, &Surroundings::default()).await
}

/// [`join_by`] with other clocks than the machine's.
pub async fn join_in(
    dir: &Path,
    pin: &PkiPin,
    proof: &Proof,
    host_id: Option<&str>,
    surroundings: &Surroundings,
) -> Result<Credentials, JoinError> {
    if let Some(host_id) = host_id {
        // Checked before the token is spent; the trust domain does not matter here.
        SpiffeId::host(&"check".parse().expect("a constant name"), host_id)?;
    }
    let mut store = Store::new(dir, &surroundings.machine_id_file);
    refuse_if_joined(&mut store, (surroundings.clock)())?;
    let key = pending_key(&store, &proof.id())?;
    let state = enrol_anywhere(pin, proof, host_id, &key, &surroundings.clock).await?;
    store.save(&state)?;
    store.remove(PENDING_KEY)?;
    Ok(state.credentials)
}

/// A host whose certificate has ended may join again in place; anything else would throw away what works.
fn refuse_if_joined(store: &mut Store, now: SystemTime) -> Result<(), JoinError> {
    match store.load() {
        Ok(state) if state.credentials.host.not_after > now => {
            Err(JoinError::AlreadyJoined { host_id: state.credentials.host_id, dir: store.dir().to_owned() })
        }
        Ok(_) | Err(StoreError::NotJoined { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn pending_key(store: &Store, proof: &str) -> Result<NewKey, JoinError> {
    if let Ok(text) = std::fs::read_to_string(store.dir().join(PENDING_KEY))
        && let Some((id, key)) = text.trim().split_once(' ')
        && id == proof
        && let Ok(key) = BASE64.decode(key.as_bytes())
        && let Ok(key) = NewKey::from_pkcs8(&key)
    {
        return Ok(key);
    }
    let key = NewKey::generate()?;
    store.write(PENDING_KEY, format!("{proof} {}\n", BASE64.encode(&key.pkcs8())).as_bytes())?;
    Ok(key)
}

/// How one attempt at one address ended.
enum Failed {
    /// The same address may do better in a moment.
    Now(String),
    /// This address will not do; another may.
    Here(String),
    /// The answer is final.
    Everywhere(JoinError),
}

async fn enrol_anywhere(
    pin: &PkiPin,
    proof: &Proof,
    host_id: Option<&str>,
    key: &NewKey,
    clock: &Clock,
) -> Result<State, JoinError> {
    let mut addresses = pin.pki.clone();
    fastrand::shuffle(&mut addresses);
    let mut delay = Duration::ZERO;
    let mut attempts = BTreeMap::new();
    for round in 0..ROUNDS {
        if round > 0 && !addresses.is_empty() {
            delay = retry_delay(delay, None, fastrand::f64());
            tokio::time::sleep(delay).await;
        }
        let mut again = Vec::new();
        for address in addresses {
            match enrol_at(&address, pin, proof, host_id, key, clock).await {
                Ok(state) => return Ok(state),
                Err(Failed::Everywhere(error)) => return Err(error),
                Err(Failed::Here(reason)) => _ = attempts.insert(address, reason),
                Err(Failed::Now(reason)) => {
                    attempts.insert(address.clone(), reason);
                    again.push(address);
                }
            }
        }
        addresses = again;
    }
    let attempts = attempts.into_iter().map(|(address, reason)| format!("  {address}: {reason}\n")).collect();
    Err(JoinError::Unreachable { attempts })
}

async fn enrol_at(
    address: &str,
    pin: &PkiPin,
    proof: &Proof,
    host_id: Option<&str>,
    key: &NewKey,
    clock: &Clock,
) -> Result<State, Failed> {
    let bundle = fetch_pinned_bundle(address, pin).await?;
    let tls = verified_tls(&bundle, None, SystemTime::UNIX_EPOCH, clock).map_err(here)?;
    let mut pki = connect(address, tls).await.map_err(unconnected)?;
    let csr = key.request().map_err(|error| Failed::Everywhere(error.into()))?;
    let attestation = proof.attestation(&mut pki, &bundle.trust_domain, &csr).await;
    let request = v1::EnrollRequest {
        attestation: Some(attestation.map_err(|status| refused(address, &status))?),
        host_id: host_id.unwrap_or_default().to_owned(),
        csr,
        host_time_unix_ms: unix_ms(clock()),
    };
    let reply = call(pki.enroll(request)).await.map_err(|status| refused(address, &status))?;
    let known = reply.recovery_keys.iter().any(|key| sha256(key) == pin.recovery_key_id);
    if !known || reply.recovery_keys.len() > 2 {
        return Err(Failed::Everywhere(JoinError::RecoveryKey { address: address.to_owned() }));
    }
    read_enrolment(reply, pin, host_id, key, &bundle.trust_domain).map_err(here)
}

/// Asks a server we cannot yet authenticate for the bundle the token pins. Nothing secret is sent; whatever comes
/// back either has the right digest or is not used.
async fn fetch_pinned_bundle(address: &str, pin: &PkiPin) -> Result<Bundle, Failed> {
    let mut pki = connect(address, unverified_tls().map_err(here)?).await.map_err(unconnected)?;
    let request = v1::BundleRequest { sha256: pin.bundle_digest.to_vec() };
    let reply = call(pki.bundle(request)).await.map_err(|status| unanswered(&status))?;
    let bundle = reply.bundle.unwrap_or_default();
    if sha256(&bundle.jwks) != pin.bundle_digest {
        return Err(Failed::Here(
            "its bundle is not the one that is pinned (SHA-256 differs): this is another PKI, or somebody \
             sits in between"
                .to_owned(),
        ));
    }
    let domain: TrustDomain = bundle.trust_domain.parse().map_err(here)?;
    Bundle::from_jwks(domain, &bundle.jwks).map_err(here)
}

fn read_enrolment(
    reply: v1::EnrollReply,
    pin: &PkiPin,
    asked: Option<&str>,
    key: &NewKey,
    domain: &TrustDomain,
) -> Result<State, crate::reply::ReplyError> {
    let host_id = reply.host_id;
    if asked.is_some_and(|asked| asked != host_id) {
        return Err(problem(format!("asked to be `{}`, enrolled as `{host_id}`", asked.unwrap_or_default())));
    }
    let pki_time = from_unix_ms(reply.server_time_unix_ms);
    let bundle = read_bundle(reply.bundle, domain, 0)?;
    let expected = SpiffeId::host(domain, &host_id).map_err(|error| problem(error.to_string()))?;
    let host = read_svid(reply.svid.unwrap_or_default(), &expected, key, &bundle, pki_time)?;
    let credentials = Credentials {
        trust_domain: domain.clone(),
        host_id,
        bundle,
        host: Arc::new(host),
        workloads: BTreeMap::new(),
        refused: BTreeMap::new(),
        selectors: BTreeMap::new(),
        hints: BTreeMap::new(),
        banned: false,
        federation: Federation::default(),
        pki: if reply.pki_addresses.is_empty() { pin.pki.clone() } else { reply.pki_addresses },
    };
    let recovery = Pins::new(reply.recovery_keys);
    Ok(State { credentials, recovery, enrolled_key: Some(key.pkcs8()), pki_time })
}

fn here(error: impl std::fmt::Display) -> Failed {
    Failed::Here(error.to_string())
}

fn unconnected(error: ConnectError) -> Failed {
    if error.may_pass() { Failed::Now(error.to_string()) } else { here(error) }
}

/// A clear no to the token is final; everything that may be about this server or this moment is not.
fn refused(address: &str, status: &Status) -> Failed {
    match unanswered(status) {
        Failed::Here(message) => Failed::Everywhere(JoinError::Refused { address: address.to_owned(), message }),
        other => other,
    }
}

fn unanswered(status: &Status) -> Failed {
    let text = refusal_text(status);
    match status.code() {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::Unimplemented
        | Code::Unauthenticated => Failed::Here(text),
        _ => Failed::Now(text),
    }
}
