use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, SystemTime};

use meshd_identity::statements::{Denied, Whom};
use tempfile::TempDir;

use super::*;
use crate::admin::key_sha256;
use crate::authority::Authority;
use crate::lifetimes::Lifetimes;
use crate::pki::Options;
use crate::rotation::bridge::Bridge;
use crate::rotation::{Root, RootState};
use crate::store::hosts::Host;
use crate::store::tokens::Token;
use crate::times::from_unix;

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

/// A PKI whose two clocks the test turns.
struct Bench {
    dir: TempDir,
    pki: Option<Pki>,
    wall: Arc<AtomicU64>,
    boot: Arc<AtomicU64>,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let wall = Arc::new(AtomicU64::new(1_790_000_000));
        let domain = "prod.example.org".parse().unwrap();
        crate::state_dir::init(dir.path(), &domain, None, from_unix(1_790_000_000)).unwrap();
        let mut bench = Bench { dir, pki: None, wall, boot: Arc::default() };
        bench.open();
        bench
    }

    fn open(&mut self) {
        self.pki = None;
        let (wall, boot) = (self.wall.clone(), self.boot.clone());
        let options = Options {
            lifetimes: Lifetimes::default(),
            clock: Arc::new(move || SystemTime::UNIX_EPOCH + Duration::from_secs(wall.load(SeqCst))),
            boot_time: Arc::new(move || Duration::from_secs(boot.load(SeqCst))),
            ..Options::default()
        };
        self.pki = Some(Pki::open(self.dir.path(), options).unwrap());
    }

    fn pki(&self) -> &Pki {
        self.pki.as_ref().unwrap()
    }

    fn now(&self) -> i64 {
        i64::try_from(self.wall.load(SeqCst)).unwrap()
    }

    fn pass(&self, seconds: u64) {
        self.boot.fetch_add(seconds, SeqCst);
        self.jump(seconds);
    }

    /// The wall clock alone goes on.
    fn jump(&self, seconds: u64) {
        self.wall.fetch_add(seconds, SeqCst);
        self.pki().maintain().unwrap();
    }

    fn deny(&self, serial: &str, until: i64) {
        self.deny_whom(Whom::Serial(serial.to_owned()), until);
    }

    fn deny_whom(&self, whom: Whom, until: i64) {
        let denied = Denied { whom, until };
        let floor = Floor::new(&self.pki().state).get();
        let now_ms = unix_ms(from_unix(self.now()));
        let change =
            |records: &mut dyn Records| deny::change(records, floor, now_ms, |entries| entries.push(denied.clone()));
        self.pki().state.database.transaction(change).unwrap();
        self.pki().refresh().unwrap();
    }

    fn denied(&self) -> Vec<String> {
        let set = self.pki().state.database.read(deny::deny).unwrap();
        let serial = |one: Denied| match one.whom {
            Whom::Serial(serial) => serial,
            other => panic!("{other:?}"),
        };
        set.entries.into_iter().map(serial).collect()
    }

    /// What a backup of the database taken before the first denial has.
    fn lose_the_set(&self) {
        let forget = |records: &mut dyn Records| records.delete("deny");
        assert!(self.pki().state.database.transaction(forget).unwrap());
        self.pki().refresh().unwrap();
        assert!(self.pki().deny().is_behind);
    }

    fn taint_active(&self) {
        let now = self.now();
        let taint = |records: &mut dyn Records| {
            let mut trust = trust::trust(records)?;
            trust.roots.iter_mut().for_each(|root| root.tainted_at = Some(now));
            trust::put_trust(records, &trust)
        };
        self.pki().state.database.transaction(taint).unwrap();
    }

    /// An old root that is tainted, and vouched for by the active one for a month; returns its key.
    fn add_bridged(&self) -> String {
        let (now, at) = (self.now(), from_unix(self.now()));
        let made = Authority::new_root(&self.pki().trust_domain, &Lifetimes::default(), at).unwrap();
        let key = key_sha256(&made.certificate);
        let add = |records: &mut dyn Records| {
            let mut trust = trust::trust(records)?;
            let by = trust.roots[0].clone();
            let bridge = Bridge { by: by.id.clone(), certificate: vec![], not_after: now + 31 * 86_400 };
            let (id, certificate) = (made.id.clone(), made.certificate.clone());
            let (state, tainted_at, bridge) = (RootState::Old, Some(now), Some(bridge));
            trust.roots.push(Root { id, certificate, state, tainted_at, bridge, wrapped_key: vec![], ..by });
            trust::put_trust(records, &trust)
        };
        self.pki().state.database.transaction(add).unwrap();
        key
    }

    /// Active, with a token by which it could join again.
    fn enrol(&self, name: &str) {
        let now = self.now();
        let host = Host {
            id: name.to_owned(),
            state: HostState::Active,
            key_current: vec![1],
            public_key: Vec::new(),
            enrolled_key: Vec::new(),
            next: None,
            enrolled_at: now,
            last_seen: now,
            acked_sequence: 0,
            clock_offset_ms: 0,
            roots_in_use: Vec::new(),
            enrolled_by: String::new(),
            labels: BTreeMap::new(),
            adopted_until: None,
            unrecorded_until: None,
        };
        let token = Token {
            id: name.to_owned(),
            secret_hash: vec![2],
            host_id: name.to_owned(),
            allow: Vec::new(),
            created_at: now,
            expires_at: now + 3600,
            used: None,
            max_uses: 1,
            uses: 0,
            from: Vec::new(),
            labels: BTreeMap::new(),
        };
        let enrol = |records: &mut dyn Records| {
            hosts::put_host(records, &host)?;
            tokens::put_token(records, &token)
        };
        self.pki().state.database.transaction(enrol).unwrap();
    }

    /// What it is, and how many tokens there are by which somebody can join.
    fn standing(&self, name: &str) -> (HostState, usize) {
        let look = |view: &mut dyn View| {
            let host = hosts::host(view, name)?.unwrap();
            Ok::<_, DbError>((host.state, tokens::open(view, self.now())?.len()))
        };
        self.pki().state.database.read(look).unwrap()
    }

    fn learnt_lines(&self) -> usize {
        let log = fs::read_to_string(self.dir.path().join("audit.jsonl")).unwrap();
        log.lines().filter(|line| line.contains("deny_learn")).count()
    }
}

