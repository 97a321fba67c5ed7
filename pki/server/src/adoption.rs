//! Hosts of a PKI that was lost come back to the one in its place: by the key they enrolled, as its list of hosts has
//! it, for as long as the operator says. See docs/adr/0010.

mod list;
mod wait;

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use data_encoding::HEXLOWER;
use meshd_identity::sha256;

pub(crate) use self::wait::check_time;
use crate::audit::Event;
use crate::deny::Floor;
use crate::keeping::roster::{KnownHost, KnownRoot, Permitted, Roster};
use crate::lifetimes::Lifetimes;
use crate::rotation::step::Rotator;
use crate::state_dir::{StateDir, StateError};
use crate::store::hosts::{self, Host, HostState};
use crate::store::{DbError, Records, View, grants, tokens, trust};
use crate::times::{rfc3339, seconds, unix};

/// One transaction of etcd takes 128 operations.
const BATCH: usize = 40;

pub struct Adopt<'a> {
    /// `hosts.json` of the lost PKI.
    pub roster: &'a Path,
    /// How long its hosts may come back by it.
    pub within: Duration,
    /// Its keys were stolen, not lost: nothing that it signed is to be believed.
    pub without_roots: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Adopted {
    pub hosts: usize,
    /// Known here already; they stay as they are.
    pub known: usize,
    /// Known here, and shut out as the list has it.
    pub shut_out: Vec<String>,
    pub entries: usize,
    pub until: String,
    pub list: List,
}

/// What the list says of itself.
#[derive(Debug, PartialEq, Eq)]
pub struct List {
    pub sha256: String,
    /// When the bundle in it came into force.
    pub bundle_of: String,
    /// Roots have been replaced since, by the calendar.
    pub is_old: bool,
    pub banned: usize,
    pub evicted: usize,
    /// SHA-256 of the certificates of roots that hosts will believe.
    pub roots: Vec<String>,
    /// It is of this very PKI, before a backup was put in place: its hosts know the way.
    pub is_ours: bool,
    /// Hosts hold a deny set that this PKI can verify.
    pub has_denied: bool,
}

impl List {
    fn of(roster: &Roster, sha256: String, ours: &[Vec<u8>], now: SystemTime) -> List {
        let in_state = |state| roster.hosts.iter().filter(|host| host.state == state).count();
        let at = i64::try_from(roster.sequence / 1000).unwrap_or(i64::MAX);
        List {
            sha256,
            bundle_of: rfc3339(at),
            is_old: at + seconds(Lifetimes::default().root_every) < unix(now),
            banned: in_state(HostState::Banned),
            evicted: in_state(HostState::Evicted),
            roots: roster
                .roots
                .iter()
                .map(|root| HEXLOWER.encode(&meshd_identity::sha256(&root.certificate)))
                .collect(),
            is_ours: roster.roots.iter().any(|root| ours.contains(&root.certificate)),
            has_denied: roster.deny_sequence > 0,
        }
    }
}

pub fn adopt(dir: &Path, asked: &Adopt<'_>, now: SystemTime) -> anyhow::Result<Adopted> {
    let text = std::fs::read(asked.roster).with_context(|| asked.roster.display().to_string())?;
    let state = StateDir::open(dir)?;
    let mut roster = list::read(asked.roster, &text, &state.trust_domain, now)?;
    let ours: Vec<Vec<u8>> =
        state.database.read(trust::trust)?.roots.into_iter().map(|root| root.certificate).collect();
    let mut list = List::of(&roster, HEXLOWER.encode(&sha256(&text)), &ours, now);
    if asked.without_roots {
        roster.roots.clear();
        list.roots.clear();
        // Nobody could verify it.
        roster.deny_sequence = 0;
    }
    let floor = Floor::new(&state);
    floor.raise(roster.deny_sequence).with_context(|| format!("cannot write {}", floor.path().display()))?;
    adopt_roots(&state, &roster.roots, roster.sequence, now)?;
    let terms = Terms { until: unix(now + asked.within), unrecorded_until: unix(now) + longest_leaf(&roster) };
    let mut adopted =
        Adopted { hosts: 0, known: 0, shut_out: Vec::new(), entries: 0, until: rfc3339(terms.until), list };
    for batch in roster.hosts.chunks(BATCH) {
        let (taken, shut_out) = adopt_hosts(&state, batch, &terms, &adopted.list.sha256, now)?;
        adopted.hosts += taken;
        adopted.known += batch.len() - taken;
        adopted.shut_out.extend(shut_out);
    }
    for batch in roster.entries.chunks(BATCH) {
        adopted.entries += adopt_entries(&state, batch, now)?;
    }
    adopted.entries += adopt_label_entries(&state, &roster)?;
    Ok(adopted)
}

fn longest_leaf(roster: &Roster) -> i64 {
    roster.longest_leaf_s.max(seconds(Lifetimes::default().leaf))
}

