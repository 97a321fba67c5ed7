//! Hosts of a PKI that was lost come back to the one in its place: by the key they enrolled, as its list of hosts has
//! it, for as long as the operator says. See docs/adr/0010.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use data_encoding::HEXLOWER;
use meshd_identity::{SpiffeId, SvidInfo, sha256};

use crate::audit::Event;
use crate::commands::workload;
use crate::keeping::roster::{KnownHost, KnownRoot, Permitted, Roster, SCHEMA};
use crate::lifetimes::{LEAF_BACKDATE, Lifetimes};
use crate::pki::Pki;
use crate::refused::Refused;
use crate::rotation::step::Rotator;
use crate::state_dir::{StateDir, StateError};
use crate::store::hosts::{self, Host, HostState};
use crate::store::{DbError, View, grants, settings, trust};
use crate::times::{rfc3339, seconds, unix};

/// One transaction of etcd takes 128 operations.
const BATCH: usize = 40;
/// Hosts ask again within 5 min, whatever went wrong before, and notice within as much that the PKI is another.
const SETTLING_S: i64 = 900;

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
    pub entries: usize,
    pub until: String,
    /// Of the file.
    pub sha256: String,
}

pub fn adopt(dir: &Path, asked: &Adopt<'_>, now: SystemTime) -> anyhow::Result<Adopted> {
    let text = std::fs::read(asked.roster).with_context(|| asked.roster.display().to_string())?;
    let sha256 = HEXLOWER.encode(&sha256(&text));
    let roster: Roster = serde_json::from_slice(&text)
        .with_context(|| format!("{} is no hosts.json of meshd-pki", asked.roster.display()))?;
    let state = StateDir::open(dir)?;
    ensure!(roster.schema == SCHEMA, "it has schema {}, this meshd-pki reads {SCHEMA}", roster.schema);
    let (theirs, ours) = (&roster.trust_domain, &state.trust_domain);
    ensure!(theirs == ours, "it is of the trust domain `{theirs}`, this PKI is `{ours}`");
    check(&roster).with_context(|| format!("{} is not what a meshd-pki writes", asked.roster.display()))?;
    let until = unix(now + asked.within);
    adopt_roots(&state, if asked.without_roots { &[] } else { &roster.roots }, roster.sequence, now)?;
    let mut adopted = Adopted { hosts: 0, known: 0, entries: 0, until: rfc3339(until), sha256 };
    for batch in roster.hosts.chunks(BATCH) {
        let taken = adopt_hosts(&state, batch, until, &adopted.sha256, now)?;
        adopted.hosts += taken;
        adopted.known += batch.len() - taken;
    }
    for batch in roster.entries.chunks(BATCH) {
        adopted.entries += adopt_entries(&state, batch, now)?;
    }
    // Once a host has come back this PKI has a life of its own: what was removed here since stays removed.
    let has_own = |view: &mut dyn View| -> Result<bool, DbError> {
        Ok(hosts::hosts(view)?.iter().any(|host| host.adopted_until.is_none()))
    };
    if !state.database.read(has_own)? {
        for batch in roster.label_entries.chunks(BATCH) {
            state.database.transaction(|records| -> Result<(), StateError> {
                batch.iter().try_for_each(|entry| Ok(grants::put_label_entry(records, entry)?))
            })?;
            adopted.entries += batch.len();
        }
    }
    Ok(adopted)
}

fn adopt_roots(state: &StateDir, roots: &[KnownRoot], above: u64, now: SystemTime) -> Result<(), StateError> {
    let (kek, lifetimes) = (state.kek()?, Lifetimes::default());
    let domain = &state.trust_domain;
    let rotator = Rotator { domain, kek: &kek, lifetimes: &lifetimes, clock_is_good: true, now };
    state.change(now, |records, told| {
        told.extend(rotator.adopt(records, roots, above)?);
        Ok(())
    })
}

/// How many were not known.
fn adopt_hosts(
    state: &StateDir,
    batch: &[KnownHost],
    until: i64,
    sha256: &str,
    now: SystemTime,
) -> Result<usize, StateError> {
    state.change(now, |records, told| {
        let mut names = Vec::new();
        for known in batch {
            if hosts::host(records, &known.id)?.is_none() {
                hosts::put_host(records, &host(known, until))?;
                names.push(known.id.as_str());
            }
        }
        let detail = format!("until {} by a list with sha256 {sha256}: {}", rfc3339(until), names.join(" "));
        told.push(Event { event: "host_adopt", result: "ok", detail: Some(detail), ..Event::default() });
        Ok(names.len())
    })
}

fn host(known: &KnownHost, until: i64) -> Host {
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
        adopted_until: Some(until),
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

/// A list that was changed by somebody must not make hosts of what is none, nor grant what no entry can.
fn check(roster: &Roster) -> anyhow::Result<()> {
    let domain = &roster.trust_domain;
    for known in &roster.hosts {
        SpiffeId::host(domain, &known.id).with_context(|| format!("host `{}`", known.id))?;
    }
    let by_host = roster.entries.iter().map(|permitted| &permitted.entry.spiffe_id);
    for id in by_host.chain(roster.label_entries.iter().map(|entry| &entry.spiffe_id)) {
        workload(domain, id).with_context(|| format!("entry `{id}`"))?;
    }
    Ok(())
}

/// A host that has got nothing from this PKI yet may do so only as long as the operator said.
pub(crate) fn check_time(host: &Host, now: i64) -> Result<(), Refused> {
    match host.adopted_until.filter(|until| now > *until) {
        None => Ok(()),
        Some(until) => Err(Refused::Unauthenticated(format!(
            "host `{0}` had until {1} to come back to the PKI that took the place of a lost one; make a token with \
             `meshd-pki token create --host {0}` and run `meshd join`",
            host.id,
            rfc3339(until)
        ))),
    }
}

impl Pki {
    /// What a host gets now, others believe only once they know this PKI's root. So hosts that still hold good
    /// certificates of the PKI before get none until all have said that they do, or time is up.
    pub(crate) fn wait_for_others(
        &self,
        view: &mut dyn View,
        host: &Host,
        certificate: &SvidInfo,
    ) -> Result<(), Refused> {
        let now = self.now();
        let Some(since) = settings::recovered_at(view)?.filter(|_| host.adopted_until.is_some()) else { return Ok(()) };
        let life = certificate.not_after.duration_since(certificate.not_before + LEAF_BACKDATE).unwrap_or_default();
        let until = since + SETTLING_S.min(seconds(self.lifetimes.leaf) / 2);
        if unix(now) >= until || certificate.not_after < now + life / 10 {
            return Ok(());
        }
        let trust = trust::trust(view)?;
        let needed = trust.active().map_or(0, |root| root.published_sequence);
        let all = hosts::hosts(view)?.into_iter();
        let behind = all.filter(|one| one.state == HostState::Active && one.adopted_until.is_some());
        let behind = behind.filter(|one| one.acked_sequence < needed).count();
        match behind {
            0 => Ok(()),
            _ => Err(Refused::Unavailable(format!(
                "{behind} hosts do not know the roots of this PKI yet, which took the place of a lost one; renewals go \
                 on when they do, at {} at the latest",
                rfc3339(until)
            ))),
        }
    }
}
