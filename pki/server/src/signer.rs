//! What signs now: one intermediate, and the server certificate minted from it.

use std::sync::Arc;
use std::time::SystemTime;

use meshd_identity::{Bundle, SpiffeId, TrustDomain};
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};

use crate::audit::Event;
use crate::authority::{Authority, AuthorityError};
use crate::db::authorities::{self, AuthorityRow};
use crate::keys::Kek;
use crate::lifetimes::{ENDPOINT, ENDPOINT_EVERY, Lifetimes};
use crate::state_dir::{StateDir, StateError, authority_row};
use crate::times::{from_unix, rfc3339, unix};

/// Replaced as a whole whenever a part of it is renewed.
pub(crate) struct Signer {
    pub(crate) intermediate: Authority,
    pub(crate) bundle: Bundle,
    pub(crate) tls: Arc<ServerConfig>,
    pub(crate) replace_intermediate_at: SystemTime,
    pub(crate) replace_endpoint_at: SystemTime,
    pub(crate) endpoint_not_after: SystemTime,
}

#[derive(Debug, thiserror::Error)]
pub enum SignerError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error("the PKI's own TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("the PKI's own TLS: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

impl Signer {
    /// Loads the active intermediate, or makes one when there is none or its time has come. Nothing but the root is
    /// needed: a PKI that was off for months starts again by itself.
    pub(crate) fn load(
        state: &mut StateDir,
        kek: &Kek,
        lifetimes: &Lifetimes,
        now: SystemTime,
    ) -> Result<Signer, SignerError> {
        let stored = authorities::active(state.database.reader(), "intermediate").map_err(StateError::from)?;
        let usable = stored.filter(|row| replacement_time(row, lifetimes) > now);
        let (intermediate, replace_at) = match usable {
            Some(row) => (unwrap(kek, &row)?, replacement_time(&row, lifetimes)),
            None => (renew_intermediate(state, kek, lifetimes, now)?, now + lifetimes.intermediate_every),
        };
        let bundle = state.latest_bundle()?;
        let (tls, endpoint_not_after) = server_tls(&intermediate, &bundle, &state.trust_domain, now)?;
        Ok(Signer {
            intermediate,
            bundle,
            tls,
            replace_intermediate_at: replace_at,
            replace_endpoint_at: now + ENDPOINT_EVERY,
            endpoint_not_after,
        })
    }

    pub(crate) fn is_fresh(&self, now: SystemTime) -> bool {
        now < self.replace_intermediate_at && now < self.replace_endpoint_at
    }
}

fn replacement_time(row: &AuthorityRow, lifetimes: &Lifetimes) -> SystemTime {
    let half_left = from_unix(row.not_after) - lifetimes.intermediate / 2;
    (from_unix(row.activated_at) + lifetimes.intermediate_every).min(half_left)
}

fn unwrap(kek: &Kek, row: &AuthorityRow) -> Result<Authority, SignerError> {
    let missing = StateError::Incomplete { dir: "the database".into(), what: "the key of an active authority" };
    let wrapped = row.wrapped_key.as_ref().ok_or(missing)?;
    let key = kek.unwrap(&row.id, wrapped).map_err(StateError::from)?;
    let key = KeyPair::try_from(key.as_slice()).map_err(AuthorityError::from)?;
    Ok(Authority::from_parts(row.id.clone(), row.certificate.clone(), key, from_unix(row.not_after))?)
}

/// A new key and certificate. Active at once: an intermediate travels in every chain and needs no distribution.
fn renew_intermediate(
    state: &mut StateDir,
    kek: &Kek,
    lifetimes: &Lifetimes,
    now: SystemTime,
) -> Result<Authority, SignerError> {
    let root = authorities::active(state.database.reader(), "root").map_err(StateError::from)?;
    let incomplete = || StateError::Incomplete { dir: state.dir().to_owned(), what: "its root" };
    let root = unwrap(kek, &root.ok_or_else(incomplete)?)?;
    let made = Authority::new_intermediate(&root, &state.trust_domain, lifetimes, now)?;
    let wrapped = kek.wrap(&made.id, &made.pkcs8()).map_err(StateError::from)?;
    let row = authority_row(&made, "intermediate", Some(&root.id), wrapped, now);
    state.database.transaction(|transaction| -> Result<(), StateError> {
        authorities::retire_intermediates(transaction)?;
        Ok(authorities::insert_active(transaction, &row)?)
    })?;
    let event = Event {
        event: "intermediate",
        result: "ok",
        authority: Some(made.id.clone()),
        not_after: Some(rfc3339(unix(made.not_after))),
        ..Event::default()
    };
    if let Err(error) = state.record(now, &[event]) {
        tracing::error!(%error, "a new intermediate is in use but not in the audit log");
    }
    tracing::info!(authority = %made.id, not_after = %rfc3339(unix(made.not_after)), "new intermediate");
    Ok(made)
}

/// TLS 1.3 only. A client certificate is optional at the handshake and demanded by the methods that need it.
fn server_tls(
    intermediate: &Authority,
    bundle: &Bundle,
    domain: &TrustDomain,
    now: SystemTime,
) -> Result<(Arc<ServerConfig>, SystemTime), SignerError> {
    let key = KeyPair::generate().map_err(AuthorityError::from)?;
    let leaf = intermediate.issue(&SpiffeId::pki(domain), &key, ENDPOINT, now)?;
    let chain = [leaf.certificate, intermediate.certificate.clone()].map(CertificateDer::from).to_vec();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut roots = RootCertStore::empty();
    for root in &bundle.roots {
        roots.add(CertificateDer::from(root.as_slice()))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .clear_root_hint_subjects()
        .build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // A resumed session would skip the verification of the client.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok((Arc::new(config), leaf.not_after))
}