fn adopt_roots(state: &StateDir, roots: &[KnownRoot], above: u64, now: SystemTime) -> Result<(), StateError> {
    let (kek, lifetimes) = (state.kek()?, Lifetimes::default());
    let (domain, deny_floor) = (&state.trust_domain, Floor::new(state).get());
    let rotator = Rotator { domain, kek: &kek, lifetimes: &lifetimes, clock_is_good: true, deny_floor, now };
    state.change(now, |records, told| {
        told.extend(rotator.adopt(records, roots, above)?);
        Ok(())
    })
}

/// On which the hosts are taken over.
struct Terms {
    until: i64,
    unrecorded_until: i64,
}

/// How many were not known, and which of those that were are shut out now.
fn adopt_hosts(
    state: &StateDir,
    batch: &[KnownHost],
    terms: &Terms,
    sha256: &str,
    now: SystemTime,
) -> Result<(usize, Vec<String>), StateError> {
    state.change(now, |records, told| {
        let (mut names, mut shut_out) = (Vec::new(), Vec::new());
        for known in batch {
            match hosts::host(records, &known.id)? {
                None => {
                    hosts::put_host(records, &host(known, terms))?;
                    names.push(known.id.as_str());
                }
                Some(ours) => {
                    if let Some(event) = shut_out_too(records, ours, known, sha256, unix(now))? {
                        shut_out.push(known.id.clone());
                        told.push(event);
                    }
                }
            }
        }
        let detail = format!("until {} by a list with sha256 {sha256}: {}", rfc3339(terms.until), names.join(" "));
        told.push(Event { event: "host_adopt", result: "ok", detail: Some(detail), ..Event::default() });
        Ok((names.len(), shut_out))
    })
}

/// Whom the list has banned or evicted since a host that is active here enrolled, was shut out after the backup that is
/// in use. What became of a host that enrolled later the list does not know.
fn shut_out_too(
    records: &mut dyn Records,
    mut ours: Host,
    known: &KnownHost,
    sha256: &str,
    now: i64,
) -> Result<Option<Event>, DbError> {
    if ours.state != HostState::Active || known.state == HostState::Active || ours.enrolled_at > known.enrolled_at {
        return Ok(None);
    }
    if known.key.is_empty() {
        ours.evict();
    }
    ours.state = known.state;
    hosts::put_host(records, &ours)?;
    tokens::end_those_of(records, &ours.id, now)?;
    let event = if ours.state == HostState::Banned { "host_ban" } else { "host_evict" };
    let detail = Some(format!("by a list with sha256 {sha256}"));
    Ok(Some(Event { event, result: "ok", host: Some(ours.id), detail, ..Event::default() }))
}

fn host(known: &KnownHost, terms: &Terms) -> Host {
    Host {
        id: known.id.clone(),
        state: known.state,
        key_current: if known.key.is_empty() { Vec::new() } else { sha256(&known.key).to_vec() },
        public_key: known.key.clone(),
        enrolled_key: known.key.clone(),
        next: None,
        enrolled_at: known.enrolled_at,
        // Not heard yet: its clock has no say, and no rotation waits for it.
        last_seen: known.enrolled_at,
        acked_sequence: 0,
        clock_offset_ms: 0,
        roots_in_use: Vec::new(),
        enrolled_by: known.enrolled_by.clone(),
        labels: known.labels.clone(),
        adopted_until: Some(terms.until),
        unrecorded_until: Some(terms.unrecorded_until),
    }
}

fn adopt_entries(state: &StateDir, batch: &[Permitted], now: SystemTime) -> Result<usize, StateError> {
    state.change(now, |records, told| {
        let mut names = Vec::new();
        for Permitted { host, entry } in batch {
            // What a host may that has come back, or was never away, is decided here.
            if hosts::host(records, host)?.is_some_and(|host| host.adopted_until.is_some()) {
                grants::put_entry(records, host, &entry.spiffe_id, entry.terms.clone(), unix(now))?;
                names.push(format!("{host} {}", entry.spiffe_id));
            }
        }
        if !names.is_empty() {
            let detail = format!("with adopted hosts: {}", names.join(", "));
            told.push(Event { event: "entry_add", result: "ok", detail: Some(detail), ..Event::default() });
        }
        Ok(names.len())
    })
}

fn adopt_label_entries(state: &StateDir, roster: &Roster) -> Result<usize, StateError> {
    // Once a host has come back this PKI has a life of its own: what was removed here since stays removed.
    let has_own = |view: &mut dyn View| -> Result<bool, DbError> {
        Ok(hosts::hosts(view)?.iter().any(|host| host.adopted_until.is_none()))
    };
    if state.database.read(has_own)? {
        return Ok(0);
    }
    for batch in roster.label_entries.chunks(BATCH) {
        state.database.transaction(|records| -> Result<(), StateError> {
            batch.iter().try_for_each(|entry| Ok(grants::put_label_entry(records, entry)?))
        })?;
    }
    Ok(roster.label_entries.len())
}
