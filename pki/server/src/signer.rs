//! What signs now: one intermediate, and the server certificate minted from it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use meshd_identity::{Bundle, SpiffeId, TrustDomain};
use meshd_pki_api::v1;
use rcgen::{KeyPair, PublicKeyData, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};

use crate::audit::Event;
use crate::authority::{self, Authority, AuthorityError};
use crate::failpoint;
use crate::keys::Kek;
use crate::lifetimes::{LEAF_BACKDATE, Lifetimes};
use crate::rotation::bridge::Bridge;
use crate::rotation::step::bundle_of;
use crate::rotation::trust::Upstream;
use crate::rotation::{Root, Trust};
use crate::state_dir::{StateDir, StateError};
use crate::store::hosts::Issued;
use crate::store::intermediates::{self, Intermediate};
use crate::store::{DbError, Records, View, trust};
use crate::sync::tainted;
use crate::times::{Clock, TlsTime, from_unix, rfc3339, seconds, unix};

/// After a replacement that failed.
const RETRY: Duration = Duration::from_secs(60);

/// Replaced as a whole whenever a part of it is renewed, so that a certificate and the bundle that goes with it are
/// never of different times.
pub(crate) struct Signer {
    pub(crate) intermediate: Authority,
    /// By it verifiers that know only the root before believe what is signed here.
    bridge: Option<Bridge>,
    /// The root that the intermediate is under.
    pub(crate) under: String,
    pub(crate) bundle: Bundle,
    /// The same as hosts get it.
    pub(crate) wire: v1::TrustBundle,
    /// The root that was active when this was made: it signed the intermediate, unless that could not be replaced.
    pub(crate) root: String,
    /// Roots whose key may be known to others.
    pub(crate) tainted: Vec<String>,
    pub(crate) tls: Arc<ServerConfig>,
    pub(crate) endpoint_not_after: SystemTime,
    pub(crate) endpoint_serial: String,
    /// By which else than its SPIFFE ID the PKI proves itself.
    pub(crate) names: Vec<SanType>,
    made_at: SystemTime,
    replace_intermediate_at: SystemTime,
    replace_endpoint_at: SystemTime,
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
    /// Loads this replica's intermediate, or makes one when there is none, its time has come, or its root is not the
    /// active one any more. An intermediate travels in every chain and needs no distribution: it is active at once.
    pub(crate) fn load(
        state: &StateDir,
        kek: &Kek,
        lifetimes: &Lifetimes,
        now: SystemTime,
    ) -> Result<Signer, SignerError> {
        let mut made = None;
        let chosen = state.database.transaction(|records| -> Result<_, StateError> {
            let trust = trust::trust(records)?;
            let root = trust.active().ok_or_else(|| state.incomplete("an active root"))?;
            let stored = intermediates::active(records, &state.replica)?;
            let joined = joined_at(stored.as_ref(), &trust, now);
            let usable = stored.filter(|row| row.root == root.id).filter(|row| match &root.upstream {
                // There is no other, ended or not.
                Some(given) => given.certificate == row.certificate,
                // One from a future that did not come is not valid yet.
                None => replacement_time(row, lifetimes) > now && from_unix(row.activated_at) <= now + lifetimes.skew,
            });
            let row = match usable {
                Some(row) => hand_out(records, row, &trust, lifetimes, joined)?,
                None => {
                    let row = new_intermediate(state, kek, lifetimes, root, (&trust, joined), now)?;
                    intermediates::replace(records, &row)?;
                    failpoint::reach("intermediate", "uncommitted");
                    made = Some(row.clone());
                    row
                }
            };
            Ok((trust, row))
        });
        let (trust, row, again_at) = match chosen {
            Ok((trust, row)) => {
                let again_at = replacement_time(&row, lifetimes);
                (trust, row, again_at)
            }
            Err(StateError::Db(error)) => {
                made = None;
                let (trust, row) = still_good(state, lifetimes, now, error)?;
                (trust, row, now + RETRY)
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(row) = made {
            failpoint::reach("intermediate", "committed");
            note(state, &row, now);
            failpoint::reach("intermediate", "recorded");
        }
        let intermediate = unwrap(kek, &row, lifetimes)?;
        let bundle = bundle_of(&trust, &state.trust_domain).map_err(StateError::from)?;
        let carried = |view: &mut dyn View| Ok::<_, DbError>(trust.carried_to(&row.root, view, lifetimes)?.cloned());
        let bridge = state.database.read(carried).map_err(StateError::from)?;
        let signs = (&intermediate, bridge.as_ref());
        let (tls, endpoint) = server_tls(signs, &bundle, (&state.trust_domain, &[]), lifetimes, now)?;
        Ok(Signer {
            intermediate,
            bridge,
            under: row.root.clone(),
            wire: v1::TrustBundle {
                trust_domain: bundle.trust_domain.to_string(),
                sequence: bundle.sequence,
                jwks: bundle.to_jwks(),
            },
            bundle,
            root: trust.active().map_or_else(|| row.root.clone(), |root| root.id.clone()),
            tainted: tainted(&trust),
            tls,
            endpoint_not_after: endpoint.not_after,
            endpoint_serial: endpoint.serial,
            names: Vec::new(),
            made_at: now,
            replace_intermediate_at: again_at,
            replace_endpoint_at: now + lifetimes.endpoint_every,
        })
    }

    /// A leaf as hosts get it, and its place in the records.
    pub(crate) fn issue(
        &self,
        id: &SpiffeId,
        key: &impl PublicKeyData,
        life: Duration,
        now: SystemTime,
    ) -> Result<(v1::Svid, Issued), AuthorityError> {
        self.issue_named(id, &[], key, life, now)
    }

    pub(crate) fn issue_named(
        &self,
        id: &SpiffeId,
        dns_names: &[String],
        key: &impl PublicKeyData,
        life: Duration,
        now: SystemTime,
    ) -> Result<(v1::Svid, Issued), AuthorityError> {
        let name = |name: &String| name.as_str().try_into().map(SanType::DnsName);
        let names = dns_names.iter().map(name).collect::<Result<Vec<_>, _>>().map_err(AuthorityError::from)?;
        let leaf = self.intermediate.issue_named(id, &names, key, life, now)?;
        let chain = chain_of(&leaf, &self.intermediate, self.bridge.as_ref());
        let issued = Issued {
            serial: leaf.serial,
            spiffe_id: id.to_string(),
            authority: self.intermediate.id.clone(),
            issued_at: unix(now),
            not_after: unix(leaf.not_after),
        };
        Ok((v1::Svid { spiffe_id: id.to_string(), chain }, issued))
    }

    /// Proves itself by these names, too.
    pub(crate) fn named(
        mut self,
        names: Vec<SanType>,
        lifetimes: &Lifetimes,
        now: SystemTime,
    ) -> Result<Signer, SignerError> {
        if !names.is_empty() {
            let proved = (&self.bundle.trust_domain, names.as_slice());
            let signs = (&self.intermediate, self.bridge.as_ref());
            let (tls, endpoint) = server_tls(signs, &self.bundle, proved, lifetimes, now)?;
            (self.tls, self.endpoint_not_after, self.endpoint_serial) = (tls, endpoint.not_after, endpoint.serial);
            self.names = names;
        }
        Ok(self)
    }

    /// Certificates of callers are judged by the PKI's clock, as everything else here.
    pub(crate) fn judging_by(mut self, clock: &Clock) -> Signer {
        let mut tls = ServerConfig::clone(&self.tls);
        tls.time_provider = Arc::new(TlsTime(clock.clone()));
        self.tls = Arc::new(tls);
        self
    }

    /// `bridge` is the one to carry.
    pub(crate) fn is_fresh(&self, trust: &Trust, bridge: Option<&Bridge>, now: SystemTime) -> bool {
        let says_so = self.bundle.sequence == trust.sequence && self.tainted == tainted(trust);
        let signs = trust.active().is_some_and(|root| root.id == self.root);
        // Made by a clock that was ahead until it was put right, it is not valid yet.
        let is_of_now = self.made_at <= now + LEAF_BACKDATE / 2;
        let given = trust.active().and_then(|root| root.upstream.as_ref());
        let is_given = given.is_none_or(|given| given.certificate == self.intermediate.certificate);
        says_so
            && self.bridge.as_ref() == bridge
            && is_given
            && signs
            && is_of_now
            && now < self.replace_intermediate_at
            && now < self.replace_endpoint_at
    }
}

/// Since when a replica hands out every root there is. Only a root that its bundle lacked starts that anew: JWT keys
/// change the bundle, too, and a new intermediate does not.
fn joined_at(before: Option<&Intermediate>, trust: &Trust, now: SystemTime) -> i64 {
    let had_all = |row: &&Intermediate| trust.roots.iter().all(|root| root.published_sequence <= row.bundle_sequence);
    before.filter(had_all).map_or_else(|| unix(now), |row| row.joined_bundle_at.min(unix(now)))
}

/// What is on record, where nothing can be put there now: the intermediate lives four times as long as it is used.
fn still_good(
    state: &StateDir,
    lifetimes: &Lifetimes,
    now: SystemTime,
    error: DbError,
) -> Result<(Trust, Intermediate), StateError> {
    let (trust, row) = state.database.read(|view| -> Result<_, DbError> {
        Ok((trust::trust(view)?, intermediates::active(view, &state.replica)?))
    })?;
    let verifies = |row: &Intermediate| trust.in_bundle().any(|root| root.id == row.root);
    match row.filter(|row| verifies(row) && now + lifetimes.leaf < from_unix(row.not_after)) {
        Some(row) => {
            tracing::error!(%error, "the intermediate cannot be replaced; the one in use goes on signing");
            Ok((trust, row))
        }
        None => Err(error.into()),
    }
}

/// What a replica hands out is on record before it does so: the rotation counts on it.
fn hand_out(
    records: &mut dyn Records,
    mut row: Intermediate,
    trust: &Trust,
    lifetimes: &Lifetimes,
    joined: i64,
) -> Result<Intermediate, StateError> {
    let before = row.clone();
    row.longest_leaf_s = row.longest_leaf_s.max(seconds(lifetimes.leaf));
    if row.bundle_sequence != trust.sequence {
        row.bundle_sequence = trust.sequence;
        row.joined_bundle_at = joined;
    }
    if row != before {
        intermediates::put_intermediate(records, &row)?;
    }
    Ok(row)
}

fn replacement_time(row: &Intermediate, lifetimes: &Lifetimes) -> SystemTime {
    if row.from_outside {
        // There is no other: it serves until whoever is outside brings the next.
        return from_unix(row.not_after);
    }
    let half_left = from_unix(row.not_after) - lifetimes.intermediate / 2;
    (from_unix(row.activated_at) + lifetimes.intermediate_every).min(half_left)
}

fn unwrap(kek: &Kek, row: &Intermediate, lifetimes: &Lifetimes) -> Result<Authority, SignerError> {
    let key = kek.unwrap(&row.id, &row.wrapped_key).map_err(StateError::from)?;
    let key = KeyPair::try_from(key.as_slice()).map_err(AuthorityError::from)?;
    let not_after = from_unix(row.not_after);
    let authority = Authority::from_parts(row.id.clone(), row.certificate.clone(), key, not_after, lifetimes.skew)?;
    Ok(if row.from_outside { authority.of_outside() } else { authority })
}

fn new_intermediate(
    state: &StateDir,
    kek: &Kek,
    lifetimes: &Lifetimes,
    root: &Root,
    (trust, joined_bundle_at): (&Trust, i64),
    now: SystemTime,
) -> Result<Intermediate, StateError> {
    if let Some(given) = &root.upstream {
        return Ok(from_outside(state, lifetimes, (root, given), (trust, joined_bundle_at), now));
    }
    let key = kek.unwrap(&root.id, &root.wrapped_key)?;
    let key = KeyPair::try_from(key.as_slice()).map_err(AuthorityError::from)?;
    let (id, end) = (root.id.clone(), from_unix(root.not_after));
    let root = Authority::from_parts(id, root.certificate.clone(), key, end, lifetimes.skew)?;
    let made = Authority::new_intermediate(&root, &state.trust_domain, lifetimes, now)?;
    Ok(Intermediate {
        wrapped_key: kek.wrap(&made.id, &made.pkcs8())?,
        not_after: unix(made.not_after),
        id: made.id,
        certificate: made.certificate,
        from_outside: false,
        replica: state.replica.clone(),
        root: root.id,
        activated_at: unix(now),
        replaced_at: None,
        longest_leaf_s: seconds(lifetimes.leaf),
        bundle_sequence: trust.sequence,
        joined_bundle_at,
    })
}

/// All servers sign with the one that was brought.
fn from_outside(
    state: &StateDir,
    lifetimes: &Lifetimes,
    (root, given): (&Root, &Upstream),
    (trust, joined_bundle_at): (&Trust, i64),
    now: SystemTime,
) -> Intermediate {
    Intermediate {
        id: given.id.clone(),
        replica: state.replica.clone(),
        root: root.id.clone(),
        certificate: given.certificate.clone(),
        wrapped_key: given.wrapped_key.clone(),
        activated_at: unix(now),
        replaced_at: None,
        not_after: given.not_after,
        longest_leaf_s: seconds(lifetimes.leaf),
        bundle_sequence: trust.sequence,
        joined_bundle_at,
        from_outside: true,
    }
}

fn note(state: &StateDir, row: &Intermediate, now: SystemTime) {
    let event = Event {
        event: "intermediate",
        result: "ok",
        authority: Some(row.id.clone()),
        not_after: Some(rfc3339(row.not_after)),
        detail: Some(format!("under root {}", row.root)),
        ..Event::default()
    };
    if let Err(error) = state.record(now, &[event]) {
        tracing::error!(%error, "a new intermediate is in use but not in the audit log");
    }
    tracing::info!(authority = %row.id, root = %row.root, not_after = %rfc3339(row.not_after), "new intermediate");
}

/// Leaf first, without the root.
fn chain_of(leaf: &authority::Issued, intermediate: &Authority, bridge: Option<&Bridge>) -> Vec<Vec<u8>> {
    let bridge = bridge.filter(|bridge| bridge.outlives(unix(leaf.not_after))).map(|bridge| &bridge.certificate);
    [&leaf.certificate, &intermediate.certificate].into_iter().chain(bridge).cloned().collect()
}

/// TLS 1.3 only. A client certificate is optional at the handshake and demanded by the methods that need it.
fn server_tls(
    (intermediate, bridge): (&Authority, Option<&Bridge>),
    bundle: &Bundle,
    (domain, names): (&TrustDomain, &[SanType]),
    lifetimes: &Lifetimes,
    now: SystemTime,
) -> Result<(Arc<ServerConfig>, authority::Issued), SignerError> {
    let key = KeyPair::generate().map_err(AuthorityError::from)?;
    let leaf = intermediate.issue_named(&SpiffeId::pki(domain), names, &key, lifetimes.endpoint, now)?;
    let chain = chain_of(&leaf, intermediate, bridge).into_iter().map(CertificateDer::from).collect();
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
    Ok((Arc::new(config), leaf))
}