#[test]
fn a_wrong_clock_ends_no_denial_and_a_good_one_does() {
    let bench = Bench::new();
    bench.deny("aa", bench.now() + 3600);
    bench.jump(2 * HOUR);
    assert!(bench.pki().distrust().is_some());
    assert_eq!(bench.denied(), ["aa"]);
    bench.wall.fetch_sub(2 * HOUR, SeqCst);
    bench.pass(2 * HOUR);
    assert_eq!(bench.pki().distrust(), None);
    assert!(bench.denied().is_empty());
}

#[test]
fn a_restored_backup_neither_prunes_over_the_hosts_newer_set_nor_stays_behind_it() {
    let bench = Bench::new();
    bench.deny("aa", bench.now() + 3600);
    let newer = bench.pki().deny();
    bench.lose_the_set();
    let outdated = Deny { sequence: 7, entries: vec![Denied { whom: Whom::Serial("bb".to_owned()), until: 1 }] };
    let restore = |records: &mut dyn Records| crate::store::put(records, "deny", &outdated);
    bench.pki().state.database.transaction(restore).unwrap();
    bench.pass(60);
    assert_eq!(bench.denied(), ["bb"], "what has ended waits for the newer set");
    assert!(bench.pki().deny().is_behind);
    bench.pki().learn_deny(&newer.jws).unwrap();
    let known = bench.pki().deny();
    assert!(!known.is_behind && known.sequence > newer.sequence);
    bench.pass(60);
    assert_eq!(bench.denied(), ["aa"]);
}

