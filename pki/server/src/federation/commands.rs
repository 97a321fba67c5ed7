//! `meshd-pki federation`: whose bundles are followed. Works beside a running server.

use std::path::Path;
use std::time::SystemTime;

use meshd_identity::{Bundle, BundleError, SpiffeId, TrustDomain};
use serde::Serialize;

use super::fetch::check_url;
use super::poll::trust_domain_of;
use super::tls::check_authorities;
use crate::admin::Actor;
use crate::audit::Event;
use crate::commands::CommandError;
use crate::issue::shorten;
use crate::state_dir::{StateDir, StateError};
use crate::store::DbError;
use crate::store::federation::{self, EVERYBODY, Federated, Held, Profile, Relationship};
use crate::times::{rfc3339, unix, unix_ms};

#[derive(Debug, thiserror::Error)]
pub enum FederationError {
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Db(#[from] DbError),
    #[error("`{0}` is this PKI's own trust domain")]
    Own(TrustDomain),
    #[error("--url: {0}")]
    Url(String),
    #[error("--bundle: {0}")]
    Bundle(#[from] BundleError),
    #[error("--ca: {0}")]
    Authorities(String),
    #[error("--spiffe-id `{0}` is no SPIFFE ID; write spiffe://<trust domain>/<path>")]
    SpiffeId(String),
    #[error(
        "with https_spiffe the endpoint is verified under the bundle of `{0}`; give it with --bundle FILE, as you got it from its operators"
    )]
    NoBundle(TrustDomain),
    #[error("the endpoint of `{1}` is verified under the bundle of `{0}`, which is not held; add `{0}` first")]
    Third(TrustDomain, TrustDomain),
    #[error("trust domain `{0}` is not federated; see `meshd-pki federation list`")]
    Unknown(TrustDomain),
}

/// What `federation add` was told. Adding again changes what is there; the bundle held stays unless one is given.
pub struct Asked<'a> {
    pub trust_domain: TrustDomain,
    pub url: &'a str,
    pub endpoint: Endpoint,
    /// `ns/<namespace>/sa/<name>` of those who may have dealings with the domain, or `*`.
    pub identities: &'a [String],
    /// SPIFFE bundle document to begin with.
    pub bundle: Option<Vec<u8>>,
}

pub enum Endpoint {
    /// Authorities in PEM; those of the system when there are none.
    Web {
        authorities: Option<String>,
    },
    Spiffe {
        spiffe_id: String,
    },
}

pub fn add(dir: &Path, asked: &Asked<'_>, now: SystemTime) -> Result<(), FederationError> {
    let state = StateDir::open(dir)?;
    let domain = &asked.trust_domain;
    if *domain == state.trust_domain {
        return Err(FederationError::Own(domain.clone()));
    }
    check_url(asked.url).map_err(FederationError::Url)?;
    let relationship = Relationship {
        trust_domain: domain.clone(),
        url: asked.url.to_owned(),
        profile: profile(&asked.endpoint)?,
        identities: identities(&state.trust_domain, asked.identities)?,
        added_at: unix(now),
    };
    let given = asked.bundle.as_ref().map(|document| first_bundle(domain, document, now)).transpose()?;
    let event = Event {
        event: "federation_add",
        result: "ok",
        by: Some(Actor::local().name),
        detail: Some(format!(
            "{domain} at {} by {} for {}",
            asked.url,
            relationship.profile.name(),
            relationship.identities.join(" ")
        )),
        ..Event::default()
    };
    state.change(now, |records, told| -> Result<(), FederationError> {
        if let Profile::HttpsSpiffe { spiffe_id } = &relationship.profile {
            let verified_by = trust_domain_of(spiffe_id);
            let is_own = verified_by.as_ref() == Some(&state.trust_domain);
            let held = match &verified_by {
                Some(named) => federation::find(records, named)?.and_then(|one| one.held),
                None => None,
            };
            let is_given = given.is_some() && verified_by.as_ref() == Some(domain);
            if !is_own && held.is_none() && !is_given {
                if let Some(named) = verified_by.filter(|named| named != domain) {
                    return Err(FederationError::Third(named, domain.clone()));
                }
                return Err(FederationError::NoBundle(domain.clone()));
            }
        }
        federation::put_relationship(records, &relationship, unix_ms(now))?;
        if let Some(held) = &given {
            federation::put_held(records, domain, held, unix_ms(now))?;
        }
        ask_now(records, domain)?;
        told.push(event.clone());
        Ok(())
    })
}

