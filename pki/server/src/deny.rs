//! The deny set as hosts get it: signed by the active root, the newest that was ever in force.
//!
//! A database restored from a backup knows an older set than the hosts. So the highest sequence is kept apart from the
//! database; while the set is below it, hosts are asked for theirs, and its own signature on it convinces the PKI.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use meshd_identity::SpiffeId;
use meshd_identity::denial::DenyIndex;
use meshd_identity::signed::{self, VerifyingKey};
use meshd_identity::statements::{DenySet, Whom};

use crate::audit::Event;
use crate::keys::replace_private;
use crate::pki::{Pki, PkiError};
use crate::refused::Refused;
use crate::rotation::step::keys_to_deny;
use crate::service::Peer;
use crate::state_dir::{StateDir, StateError};
use crate::store::deny::{self, Deny, include};
use crate::store::hosts::{self, HostState};
use crate::store::{DbError, Records, View, tokens, trust};
use crate::times::{unix, unix_ms};

/// What one transaction of etcd takes, with their tokens.
const BANNED_AT_ONCE: usize = 20;

/// A deny set ready to be handed out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SignedDeny {
    pub(crate) sequence: u64,
    /// Empty as long as nobody was ever denied.
    pub(crate) jws: String,
    /// The PKI knows that there was a newer one.
    pub(crate) is_behind: bool,
    /// The root that signed it: whoever joins later may know only later ones.
    signer: String,
    /// SPIFFE IDs that nobody is to have now.
    identities: BTreeSet<String>,
    index: DenyIndex,
}

/// The highest sequence of a deny set there ever was, outside the database and its backups.
pub(crate) struct Floor(PathBuf);