#[test]
fn a_root_that_leaves_while_hosts_hold_a_newer_set_is_denied_with_that_set() {
    let bench = Bench::new();
    bench.deny("aa", bench.now() + 3600);
    let newer = bench.pki().deny();
    bench.lose_the_set();
    let key = bench.add_bridged();
    bench.pass(10);
    let trust = bench.pki().state.database.read(trust::trust).unwrap();
    assert!(trust.roots.iter().any(|root| root.tainted_at.is_some() && !root.state.is_in_bundle()));
    assert!(bench.denied().is_empty(), "that would take the place of the newer set");
    bench.pki().learn_deny(&newer.jws).unwrap();
    let set = bench.pki().state.database.read(deny::deny).unwrap();
    let denied: Vec<Whom> = set.entries.into_iter().map(|one| one.whom).collect();
    assert_eq!(denied, [Whom::Serial("aa".to_owned()), Whom::Authority(key)]);
}

#[test]
fn a_newer_set_that_adds_nothing_is_taken_over_once() {
    let bench = Bench::new();
    bench.deny("aa", bench.now() + 3600);
    let older = bench.pki().state.database.read(deny::deny).unwrap();
    bench.deny("bb", bench.now() + 3600);
    let newer = bench.pki().deny();
    let same = Deny { entries: bench.pki().state.database.read(deny::deny).unwrap().entries, ..older };
    let restore = |records: &mut dyn Records| crate::store::put(records, "deny", &same);
    bench.pki().state.database.transaction(restore).unwrap();
    bench.pki().refresh().unwrap();
    assert!(bench.pki().deny().is_behind);
    for _ in 0..3 {
        bench.pki().learn_deny(&newer.jws).unwrap();
    }
    assert!(!bench.pki().deny().is_behind);
    assert_eq!(bench.learnt_lines(), 1);
}

#[test]
fn the_newest_set_there_was_bans_and_one_that_was_superseded_does_not() {
    for is_newest in [true, false] {
        let bench = Bench::new();
        bench.enrol("web");
        let web = SpiffeId::host(&bench.pki().trust_domain, "web").unwrap();
        bench.deny_whom(Whom::Identity(web), bench.now() + 3600);
        let set = bench.pki().deny();
        if !is_newest {
            bench.deny("aa", bench.now() + 3600);
        }
        bench.lose_the_set();
        assert_eq!(bench.standing("web"), (HostState::Active, 1));
        bench.pki().learn_deny(&set.jws).unwrap();
        assert_eq!(bench.learnt_lines(), 1);
        let expected = if is_newest { (HostState::Banned, 0) } else { (HostState::Active, 1) };
        assert_eq!(bench.standing("web"), expected);
    }
}

#[test]
fn a_tainted_root_vouches_for_no_deny_set() {
    let bench = Bench::new();
    bench.deny("aa", bench.now() + 3600);
    let forged = bench.pki().deny();
    bench.lose_the_set();
    bench.taint_active();
    bench.pki().learn_deny(&forged.jws).unwrap();
    assert!(bench.denied().is_empty());
    assert_eq!(bench.learnt_lines(), 0);
}

#[test]
fn the_set_is_signed_anew_by_the_next_root() {
    let bench = Bench::new();
    let year = i64::try_from(365 * DAY).unwrap();
    bench.deny("aa", bench.now() + year);
    let before = bench.pki().deny();
    bench.pass(7 * DAY);
    bench.pass(2 * DAY);
    let trust = bench.pki().state.database.read(trust::trust).unwrap();
    assert_eq!(trust.roots[0].state, RootState::Old);
    let after = bench.pki().deny();
    assert_eq!(after.sequence, before.sequence);
    let key = VerifyingKey::from_certificate(&trust.active().unwrap().certificate).unwrap();
    assert!(signed::verify::<DenySet>(&after.jws, std::slice::from_ref(&key)).is_ok());
    assert!(signed::verify::<DenySet>(&before.jws, &[key]).is_err());
}
