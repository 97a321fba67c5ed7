//! Moves all records of a PKI between its file and etcd, while no server runs: whole, counted and compared, or not at all.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, ensure};
use data_encoding::HEXLOWER;
use meshd_identity::{TrustDomain, sha256};

use super::backups::{Backups, stamp};
use super::heal::{Fetched, check_file, keep_list, put_aside};
use super::restored::Restored;
use crate::audit::{Audit, Event};
use crate::authority::new_id;
use crate::keys::Kek;
use crate::rotation::Trust;
use crate::state_dir::{StateDir, alone, kek_path, lock, prepare_dir};
use crate::store::etcd::config::EtcdConfig;
use crate::store::etcd::transfer::{Record, Transfer};
use crate::store::{self, Database, DbError, intermediates, replicas, servers, settings, tokens};
use crate::times::unix;

pub(crate) type All = Vec<Record>;

const CHANGED: &str = "a server has started, or a command has changed something in etcd, meanwhile; nothing was done, try \
                       again";

/// What was moved.
#[derive(Debug, PartialEq, Eq)]
pub struct Moved {
    pub records: usize,
    pub sha256: String,
}

fn sum_up(records: &All) -> Moved {
    let mut text = Vec::new();
    for (key, value) in records {
        text.extend_from_slice(&sha256(key.as_bytes()));
        text.extend_from_slice(&sha256(value));
    }
    Moved { records: records.len(), sha256: HEXLOWER.encode(&sha256(&text)) }
}

pub(crate) fn records_of(path: &Path) -> Result<All, DbError> {
    check_file(path)?;
    Database::open_file(path)?.read(|view| view.list(""))
}

/// The file's records into etcd, which from then on is what the state directory uses.
pub fn to_etcd(dir: &Path, mut config: EtcdConfig, now: SystemTime) -> anyhow::Result<Moved> {
    let _running = lock(dir)?;
    ensure!(EtcdConfig::read(dir)?.is_none(), "{} is in etcd already", dir.display());
    config.trust_domain = StateDir::open(dir)?.trust_domain.to_string();
    let _alone = alone(dir)?;
    let path = dir.join("pki.db");
    let mut records = records_of(&path)?;
    config.replica = new_id()?[..8].to_owned();
    // No server runs, so nothing signs; each makes an intermediate of its own when it starts.
    intermediates::retire_all(&mut records, unix(now))?;
    forget_servers(&mut records);
    let moved = fill(&Transfer::new(&config)?, &records)?;
    config.write(dir)?;
    put_aside(dir, "migrated", now)?;
    note(dir, now, "migrate", format!("{} records to etcd, sha256 {}", moved.records, moved.sha256))?;
    Ok(moved)
}

/// They have other names where the records go.
fn forget_servers(records: &mut All) {
    records.retain(|(key, _)| !key.starts_with(replicas::PREFIX) && !key.starts_with(servers::PREFIX));
}

/// Uploads, and reads back what arrived.
fn fill(etcd: &Transfer, records: &All) -> anyhow::Result<Moved> {
    etcd.upload(records)?;
    let (sent, found) = (sum_up(records), sum_up(&etcd.records()?));
    if sent != found {
        etcd.clear()?;
        anyhow::bail!(
            "etcd holds {} records (sha256 {}) where {} (sha256 {}) were sent; they were removed, try again",
            found.records,
            found.sha256,
            sent.records,
            sent.sha256
        );
    }
    Ok(sent)
}

/// etcd's records into the file, and out of etcd.
pub fn to_sqlite(dir: &Path, now: SystemTime) -> anyhow::Result<Moved> {
    let _running = lock(dir)?;
    let _alone = alone(dir)?;
    let config = EtcdConfig::read(dir)?.with_context(|| format!("{} is not in etcd", dir.display()))?;
    let etcd = Transfer::new(&config)?;
    let (mut records, revision) = etcd.records_at()?;
    refuse_while_running(&etcd)?;
    ensure!(
        records.iter().any(|(key, _)| key == "trust"),
        "etcd holds no whole PKI; if {} is there, a move was cut short: take {} away. Otherwise restore a backup into \
         etcd first: `meshd-pki restore`",
        dir.join("pki.db").display(),
        EtcdConfig::path(dir).display()
    );
    intermediates::retire_all(&mut records, unix(now))?;
    forget_servers(&mut records);
    settings::mark_backed_up(&mut records, &Backups::new(dir).mark(now)?)?;
    let partial = dir.join("pki.partial");
    _ = fs::remove_file(&partial);
    store::write_copy(&partial, &records)?;
    let (sent, found) = (sum_up(&records), sum_up(&records_of(&partial)?));
    ensure!(sent == found, "{} is not what etcd holds; try again", partial.display());
    fs::File::open(&partial)?.sync_all()?;
    // What a move to etcd left that was cut short: its log would be applied to the new file.
    if dir.join("pki.db").exists() || dir.join("pki.db-wal").exists() {
        put_aside(dir, "replaced", now)?;
    }
    fs::rename(&partial, dir.join("pki.db"))?;
    // From here on it is the only one: it has to be found after a power cut, too.
    fs::File::open(dir)?.sync_all()?;
    if !etcd.close(revision)? {
        fs::remove_file(dir.join("pki.db"))?;
        anyhow::bail!(CHANGED);
    }
    fs::rename(EtcdConfig::path(dir), dir.join("etcd.toml.migrated"))?;
    fs::File::open(dir)?.sync_all()?;
    etcd.clear()?;
    note(dir, now, "migrate", format!("{} records from etcd, sha256 {}", sent.records, sent.sha256))?;
    Ok(sent)
}