impl Floor {
    pub(crate) fn new(state: &StateDir) -> Floor {
        Floor(state.dir().join("deny.floor"))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn get(&self) -> u64 {
        fs::read_to_string(&self.0).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    pub(crate) fn raise(&self, sequence: u64) -> io::Result<()> {
        if self.get() >= sequence {
            return Ok(());
        }
        replace_private(&self.0, format!("{sequence}\n").as_bytes())
    }
}

impl Pki {
    /// Reads the set again and signs it when it changed. Called every second: the command line changes it, too.
    pub(crate) fn refresh_deny(&self) -> Result<(), PkiError> {
        let floor = Floor::new(&self.state);
        let known = self.deny();
        let read = |view: &mut dyn View| Ok::<_, DbError>((deny::deny(view)?, trust::trust(view)?));
        let (set, trust) = self.state.database.read(read).map_err(StateError::from)?;
        let root = trust.speaker().ok_or_else(|| self.state.incomplete("a root whose key is here"))?;
        let is_behind = floor.get() > set.sequence;
        let signer = root.id.clone();
        if (set.sequence, is_behind, &signer) == (known.sequence, known.is_behind, &known.signer) {
            return Ok(());
        }
        floor.raise(set.sequence).map_err(|source| StateError::Io {
            action: "write",
            path: floor.0.clone(),
            source,
        })?;
        let key = self.kek.unwrap(&root.id, &root.wrapped_key).map_err(StateError::from)?;
        let jws = match set.sequence {
            0 => String::new(),
            _ => signed::sign(&key, &set.to_set(&self.trust_domain)).map_err(StateError::from)?,
        };
        let identities = set.entries.iter().filter_map(|one| match &one.whom {
            Whom::Identity(id) => Some(id.to_string()),
            Whom::Serial(_) | Whom::Authority(_) => None,
        });
        let identities = identities.collect();
        let index = DenyIndex::of(&set.to_set(&self.trust_domain));
        self.set_deny(SignedDeny { sequence: set.sequence, jws, is_behind, signer, identities, index });
        Ok(())
    }

    /// A certificate that hosts refuse is refused here, too: its host has to prove anew who it is, and gets another.
    /// Asked with every message, for a connection may be older than a denial.
    pub(crate) fn refuse_denied(&self, peer: &Peer) -> Result<(), Refused> {
        let (Some(_), marks) = (&peer.certificate, &peer.marks) else { return Ok(()) };
        let Some(marks) = marks else {
            return Err(Refused::Unauthenticated("the certificate is of no identity of a mesh".to_owned()));
        };
        if self.deny().index.denies_certificate(marks) {
            let id = &marks.id;
            let why = format!("the certificate of {id} is denied in this mesh; see `meshd-pki deny list` on the PKI");
            return Err(Refused::Unauthenticated(why));
        }
        Ok(())
    }

    /// Why nobody gets this identity now, if it is denied.
    pub(crate) fn denied(&self, spiffe_id: &str) -> Option<String> {
        let is_denied = self.deny().identities.contains(spiffe_id);
        is_denied.then(|| self::is_denied(spiffe_id))
    }

    /// For a host that comes, or comes back: what is on record, which may be newer than what was signed last.
    pub(crate) fn refuse_denied_identity(view: &mut dyn View, id: &SpiffeId) -> Result<(), Refused> {
        if deny::deny(view)?.names_identity(id) {
            return Err(Refused::Forbidden(is_denied(id.as_str())));
        }
        Ok(())
    }

    /// Takes over a newer set than the PKI's own from a host, if this PKI has signed it.
    pub(crate) fn learn_deny(&self, jws: &str) -> Result<(), PkiError> {
        let trust = self.state.database.read(trust::trust).map_err(StateError::from)?;
        let trusted = trust.roots.iter().filter(|root| root.tainted_at.is_none());
        let keys: Vec<VerifyingKey> =
            trusted.filter_map(|root| VerifyingKey::from_certificate(&root.certificate)).collect();
        let Ok(set) = signed::verify::<DenySet>(jws, &keys) else {
            tracing::warn!("a host sent a deny set that this PKI has not signed; it is ignored");
            return Ok(());
        };
        if set.trust_domain != self.trust_domain {
            return Ok(());
        }
        let now = self.now();
        let floor = Floor::new(&self.state).get();
        // An older one than the newest there was may name hosts that were let in again since.
        let named = if set.sequence >= floor { hosts_in(&set) } else { Vec::new() };
        let (first, rest) = named.split_at(named.len().min(BANNED_AT_ONCE));
        let is_learnt = self.state.change(now, |records, told| -> Result<bool, StateError> {
            if deny::deny(records)?.sequence >= set.sequence {
                return Ok(false);
            }
            let floor = floor.max(set.sequence);
            deny::change(records, floor, unix_ms(now), |entries| {
                entries.extend(set.entries.clone());
                // A step that could not change the set while this one was missing.
                keys_to_deny(&trust, &self.lifetimes, unix(now)).into_iter().for_each(|(_, key)| include(entries, key));
            })?;
            let detail = format!("{} entries of a set newer than the database, from a host", set.entries.len());
            told.push(Event { event: "deny_learn", result: "ok", detail: Some(detail), ..Event::default() });
            ban(records, told, first, unix(now))?;
            Ok(true)
        })?;
        if !is_learnt {
            return Ok(());
        }
        self.refresh_deny()?;
        for some in rest.chunks(BANNED_AT_ONCE) {
            self.state
                .change(now, |records, told| -> Result<(), StateError> { Ok(ban(records, told, some, unix(now))?) })?;
        }
        Ok(())
    }

    /// Entries whose last certificate has ended do nothing any more.
    pub(crate) fn prune_deny(&self) -> Result<(), PkiError> {
        if self.deny().is_behind {
            // A higher sequence would take the place of the set that hosts still hold.
            return Ok(());
        }
        let now = self.now();
        let ended = |set: &Deny| set.entries.iter().any(|entry| entry.until < unix(now));
        let any = self.state.database.read(deny::deny).map_err(StateError::from)?;
        if !ended(&any) {
            return Ok(());
        }
        let floor = Floor::new(&self.state).get();
        self.state.database.lead(|records| -> Result<Deny, StateError> {
            Ok(deny::change(records, floor, unix_ms(now), |entries| entries.retain(|one| one.until >= unix(now)))?)
        })?;
        self.refresh_deny()
    }
}

/// Hosts whose own identity is denied.
fn hosts_in(set: &DenySet) -> Vec<&str> {
    let hosts = set.entries.iter().filter_map(|one| match &one.whom {
        Whom::Identity(id) if id.is_system() => Some(id.name()),
        _ => None,
    });
    hosts.collect()
}

/// A host whose own identity is denied was banned after the backup in use; without that the ban would end with the last
/// certificate it had.
fn ban(records: &mut dyn Records, told: &mut Vec<Event>, named: &[&str], now: i64) -> Result<(), DbError> {
    for name in named {
        let known = hosts::host(records, name)?.filter(|known| known.state == HostState::Active);
        let Some(mut known) = known else { continue };
        known.state = HostState::Banned;
        hosts::put_host(records, &known)?;
        tokens::end_those_of(records, name, now)?;
        let (host, detail) =
            (Some(known.id), Some("its identity is in the set that hosts hold, and its tokens have ended".to_owned()));
        told.push(Event { event: "host_ban", result: "ok", host, detail, ..Event::default() });
    }
    Ok(())
}

fn is_denied(spiffe_id: &str) -> String {
    format!("{spiffe_id} is denied in this mesh; see `meshd-pki deny list` on the PKI")
}

#[cfg(test)]
mod tests;
