//! Entries with terms, as the command line makes them: for one host or for all with some labels, for some processes only.

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

use meshd_identity::{ProcessSelector, SpiffeId, TrustDomain};

use crate::audit::Event;
use crate::commands::{CommandError, refuse_unknown, workload};
use crate::enrol::excerpt;
use crate::labels::{Label, label_map};
use crate::state_dir::StateDir;
use crate::store::Records;
use crate::store::grants::{self, LabelEntry, Terms};
use crate::times::{rfc3339, unix};

/// In one certificate; each host sends it with every handshake.
const MOST_NAMES: usize = 16;
/// RFC 1035 section 2.3.4.
const LONGEST_NAME: usize = 254;
/// SPIFFE Workload API section 5.2.1.
const LONGEST_HINT: usize = 1024;

/// Who may hold an identity.
#[derive(Debug, Clone, Copy)]
pub enum Parent<'a> {
    Host(&'a str),
    /// All hosts that have all of these.
    Labels(&'a [Label]),
}

pub struct EntryRequest<'a> {
    pub parent: Parent<'a>,
    pub identity: &'a str,
    pub selectors: &'a [String],
    pub ttl: Option<Duration>,
    pub jwt_ttl: Option<Duration>,
    pub dns_names: &'a [String],
    pub hint: &'a str,
    pub expires_in: Option<Duration>,
}

impl<'a> EntryRequest<'a> {
    /// Without any terms.
    pub const fn new(parent: Parent<'a>, identity: &'a str) -> EntryRequest<'a> {
        EntryRequest {
            parent,
            identity,
            selectors: &[],
            ttl: None,
            jwt_ttl: None,
            dns_names: &[],
            hint: "",
            expires_in: None,
        }
    }

    pub(crate) fn has_terms(&self) -> bool {
        let EntryRequest { parent: _, identity: _, selectors, ttl, jwt_ttl, dns_names, hint, expires_in } = self;
        let lives = [ttl, jwt_ttl, expires_in];
        !selectors.is_empty() || !dns_names.is_empty() || !hint.is_empty() || lives.iter().any(|life| life.is_some())
    }

    fn terms(&self, now: SystemTime) -> Result<Terms, CommandError> {
        let selectors = ProcessSelector::parse_all(self.selectors)?;
        check_dns_names(self.dns_names)?;
        check_hint(self.hint)?;
        let seconds = |life: Option<Duration>| life.map(|life| life.as_secs().max(2));
        Ok(Terms {
            selectors: selectors.iter().map(ProcessSelector::to_string).collect(),
            ttl_s: seconds(self.ttl),
            jwt_ttl_s: seconds(self.jwt_ttl),
            dns_names: self.dns_names.to_vec(),
            hint: self.hint.to_owned(),
            expires_at: self.expires_in.map(|life| unix(now + life)),
        })
    }
}

/// Makes an entry, or changes its terms.
pub fn put_entry(dir: &Path, asked: &EntryRequest<'_>, now: SystemTime) -> Result<(), CommandError> {
    let state = StateDir::open(dir)?;
    state.change(now, |records, told| put_entry_in(records, told, &state.trust_domain, asked, now))
}

pub(crate) fn put_entry_in(
    records: &mut dyn Records,
    told: &mut Vec<Event>,
    domain: &TrustDomain,
    asked: &EntryRequest<'_>,
    now: SystemTime,
) -> Result<(), CommandError> {
    let id = workload(domain, asked.identity)?;
    let terms = asked.terms(now)?;
    let mut event = Event { event: "entry_add", result: "ok", identity: Some(id.to_string()), ..Event::default() };
    let mut detail = String::new();
    if let Parent::Labels(labels) = asked.parent {
        _ = write!(detail, "hosts with {}; ", grants::labels_text(&label_map(labels)?));
    }
    _ = write!(detail, "selectors: {}", terms.selectors.join(" "));
    if !terms.dns_names.is_empty() {
        _ = write!(detail, "; DNS names: {}", terms.dns_names.join(" "));
    }
    event.not_after = terms.expires_at.map(rfc3339);
    event.detail = Some(detail);
    match asked.parent {
        Parent::Host(host) => {
            refuse_unknown(records, host, unix(now))?;
            grants::put_entry(records, host, id.as_str(), terms, unix(now))?;
            event.host = Some(host.to_owned());
        }
        Parent::Labels(labels) => {
            let (labels, spiffe_id) = (label_map(labels)?, id.to_string());
            grants::put_label_entry(records, &LabelEntry { labels, spiffe_id, created_at: unix(now), terms })?;
        }
    }
    told.push(event);
    Ok(())
}

/// Takes an identity away from all hosts with exactly these labels named.
pub fn remove_label_entry(dir: &Path, labels: &[Label], identity: &str, now: SystemTime) -> Result<(), CommandError> {
    let state = StateDir::open(dir)?;
    let id = workload(&state.trust_domain, identity)?;
    state.change(now, |records, told| remove_label_entry_in(records, told, labels, &id))
}

pub(crate) fn remove_label_entry_in(
    records: &mut dyn Records,
    told: &mut Vec<Event>,
    labels: &[Label],
    id: &SpiffeId,
) -> Result<(), CommandError> {
    let labels = label_map(labels)?;
    let parent = grants::labels_text(&labels);
    if !grants::delete_label_entry(records, &labels, id.as_str())? {
        return Err(CommandError::NoEntry { host: parent, identity: id.short().to_owned() });
    }
    let (identity, detail) = (Some(id.to_string()), Some(format!("hosts with {parent}")));
    told.push(Event { event: "entry_remove", result: "ok", identity, detail, ..Event::default() });
    Ok(())
}

/// Names a certificate can have; no wildcards, which would mean hosts that others name.
fn check_dns_names(names: &[String]) -> Result<(), CommandError> {
    let is_label = |label: &str| {
        let edges = label.starts_with('-') || label.ends_with('-');
        let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        !edges && (1..64).contains(&label.len()) && label.bytes().all(is_allowed)
    };
    let is_good = |name: &String| name.len() < LONGEST_NAME && name.split('.').all(is_label);
    match names.iter().find(|name| !is_good(name)) {
        Some(bad) => Err(CommandError::DnsName(excerpt(bad))),
        None if names.len() > MOST_NAMES => Err(CommandError::DnsNames(MOST_NAMES)),
        None => Ok(()),
    }
}

fn check_hint(hint: &str) -> Result<(), CommandError> {
    let is_good = hint.len() <= LONGEST_HINT && !hint.chars().any(char::is_control);
    if is_good { Ok(()) } else { Err(CommandError::Hint(LONGEST_HINT)) }
}
