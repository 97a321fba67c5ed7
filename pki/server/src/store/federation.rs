//! Trust domains whose bundle we follow, and the last good one of each. Never merged with ours or with each other.

use meshd_identity::TrustDomain;
use serde::{Deserialize, Serialize};

use super::{DbError, Records, View, get, list, put};

/// Every identity, where identities are listed.
pub(crate) const EVERYBODY: &str = "*";
const REVISION: &str = "setting/federation_revision";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Relationship {
    pub(crate) trust_domain: TrustDomain,
    pub(crate) url: String,
    pub(crate) profile: Profile,
    /// SPIFFE IDs of ours that may have dealings with that domain, or [`EVERYBODY`].
    pub(crate) identities: Vec<String>,
    pub(crate) added_at: i64,
}

/// How the endpoint proves who it is (SPIFFE Federation section 5.2). Configured, never inferred.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "profile")]
pub(crate) enum Profile {
    /// By a certificate for its name, under these authorities (PEM) or those of the system.
    HttpsWeb { authorities: Option<String> },
    /// By an X.509-SVID with this identity.
    HttpsSpiffe { spiffe_id: String },
}

impl Profile {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Profile::HttpsWeb { .. } => "https_web",
            Profile::HttpsSpiffe { .. } => "https_spiffe",
        }
    }
}

/// The last good bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Held {
    pub(crate) sequence: u64,
    pub(crate) refresh_hint_s: u64,
    pub(crate) jwks: String,
    pub(crate) changed_at: i64,
}

/// How asking goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Polled {
    pub(crate) at: i64,
    pub(crate) next_at: i64,
    pub(crate) last_good_at: i64,
    pub(crate) problem: Option<String>,
}

/// All there is about one domain.
#[derive(Debug, Clone)]
pub(crate) struct Federated {
    pub(crate) relationship: Relationship,
    pub(crate) held: Option<Held>,
    pub(crate) polled: Polled,
}

fn key(kind: &str, domain: &TrustDomain) -> String {
    format!("federation_{kind}/{domain}")
}

pub(crate) fn all(view: &mut dyn View) -> Result<Vec<Federated>, DbError> {
    let found: Vec<(String, Relationship)> = list(view, "federation/")?;
    found.into_iter().map(|(_, relationship)| federated(view, relationship)).collect()
}

pub(crate) fn find(view: &mut dyn View, domain: &TrustDomain) -> Result<Option<Federated>, DbError> {
    match get(view, &format!("federation/{domain}"))? {
        Some(relationship) => federated(view, relationship).map(Some),
        None => Ok(None),
    }
}

fn federated(view: &mut dyn View, relationship: Relationship) -> Result<Federated, DbError> {
    let held = get(view, &key("bundle", &relationship.trust_domain))?;
    let polled = polled(view, &relationship.trust_domain)?;
    Ok(Federated { relationship, held, polled })
}

pub(crate) fn put_relationship(records: &mut dyn Records, one: &Relationship, now_ms: u64) -> Result<(), DbError> {
    revise(records, now_ms)?;
    put(records, &format!("federation/{}", one.trust_domain), one)
}

pub(crate) fn put_held(
    records: &mut dyn Records,
    domain: &TrustDomain,
    held: &Held,
    now_ms: u64,
) -> Result<(), DbError> {
    revise(records, now_ms)?;
    put(records, &key("bundle", domain), held)
}

pub(crate) fn polled(view: &mut dyn View, domain: &TrustDomain) -> Result<Polled, DbError> {
    Ok(get(view, &key("polled", domain))?.unwrap_or_default())
}

pub(crate) fn put_polled(records: &mut dyn Records, domain: &TrustDomain, polled: &Polled) -> Result<(), DbError> {
    put(records, &key("polled", domain), polled)
}

/// Whether there was one.
pub(crate) fn remove(records: &mut dyn Records, domain: &TrustDomain, now_ms: u64) -> Result<bool, DbError> {
    revise(records, now_ms)?;
    records.delete(&key("bundle", domain))?;
    records.delete(&key("polled", domain))?;
    records.delete(&format!("federation/{domain}"))
}

/// Rises with every change of what hosts are told. A time, so that it is above that of any backup restored.
pub(crate) fn revision(view: &mut dyn View) -> Result<u64, DbError> {
    Ok(get(view, REVISION)?.unwrap_or_default())
}

fn revise(records: &mut dyn Records, now_ms: u64) -> Result<(), DbError> {
    let next = now_ms.max(revision(records)? + 1);
    put(records, REVISION, &next)
}