/// A backup in the place of what etcd holds.
pub(crate) fn restore_etcd(
    dir: &Path,
    config: &EtcdConfig,
    fetched: &Fetched,
    now: SystemTime,
) -> anyhow::Result<Restored> {
    let etcd = Transfer::new(config)?;
    let mut records = records_of(fetched.path())?;
    intermediates::retire_all(&mut records, unix(now))?;
    settings::mark_backed_up(&mut records, &Backups::new(dir).mark(now)?)?;
    tokens::end_all(&mut records, unix(now))?;
    let (before, revision) = etcd.records_at()?;
    refuse_while_running(&etcd)?;
    let aside = dir.join(format!("damaged-{}", stamp(now)));
    DirBuilder::new().recursive(true).mode(0o700).create(&aside)?;
    if !before.is_empty() {
        store::write_copy(&aside.join("pki.db"), &before)?;
        fs::File::open(aside.join("pki.db"))?.sync_all()?;
    }
    keep_list(dir, &aside)?;
    for entries in [aside.as_path(), dir] {
        fs::File::open(entries)?.sync_all()?;
    }
    let restored = Restored {
        at: unix(now),
        backup: fetched.from.clone(),
        reason: "the operator asked for it".to_owned(),
        put_aside: aside,
        published: false,
        seen: false,
    };
    ensure!(etcd.close(revision)?, CHANGED);
    restored.write(dir)?;
    etcd.clear()?;
    fill(&etcd, &records)?;
    Ok(restored)
}

/// Makes a state directory for one more server of a PKI in etcd. The wrapping key must be there already.
pub fn init_replica(dir: &Path, domain: &TrustDomain, mut config: EtcdConfig) -> anyhow::Result<String> {
    prepare_dir(dir)?;
    ensure!(
        EtcdConfig::read(dir)?.is_none() && !dir.join("pki.db").exists(),
        "{} already holds a PKI; choose an empty directory",
        dir.display()
    );
    config.trust_domain = domain.to_string();
    config.replica = new_id()?[..8].to_owned();
    let path = kek_path(dir);
    ensure!(
        path.exists(),
        "the wrapping key is missing; copy `kek` of another replica to {}, 0600, by a way nobody else reads",
        path.display()
    );
    let kek = Kek::load(&path)?;
    let records = Transfer::new(&config)?.records()?;
    let trust = records.iter().find(|(key, _)| key == "trust");
    let (_, trust) = trust.with_context(|| format!("etcd holds no PKI of {domain}; see `meshd-pki migrate`"))?;
    let trust: Trust = serde_json::from_slice(trust)?;
    for root in trust.roots.iter().filter(|root| !root.wrapped_key.is_empty()) {
        kek.unwrap(&root.id, &root.wrapped_key)?;
    }
    config.write(dir)?;
    Ok(config.replica)
}

/// Takes a server that will not come back off the record: rotation waits for it no longer.
pub fn remove_replica(dir: &Path, id: &str, now: SystemTime) -> anyhow::Result<()> {
    let state = StateDir::open(dir)?;
    let running = state.database.engine().live_replicas();
    ensure!(!running.iter().any(|one| one == id), "replica {id} runs; stop it first");
    state.database.transaction(|records| -> anyhow::Result<()> {
        ensure!(replicas::forget(records, id)?, "there is no replica {id}; see `meshd-pki replica list`");
        intermediates::retire(records, id, unix(now))?;
        Ok(servers::forget(records, id)?)
    })?;
    note(dir, now, "replica_remove", id.to_owned())
}

fn refuse_while_running(etcd: &Transfer) -> anyhow::Result<()> {
    let live = etcd.live()?;
    ensure!(
        live.is_empty(),
        "replicas run: {}; stop them first (one that was killed counts until its lease ends)",
        live.join(", ")
    );
    Ok(())
}

pub(super) fn note(dir: &Path, now: SystemTime, event: &'static str, detail: String) -> anyhow::Result<()> {
    let event = Event { event, result: "ok", detail: Some(detail), ..Event::default() };
    Ok(Audit::new(dir.join("audit.jsonl")).append(unix(now), &[event])?)
}
