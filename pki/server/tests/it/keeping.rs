//! What hosts see, and do not see, when the PKI's database is damaged or goes back in time.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::SeqCst;

use meshd_pki::adoption::{Adopt, adopt};
use meshd_pki::keeping::command::{acknowledge, create, list, restore};
use meshd_pki::state_dir::init;
use meshd_pki::times::unix_ms;
use meshd_pki::{Options, Pki};
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::{HostBan, HostEvict};
use meshd_pki_api::v1;

use proptest::prelude::*;
use tempfile::TempDir;

use crate::operation::{Desk, chain_of};
use crate::records::copy;
use crate::support::workload;

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;
const WEEK: std::time::Duration = std::time::Duration::from_secs(7 * DAY);

fn backups(desk: &Desk) -> Vec<PathBuf> {
    let found = fs::read_dir(desk.dir.path().join("backups")).unwrap();
    let mut found: Vec<PathBuf> = found.map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

fn roots(desk: &Desk) -> Vec<(String, String)> {
    let authorities = desk.status().authorities.into_iter();
    authorities.filter(|one| one.kind == "root").map(|one| (one.id, one.state)).collect()
}

/// Where the database is that a backup replaced.
fn aside(desk: &Desk) -> PathBuf {
    let found = fs::read_dir(desk.dir()).unwrap().map(|entry| entry.unwrap().path());
    found.into_iter().find(|path| path.to_str().unwrap().contains("damaged-")).unwrap()
}

/// Stops the PKI without any other sign.
fn stop(desk: &mut Desk) {
    desk.pki = None;
}

pub(crate) fn spoil(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let from = bytes.len().min(4096);
    bytes[from..].fill(0xa5);
    fs::write(path, bytes).unwrap();
}

fn renew_with(desk: &Desk, certificate: &[u8], sequence: u64) -> v1::IssueBatchReply {
    let request = v1::IssueBatchRequest { bundle_sequence: sequence, ..desk.renewal("web") };
    desk.pki().issue_batch(Some(certificate), &request, "test").unwrap()
}

#[test]
fn backups_are_made_every_hour_and_after_each_step_of_an_authority() {
    let desk = Desk::new();
    assert_eq!(backups(&desk).len(), 1);
    desk.pass(60);
    assert_eq!(backups(&desk).len(), 1, "nothing changed");
    desk.pass(HOUR + 1);
    assert_eq!(backups(&desk).len(), 2);
    let prepared = |desk: &Desk| roots(desk).len() == 2;
    desk.pass(7 * DAY - HOUR - 100);
    let before = backups(&desk).len();
    assert!(!prepared(&desk));
    desk.pass(100);
    assert!(prepared(&desk));
    assert_eq!(backups(&desk).len(), before + 1);
    create(desk.dir.path(), desk.now() + std::time::Duration::from_secs(1)).unwrap();
    assert_eq!(backups(&desk).len(), before + 2);
    assert!(desk.pki().metrics.encode().contains("meshd_pki_backup_failures_total 0"));
}

#[test]
fn a_start_with_a_clock_that_is_ahead_neither_multiplies_backups_nor_is_restored_from() {
    let mut desk = Desk::new();
    desk.pass(10);
    desk.ahead.store(2 * DAY, SeqCst);
    desk.open();
    desk.ahead.store(0, SeqCst);
    desk.open();
    let before = backups(&desk).len();
    assert!(before > 1, "one is of the wrong clock");
    for _ in 0..3 {
        desk.pass(10);
    }
    assert_eq!(backups(&desk).len(), before);
    let chain = desk.enrol("web");
    desk.pass(HOUR);
    assert_eq!(backups(&desk).len(), before + 1);
    stop(&mut desk);
    spoil(&desk.dir.path().join("pki.db"));
    desk.passed.fetch_add(5, SeqCst);
    desk.open();
    chain_of(renew_with(&desk, &chain[0], 0));
}

#[test]
fn a_backup_that_failed_is_tried_again_after_minutes() {
    let desk = Desk::new();
    let place = desk.dir.path().join("backups");
    fs::remove_dir_all(&place).unwrap();
    fs::write(&place, "").unwrap();
    desk.pass(HOUR + 1);
    for _ in 0..3 {
        desk.pass(10);
    }
    assert!(desk.metrics().contains("meshd_pki_backup_failures_total 1\n"), "{}", desk.metrics());
    fs::remove_file(&place).unwrap();
    desk.pass(240);
    assert!(!place.exists());
    desk.pass(30);
    assert_eq!(backups(&desk).len(), 1);
}

#[test]
fn a_damaged_database_comes_back_by_itself_and_hosts_renew_with_an_alarm_for_the_operator() {
    let mut desk = Desk::new();
    let chain = desk.enrol("web");
    create(desk.dir.path(), desk.now()).unwrap();
    let sequence = desk.status().bundle_sequence;
    stop(&mut desk);
    spoil(&desk.dir.path().join("pki.db"));
    desk.passed.fetch_add(5, SeqCst);
    desk.open();
    let reply = renew_with(&desk, &chain[0], sequence);
    let bundle = reply.bundle.clone().unwrap();
    assert!(bundle.sequence > sequence, "no host holds a newer bundle");
    chain_of(reply);
    let alarm = |desk: &Desk| desk.status().problems.iter().any(|problem| problem.contains("restored at"));
    assert!(alarm(&desk), "{:?}", desk.status().problems);
    assert!(!desk.pki().metrics.encode().contains("meshd_pki_restored_timestamp_seconds 0"));
    let log = fs::read_to_string(desk.dir.path().join("audit.jsonl")).unwrap();
    assert!(log.contains("\"event\":\"restore\",\"result\":\"alarm\""), "{log}");
    assert!(acknowledge(desk.dir.path(), desk.now()).unwrap());
    assert!(!alarm(&desk) && !acknowledge(desk.dir.path(), desk.now()).unwrap());
    let again = desk.status().bundle_sequence;
    desk.open();
    assert_eq!(desk.status().bundle_sequence, again, "it is published anew once");
}

#[test]
fn hosts_enrolled_after_the_backup_come_back_by_the_list_that_was_put_aside() {
    let mut desk = Desk::new();
    desk.pass(60);
    let chain = desk.enrol("late");
    desk.pass(60);
    stop(&mut desk);
    spoil(&desk.dir.path().join("pki.db"));
    desk.passed.fetch_add(5, SeqCst);
    desk.open();
    assert!(desk.renew("late", Some(&chain[0])).is_err(), "the backup knows it");
    let asked = Adopt { roster: &aside(&desk).join("hosts.json"), within: WEEK, without_roots: false };
    assert_eq!(adopt(desk.dir.path(), &asked, desk.now()).unwrap().hosts, 1);
    desk.pki().refresh().unwrap();
    chain_of(desk.renew("late", Some(&chain[0])).unwrap());
}

#[test]
fn a_token_that_a_backup_brings_back_lets_nobody_in() {
    let mut desk = Desk::new();
    let token = desk.token("db", &[]).unwrap();
    create(desk.dir(), desk.now()).unwrap();
    stop(&mut desk);
    spoil(&desk.dir().join("pki.db"));
    desk.off_for(5);
    desk.open();
    let refused = desk.enrol_with(&token).unwrap_err().to_string();
    assert!(refused.contains("expired"), "{refused}");
    desk.enrol("db");
}

#[test]
fn a_backup_is_read_without_a_trace_and_put_in_place_as_our_own_of_our_own() {
    let mut desk = Desk::new();
    desk.enrol("web");
    let made = create(desk.dir(), desk.now()).unwrap();
    // Bytes 18 and 19 of a file say that it was opened for a log of changes: 1 is without.
    let untouched = |path: &Path| fs::read(path).unwrap()[18] == 1 && !path.with_extension("db-wal").exists();
    assert!(list(desk.dir()).unwrap().iter().all(|(one, state)| state == "whole" && untouched(&one.path)));
    let elsewhere = desk.dir().join("copy.db");
    fs::copy(&made.path, &elsewhere).unwrap();
    fs::set_permissions(&elsewhere, fs::Permissions::from_mode(0o644)).unwrap();
    stop(&mut desk);
    restore(desk.dir(), Some(&elsewhere), desk.now()).unwrap();
    assert!(untouched(&elsewhere));
    assert_eq!(fs::metadata(desk.dir().join("pki.db")).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!desk.dir().join("pki.partial").exists());

    let other = tempfile::tempdir().unwrap();
    init(other.path(), &"other.example.org".parse().unwrap(), None, desk.now()).unwrap();
    let foreign = create(other.path(), desk.now()).unwrap();
    let refused = restore(desk.dir(), Some(&foreign.path), desk.now()).unwrap_err().to_string();
    assert!(refused.contains("of the trust domain `other.example.org`"), "{refused}");
    desk.open();
    assert_eq!(desk.status().hosts.len(), 1);
}

#[test]
fn who_was_shut_out_after_the_backup_that_is_in_use_is_shut_out_again_by_the_list() {
    let mut desk = Desk::new();
    let (web, db) = (desk.enrol("web"), desk.enrol("db"));
    let chain = desk.enrol("cache");
    desk.pass(10);
    let older = create(desk.dir(), desk.now()).unwrap();
    desk.done(Command::HostBan(HostBan { host: "db".to_owned(), reason: String::new() }));
    desk.done(Command::HostEvict(HostEvict { host: "web".to_owned(), reason: String::new() }));
    desk.pass(10);
    stop(&mut desk);
    restore(desk.dir(), Some(&older.path), desk.now()).unwrap();
    desk.open();
    chain_of(desk.renew("web", Some(&web[0])).unwrap());
    let asked = Adopt { roster: &aside(&desk).join("hosts.json"), within: WEEK, without_roots: false };
    let adopted = adopt(desk.dir(), &asked, desk.now()).unwrap();
    assert_eq!((adopted.shut_out, adopted.hosts, adopted.list.is_ours), (vec!["db".into(), "web".into()], 0, true));
    assert!(desk.renew("web", Some(&web[0])).unwrap_err().to_string().contains("was evicted"));
    assert!(desk.renew("db", Some(&db[0])).unwrap_err().to_string().contains("is banned"));
    chain_of(desk.renew("cache", Some(&chain[0])).unwrap());
    assert_eq!(adopt(desk.dir(), &asked, desk.now()).unwrap().shut_out, Vec::<String>::new());
    let log = fs::read_to_string(desk.dir().join("audit.jsonl")).unwrap();
    assert!(log.contains("\"event\":\"host_ban\"") && log.contains("by a list with sha256"), "{log}");
}

#[test]
fn a_log_of_changes_that_lost_its_end_makes_the_pki_forget_no_authority() {
    let mut desk = Desk::new();
    let chain = desk.enrol("web");
    let database = desk.dir.path().join("pki.db");
    // What a crash and a truncated log leave: the state of an earlier time, whole in itself.
    let before = fs::read(&database).unwrap();
    let log = fs::read(desk.dir.path().join("pki.db-wal")).unwrap();
    desk.pass(7 * DAY);
    desk.pass(HOUR);
    let known = (roots(&desk), desk.status().bundle_sequence);
    assert_eq!(known.0.len(), 2);
    stop(&mut desk);
    fs::write(&database, before).unwrap();
    fs::write(desk.dir.path().join("pki.db-wal"), &log[..log.len() * 9 / 10]).unwrap();
    fs::remove_dir_all(desk.dir.path().join("backups")).unwrap();
    desk.open();
    assert_eq!((roots(&desk), desk.status().bundle_sequence), known);
    assert!(desk.pki().issue_batch(Some(&chain[0]), &desk.renewal("web"), "test").is_err(), "it ended days ago");
    let log = fs::read_to_string(desk.dir.path().join("audit.jsonl")).unwrap();
    assert!(log.contains("authority_recall"), "{log}");
}

#[test]
fn after_a_restore_of_an_older_backup_sequences_and_roots_go_on_from_where_they_were() {
    let mut desk = Desk::new();
    desk.enrol("web");
    let old = create(desk.dir.path(), desk.now()).unwrap();
    // A whole rotation later, the first root is old and the second signs.
    desk.pass(7 * DAY);
    for _ in 0..9 {
        desk.pass(6 * HOUR);
    }
    let known = roots(&desk);
    assert_eq!(known.iter().map(|(_, state)| state.as_str()).collect::<Vec<_>>(), ["old", "active"]);
    let sequence = desk.status().bundle_sequence;
    let chain = desk.enrol("late");
    let refused = restore(desk.dir.path(), Some(&old.path), desk.now()).unwrap_err();
    assert!(refused.to_string().contains("another meshd-pki runs"), "{refused}");
    stop(&mut desk);
    restore(desk.dir.path(), Some(Path::new(&old.name())), desk.now()).unwrap();
    desk.open();
    assert_eq!(roots(&desk), known, "no root that signed is forgotten");
    assert!(desk.status().bundle_sequence > sequence);
    assert_eq!(desk.enrol("web")[1], chain[1], "the intermediate in use is not forgotten either");
}

#[test]
fn hosts_ahead_of_a_backup_put_into_an_empty_directory_are_caught_up_with() {
    let mut desk = Desk::new();
    let chain = desk.enrol("web");
    let old = create(desk.dir.path(), desk.now()).unwrap();
    stop(&mut desk);
    let elsewhere = desk.dir.path().join("old.db");
    fs::rename(&old.path, &elsewhere).unwrap();
    for file in ["pki.db", "pki.db-wal", "pki.db-shm", "authorities.json"] {
        _ = fs::remove_file(desk.dir.path().join(file));
    }
    fs::remove_dir_all(desk.dir.path().join("backups")).unwrap();
    restore(desk.dir.path(), Some(&elsewhere), desk.now()).unwrap();
    desk.open();
    // This PKI's clock was once ahead, by less than the skew that is forgiven.
    let ahead = desk.status().bundle_sequence + 60_000;
    renew_with(&desk, &chain[0], ahead);
    assert_eq!(desk.status().bundle_sequence, ahead + 1);
    renew_with(&desk, &chain[0], ahead + 10 * DAY * 1000);
    assert_eq!(desk.status().bundle_sequence, ahead + 1, "nobody pushes the sequence into the far future");
    assert!(desk.pki().metrics.encode().contains("meshd_pki_hosts_ahead_total 1"));
    desk.pass(HOUR);
    renew_with(&desk, &chain[0], unix_ms(desk.now()));
    assert_eq!(desk.status().bundle_sequence, ahead + 1, "what came after the restore this PKI has published itself");
}

/// A PKI as a power cut leaves it: some changes in the backup, some in the file, some in its log only.
struct Cut {
    dir: TempDir,
    desk: Desk,
    chain: Vec<Vec<u8>>,
    sequence: u64,
}

#[derive(Debug, Clone, Copy)]
enum Damage {
    Page,
    Bytes,
    LogBytes,
    ShorterLog,
    ShorterFile,
}

impl Cut {
    fn new() -> Cut {
        let desk = Desk::new();
        desk.pass(7 * DAY);
        let chain = desk.enrol("web");
        desk.off_for(60);
        create(desk.dir(), desk.now()).unwrap();
        for n in 0..20 {
            desk.enrol(&format!("host-{n}"));
        }
        let id = workload("web").to_string();
        meshd_pki::commands::add_entry(desk.dir(), "web", &id, desk.now()).unwrap();
        desk.pass(60);
        let dir = tempfile::tempdir().unwrap();
        copy(desk.dir(), dir.path());
        copy(&desk.dir().join("backups"), &dir.path().join("backups"));
        let sequence = desk.status().bundle_sequence;
        Cut { dir, desk, chain, sequence }
    }

    fn damaged(&self, damage: &[(Damage, prop::sample::Index, [u8; 32])]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        copy(self.dir.path(), dir.path());
        copy(&self.dir.path().join("backups"), &dir.path().join("backups"));
        let (file, log) = (dir.path().join("pki.db"), dir.path().join("pki.db-wal"));
        for (kind, place, bytes) in damage {
            let path = if matches!(kind, Damage::LogBytes | Damage::ShorterLog) { &log } else { &file };
            let mut all = fs::read(path).unwrap();
            let at = if all.is_empty() { 0 } else { place.index(all.len()) };
            match kind {
                Damage::Page => {
                    let start = at / 4096 * 4096;
                    all.iter_mut().skip(start).take(4096).zip(bytes.iter().cycle()).for_each(|(to, from)| *to = *from);
                }
                Damage::Bytes | Damage::LogBytes => {
                    all.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
                }
                Damage::ShorterLog | Damage::ShorterFile => all.truncate(at),
            }
            fs::write(path, all).unwrap();
        }
        dir
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    use Damage::{Bytes, LogBytes, Page, ShorterFile, ShorterLog};
    prop::sample::select(vec![Page, Bytes, LogBytes, ShorterLog, ShorterFile])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]
    #[test]
    fn after_a_power_cut_and_any_damage_to_file_and_log_hosts_renew_and_no_sequence_goes_back(
        damage in prop::collection::vec((damage(), any::<prop::sample::Index>(), any::<[u8; 32]>()), 1..4),
    ) {
        thread_local!(static CUT: Cut = Cut::new());
        CUT.with(|cut| {
            let dir = cut.damaged(&damage);
            let now = cut.desk.now() + std::time::Duration::from_secs(10);
            let options = Options::with_clock(cut.desk.lifetimes, std::sync::Arc::new(move || now));
            let pki = Pki::open(dir.path(), options).unwrap();
            let held = v1::IssueBatchRequest { bundle_sequence: cut.sequence, ..cut.desk.renewal("web") };
            let reply = pki.issue_batch(Some(&cut.chain[0]), &held, "test").unwrap();
            prop_assert!(reply.bundle.clone().unwrap().sequence >= cut.sequence);
            chain_of(reply);
            pki.maintain().unwrap();
            Ok(())
        })?;
    }
}
