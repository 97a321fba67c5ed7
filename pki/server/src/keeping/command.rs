//! Backups, as the command line makes, shows and uses them.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::backups::{Backup, Backups};
use super::heal::{check_file, last_written, put_in_place};
use super::moving;
use super::restored::Restored;
use crate::audit::{Audit, Event};
use crate::commands::CommandError;
use crate::state_dir::{StateDir, StateError, lock};
use crate::store::etcd::config::EtcdConfig;
use crate::times::unix;

pub fn create(dir: &Path, now: SystemTime) -> Result<Backup, CommandError> {
    let state = StateDir::open(dir)?;
    state.check()?;
    Ok(Backups::new(dir).create(&state.database, now, false).map_err(StateError::from)?)
}

/// What there is, newest first, and whether each is whole.
pub fn list(dir: &Path) -> Result<Vec<(Backup, String)>, CommandError> {
    let backups = Backups::new(dir).list().map_err(StateError::from)?;
    let judged = |backup: Backup| {
        let state = check_file(&backup.path).map_or_else(|error| error.to_string(), |()| "whole".to_owned());
        (backup, state)
    };
    Ok(backups.into_iter().map(judged).collect())
}

/// Puts a backup in place and says which.
pub fn restore(dir: &Path, from: Option<&Path>, now: SystemTime) -> anyhow::Result<PathBuf> {
    let _running = lock(dir)?;
    let listed = Backups::new(dir).by_age(last_written(dir, now))?;
    let backup = match from {
        Some(from) => {
            let known = listed.into_iter().find(|backup| Path::new(&backup.name()) == from);
            known.unwrap_or_else(|| Backup { path: from.to_owned(), bytes: 0 })
        }
        None => listed.into_iter().find(|backup| check_file(&backup.path).is_ok()).ok_or_else(|| {
            anyhow::anyhow!("{} has no backup that is whole; give one with --from FILE", dir.join("backups").display())
        })?,
    };
    anyhow::ensure!(backup.path.exists(), "{}: no such backup; see `meshd-pki backup list`", backup.path.display());
    check_file(&backup.path)?;
    let restored = match EtcdConfig::read(dir)? {
        Some(config) => moving::restore_etcd(dir, &config, &backup.path, now)?,
        None => put_in_place(dir, &backup, "the operator asked for it".to_owned(), now)?,
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

fn note(dir: &Path, now: SystemTime, event: &'static str, detail: String) -> anyhow::Result<()> {
    let event = Event { event, result: "ok", detail: Some(detail), ..Event::default() };
    Ok(Audit::new(dir.join("audit.jsonl")).append(unix(now), &[event])?)
}
