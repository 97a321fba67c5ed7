//! Backups, as the command line makes, shows and uses them.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::backups::{Backup, Backups};
use super::heal::{Fetched, check_copy, fetch, is_usable, last_written, put_in_place};
use super::moving::{self, note};
use super::restored::Restored;
use super::roster::Roster;
use crate::commands::CommandError;
use crate::state_dir::{StateDir, StateError, alone, lock};
use crate::store::etcd::config::EtcdConfig;
use crate::store::{Database, settings};

pub fn create(dir: &Path, now: SystemTime) -> Result<Backup, CommandError> {
    let state = StateDir::open(dir)?;
    state.check()?;
    Ok(Backups::new(dir).create(&state.database, now, false).map_err(StateError::from)?)
}

/// What there is, newest first, and whether each is whole.
pub fn list(dir: &Path) -> Result<Vec<(Backup, String)>, CommandError> {
    let backups = Backups::new(dir).list().map_err(StateError::from)?;
    let judged = |backup: Backup| {
        let state = check_copy(&backup.path).map_or_else(|error| error.to_string(), |()| "whole".to_owned());
        (backup, state)
    };
    Ok(backups.into_iter().map(judged).collect())
}

/// Puts a backup in place and says which.
pub fn restore(dir: &Path, from: Option<&Path>, now: SystemTime) -> anyhow::Result<PathBuf> {
    let _running = lock(dir)?;
    let _alone = alone(dir)?;
    let listed = Backups::new(dir).by_age(last_written(dir, now))?;
    let backup = match from {
        Some(from) => {
            let known = listed.into_iter().find(|backup| Path::new(&backup.name()) == from);
            known.unwrap_or_else(|| Backup { path: from.to_owned(), bytes: 0 })
        }
        None => listed.into_iter().find(|backup| is_usable(&backup.path)).ok_or_else(|| {
            anyhow::anyhow!("{} has no backup that is whole; give one with --from FILE", dir.join("backups").display())
        })?,
    };
    anyhow::ensure!(backup.path.exists(), "{}: no such backup; see `meshd-pki backup list`", backup.path.display());
    let config = EtcdConfig::read(dir)?;
    let fetched = fetch(dir, &backup.path)?;
    refuse_another_domain(dir, config.as_ref(), &fetched)?;
    let restored = match config {
        Some(config) => moving::restore_etcd(dir, &config, &fetched, now)?,
        None => put_in_place(dir, &fetched, "the operator asked for it".to_owned(), now)?,
    };
    note(dir, now, "restore", restored.problem())?;
    Ok(backup.path)
}

/// Whether there was an alarm.
pub fn acknowledge(dir: &Path, now: SystemTime) -> anyhow::Result<bool> {
    let Some(restored) = Restored::read(dir).filter(|restored| !restored.seen) else { return Ok(false) };
    let detail = restored.problem();
    Restored { seen: true, ..restored }.write(dir)?;
    note(dir, now, "restore_seen", detail)?;
    Ok(true)
}

/// As far as the state directory tells which PKI it was.
fn refuse_another_domain(dir: &Path, config: Option<&EtcdConfig>, fetched: &Fetched) -> anyhow::Result<()> {
    let domain_in = |path: &Path| Database::open_file(path)?.read(settings::trust_domain);
    let ours = match config {
        Some(config) => Some(config.trust_domain.parse()?),
        None => {
            domain_in(&dir.join("pki.db")).ok().flatten().or_else(|| Roster::read(dir).map(|list| list.trust_domain))
        }
    };
    let Some(theirs) = domain_in(fetched.path())? else { return Ok(()) };
    anyhow::ensure!(
        ours.as_ref().is_none_or(|ours| *ours == theirs),
        "{} is a backup of the trust domain `{theirs}`, not of this PKI",
        fetched.from.display()
    );
    Ok(())
}