pub fn remove(dir: &Path, domain: &TrustDomain, now: SystemTime) -> Result<(), FederationError> {
    let state = StateDir::open(dir)?;
    let (by, detail) = (Some(Actor::local().name), Some(domain.to_string()));
    let event = Event { event: "federation_remove", result: "ok", by, detail, ..Event::default() };
    state.change(now, |records, told| -> Result<(), FederationError> {
        if !federation::remove(records, domain, unix_ms(now))? {
            return Err(FederationError::Unknown(domain.clone()));
        }
        told.push(event.clone());
        Ok(())
    })
}

/// The running server asks again within seconds.
pub fn refresh(dir: &Path, domain: &TrustDomain, now: SystemTime) -> Result<(), FederationError> {
    let state = StateDir::open(dir)?;
    state.change(now, |records, told| {
        if federation::find(records, domain)?.is_none() {
            return Err(FederationError::Unknown(domain.clone()));
        }
        let (by, detail) = (Some(Actor::local().name), Some(domain.to_string()));
        told.push(Event { event: "federation_refresh", result: "ok", by, detail, ..Event::default() });
        Ok(ask_now(records, domain)?)
    })
}

/// How one relationship stands.
#[derive(Debug, Serialize)]
pub struct FederationStatus {
    pub trust_domain: String,
    pub url: String,
    pub profile: String,
    pub spiffe_id: Option<String>,
    pub identities: Vec<String>,
    /// Of the bundle held; none when there is none yet.
    pub sequence: Option<u64>,
    pub roots: usize,
    pub changed_at: Option<String>,
    pub last_good: Option<String>,
    pub next: String,
    /// Why asking fails; the bundle held stays in use.
    pub problem: Option<String>,
}

pub fn list(dir: &Path) -> Result<Vec<FederationStatus>, FederationError> {
    let all = StateDir::open(dir)?.database.read(federation::all)?;
    Ok(all.into_iter().map(status).collect())
}

pub(crate) fn status(one: Federated) -> FederationStatus {
    let Federated { relationship, held, polled } = one;
    let domain = relationship.trust_domain;
    let bundle = held.as_ref().and_then(|held| Bundle::from_jwks(domain.clone(), held.jwks.as_bytes()).ok());
    FederationStatus {
        profile: relationship.profile.name().to_owned(),
        spiffe_id: match relationship.profile {
            Profile::HttpsSpiffe { spiffe_id } => Some(spiffe_id),
            Profile::HttpsWeb { .. } => None,
        },
        trust_domain: domain.to_string(),
        url: relationship.url,
        identities: relationship.identities.iter().map(|identity| shorten(identity).to_owned()).collect(),
        sequence: held.as_ref().map(|held| held.sequence),
        roots: bundle.map_or(0, |bundle| bundle.roots.len()),
        changed_at: held.map(|held| rfc3339(held.changed_at)),
        last_good: Some(polled.last_good_at).filter(|at| *at != 0).map(rfc3339),
        next: rfc3339(polled.next_at),
        problem: polled.problem,
    }
}

fn profile(endpoint: &Endpoint) -> Result<Profile, FederationError> {
    Ok(match endpoint {
        Endpoint::Web { authorities } => {
            if let Some(pem) = authorities {
                check_authorities(pem).map_err(FederationError::Authorities)?;
            }
            Profile::HttpsWeb { authorities: authorities.clone() }
        }
        Endpoint::Spiffe { spiffe_id } => {
            trust_domain_of(spiffe_id).ok_or_else(|| FederationError::SpiffeId(spiffe_id.clone()))?;
            Profile::HttpsSpiffe { spiffe_id: spiffe_id.clone() }
        }
    })
}

fn identities(own: &TrustDomain, asked: &[String]) -> Result<Vec<String>, FederationError> {
    let parse = |text: &String| -> Result<String, FederationError> {
        if text == EVERYBODY {
            return Ok(text.clone());
        }
        let id = SpiffeId::parse_in(own, text).map_err(CommandError::from)?;
        if id.trust_domain() != own {
            return Err(CommandError::Foreign(id, own.clone()).into());
        }
        Ok(id.to_string())
    };
    asked.iter().map(parse).collect()
}

fn first_bundle(domain: &TrustDomain, document: &[u8], now: SystemTime) -> Result<Held, BundleError> {
    let bundle = Bundle::from_jwks(domain.clone(), document)?;
    let jwks = String::from_utf8(bundle.to_jwks()).expect("JSON is text");
    Ok(Held { sequence: bundle.sequence, refresh_hint_s: bundle.refresh_hint_s, jwks, changed_at: unix(now) })
}

fn ask_now(records: &mut dyn crate::store::Records, domain: &TrustDomain) -> Result<(), DbError> {
    let polled = federation::find(records, domain)?.map(|one| one.polled).unwrap_or_default();
    federation::put_polled(records, domain, &federation::Polled { next_at: 0, ..polled })
}
