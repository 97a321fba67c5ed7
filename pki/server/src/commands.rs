//! What the command line does on a state directory. Works beside a running server: both use the same database.

use std::path::Path;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use meshd_identity::{IdError, JoinToken, PkiPin, Secret, SelectorError, SpiffeId, TokenError, TrustDomain, sha256};

use crate::audit::Event;
use crate::keys::{KeyError, random};
use crate::labels::{Label, LabelError, label_map};
use crate::state_dir::{StateDir, StateError};
use crate::store::tokens::{self, Token};
use crate::store::{DbError, Records, View, hosts, replicas, settings};
use crate::times::{rfc3339, unix};

/// Longer than any installation takes; a token is a password.
const LONGEST_TTL: Duration = Duration::from_secs(7 * 86_400);

/// More hosts than one mesh has.
const MOST_USES: u32 = 10_000;

#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Db(#[from] DbError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Id(#[from] IdError),
    #[error("{0} belongs to another trust domain than this PKI's `{1}`; write it as ns/<namespace>/sa/<name>")]
    Foreign(SpiffeId, TrustDomain),
    #[error("{0} is in the namespace of hosts; workloads may not hold such identities, choose another namespace")]
    Reserved(SpiffeId),
    #[error("a token may live at most 7 days; choose a shorter --ttl")]
    Ttl,
    #[error("a token serves 1 to {MOST_USES} hosts; choose another --max-uses")]
    Uses,
    #[error(transparent)]
    Selector(#[from] SelectorError),
    #[error(
        "`{0}` is no name of DNS for a certificate; write it in full and lower case, without `*`, as pay.example.org"
    )]
    DnsName(String),
    #[error("a certificate has at most {0} names of DNS")]
    DnsNames(usize),
    #[error("a hint has at most {0} bytes, without control characters")]
    Hint(usize),
    #[error(transparent)]
    Label(#[from] LabelError),
    #[error("{0}")]
    Token(#[from] TokenError),
    #[error(
        "no address of this PKI is known; give `--pki HOST:PORT`, or start the server with `--advertise HOST:PORT`"
    )]
    NoAddress,
    #[error("host `{host}` is neither enrolled nor has an open join token; known hosts: {known}")]
    UnknownHost { host: String, known: String },
    #[error("host `{host}` is not permitted {identity}; see `meshd-pki entry list`")]
    NoEntry { host: String, identity: String },
}

#[derive(Debug, Clone)]
pub struct TokenRequest<'a> {
    pub host: &'a str,
    pub allow: &'a [String],
    pub pki: &'a [String],
    pub ttl: Duration,
    /// With more than one, `host` is what the ids of the hosts begin with.
    pub max_uses: u32,
    /// Where it may be used; empty is everywhere.
    pub from: &'a [IpNet],
    /// Of the hosts it makes.
    pub labels: &'a [Label],
}

impl Default for TokenRequest<'_> {
    fn default() -> Self {
        let ttl = Duration::from_secs(3600);
        TokenRequest { host: "", allow: &[], pki: &[], ttl, max_uses: 1, from: &[], labels: &[] }
    }
}

pub fn create_token(dir: &Path, asked: &TokenRequest<'_>, now: SystemTime) -> Result<JoinToken, CommandError> {
    let state = StateDir::open(dir)?;
    let (token, row) = make_token(&state, asked, now)?;
    state.change(now, |records, told| -> Result<(), CommandError> { Ok(put_token(records, told, &row)?) })?;
    Ok(token)
}

/// A token, and what is to be on record of it.
pub(crate) fn make_token(
    state: &StateDir,
    asked: &TokenRequest<'_>,
    now: SystemTime,
) -> Result<(JoinToken, Token), CommandError> {
    SpiffeId::host(&state.trust_domain, asked.host)?;
    let allow = asked.allow.iter().map(|text| workload(&state.trust_domain, text)).collect::<Result<Vec<_>, _>>()?;
    if asked.ttl > LONGEST_TTL {
        return Err(CommandError::Ttl);
    }
    if !(1..=MOST_USES).contains(&asked.max_uses) {
        return Err(CommandError::Uses);
    }
    let (mut id, mut secret) = ([0; 8], [0; 32]);
    random(&mut id)?;
    random(&mut secret)?;
    let PkiPin { pki, bundle_digest, recovery_key_id } = pin_of(state, asked.pki)?;
    let token = JoinToken {
        id: data_encoding::HEXLOWER.encode(&id),
        secret: Secret(secret),
        pki,
        bundle_digest,
        recovery_key_id,
    };
    token.check()?;
    let row = Token {
        id: token.id.clone(),
        secret_hash: sha256(&secret).to_vec(),
        host_id: asked.host.to_owned(),
        allow: allow.iter().map(SpiffeId::to_string).collect(),
        created_at: unix(now),
        expires_at: unix(now + asked.ttl),
        used: None,
        max_uses: asked.max_uses,
        uses: 0,
        from: asked.from.to_vec(),
        labels: label_map(asked.labels)?,
    };
    Ok((token, row))
}

pub(crate) fn put_token(records: &mut dyn Records, told: &mut Vec<Event>, row: &Token) -> Result<(), DbError> {
    told.push(Event {
        event: "token_create",
        result: "ok",
        host: Some(row.host_id.clone()),
        token: Some(row.id.clone()),
        not_after: Some(rfc3339(row.expires_at)),
        detail: Some(token_detail(row)),
        ..Event::default()
    });
    tokens::put_token(records, row)
}

/// Where this PKI is and how to recognise it, for hosts that prove in another way than by a token who they are.
pub fn pin(dir: &Path, pki: &[String]) -> Result<PkiPin, CommandError> {
    pin_of(&StateDir::open(dir)?, pki)
}

fn pin_of(state: &StateDir, pki: &[String]) -> Result<PkiPin, CommandError> {
    let recovery = state.database.read(settings::recovery_keys)?;
    let recovery = recovery.first().ok_or_else(|| state.incomplete("its recovery key"))?;
    let pin = PkiPin {
        pki: addresses(state, pki)?,
        bundle_digest: state.latest_bundle()?.digest(),
        recovery_key_id: sha256(recovery),
    };
    pin.check()?;
    Ok(pin)
}

fn token_detail(token: &Token) -> String {
    let mut detail = format!("allow: {}", token.allow.join(" "));
    if token.max_uses > 1 {
        detail.push_str(&format!("; for {} hosts", token.max_uses));
    }
    if !token.from.is_empty() {
        let from: Vec<String> = token.from.iter().map(IpNet::to_string).collect();
        detail.push_str(&format!("; from {}", from.join(" ")));
    }
    detail
}

/// What was asked for, else what the server was last told to advertise.
fn addresses(state: &StateDir, asked: &[String]) -> Result<Vec<String>, CommandError> {
    if !asked.is_empty() {
        return Ok(asked.to_vec());
    }
    let mut known = state.database.read(replicas::addresses)?;
    if known.is_empty() {
        known = state.database.read(settings::advertise)?;
    }
    if known.is_empty() { Err(CommandError::NoAddress) } else { Ok(known) }
}

/// Permits a host an identity. True when that is new.
pub fn add_entry(dir: &Path, host: &str, identity: &str, now: SystemTime) -> Result<bool, CommandError> {
    let state = StateDir::open(dir)?;
    let id = workload(&state.trust_domain, identity)?;
    state.change(now, |records, told| add_entry_in(records, told, host, &id, now))
}

pub(crate) fn add_entry_in(
    records: &mut dyn Records,
    told: &mut Vec<Event>,
    host: &str,
    id: &SpiffeId,
    now: SystemTime,
) -> Result<bool, CommandError> {
    SpiffeId::host(id.trust_domain(), host)?;
    refuse_unknown(records, host, unix(now))?;
    let new = hosts::permit(records, host, id.as_str(), unix(now))?;
    told.extend(new.then(|| entry_event("entry_add", host, id)));
    Ok(new)
}

/// Takes an identity away: it is not renewed any more, and ends with its certificate.
pub fn remove_entry(dir: &Path, host: &str, identity: &str, now: SystemTime) -> Result<(), CommandError> {
    let state = StateDir::open(dir)?;
    let id = workload(&state.trust_domain, identity)?;
    state.change(now, |records, told| remove_entry_in(records, told, host, &id))
}

pub(crate) fn remove_entry_in(
    records: &mut dyn Records,
    told: &mut Vec<Event>,
    host: &str,
    id: &SpiffeId,
) -> Result<(), CommandError> {
    if !hosts::forbid(records, host, id.as_str())? {
        return Err(CommandError::NoEntry { host: host.to_owned(), identity: id.short().to_owned() });
    }
    told.push(entry_event("entry_remove", host, id));
    Ok(())
}

/// A misspelt host would otherwise wait for ever, with nothing wrong to see.
pub(crate) fn refuse_unknown(view: &mut dyn View, host: &str, now: i64) -> Result<(), CommandError> {
    let enrolled = hosts::hosts(view)?.into_iter().map(|row| row.id);
    let invited = tokens::open(view, now)?.into_iter().filter(|token| token.max_uses == 1);
    let invited = invited.map(|token| token.host_id);
    let known: std::collections::BTreeSet<String> = enrolled.chain(invited).collect();
    if known.contains(host) {
        return Ok(());
    }
    let known = known.into_iter().collect::<Vec<_>>().join(", ");
    let known = if known.is_empty() { "none".to_owned() } else { known };
    Err(CommandError::UnknownHost { host: host.to_owned(), known })
}

pub(crate) fn workload(domain: &TrustDomain, text: &str) -> Result<SpiffeId, CommandError> {
    let id = SpiffeId::parse_in(domain, text)?;
    if id.trust_domain() != domain {
        return Err(CommandError::Foreign(id, domain.clone()));
    }
    if id.is_system() {
        return Err(CommandError::Reserved(id));
    }
    Ok(id)
}

fn entry_event(event: &'static str, host: &str, id: &SpiffeId) -> Event {
    let (host, identity) = (Some(host.to_owned()), Some(id.to_string()));
    Event { event, result: "ok", host, identity, ..Event::default() }
}
