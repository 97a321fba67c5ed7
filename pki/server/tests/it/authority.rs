//! Roots as an operator sees and hastens them: never past a gate.

use std::sync::Arc;
use std::time::Duration;

use meshd_pki::admin::{Actor, AdminError, Role, run_on};
use meshd_pki::times::unix_ms;
use meshd_pki::{Options, Pki};
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{
    Authorities, AuthorityActivate, AuthorityList, AuthorityPrepare, AuthorityRemove, AuthorityRotate, AuthorityTaint,
    Done,
};
use meshd_pki_api::v1;

use crate::operation::{DAY, Desk, HOUR, chain_of};

const PREPARE: Command = Command::AuthorityPrepare(AuthorityPrepare {});
const ACTIVATE: Command = Command::AuthorityActivate(AuthorityActivate {});
const ROTATE: Command = Command::AuthorityRotate(AuthorityRotate { force: false });
const FORCE: Command = Command::AuthorityRotate(AuthorityRotate { force: true });

fn remove(id: &str) -> Command {
    Command::AuthorityRemove(AuthorityRemove { id: id.to_owned() })
}

pub(crate) fn taint(id: &str) -> Command {
    Command::AuthorityTaint(AuthorityTaint { id: id.to_owned() })
}

impl Desk {
    pub(crate) fn ask(&self, command: Command) -> Result<Reply, AdminError> {
        self.pki().command(&alice(), command)
    }

    pub(crate) fn done(&self, command: Command) -> Done {
        match self.ask(command).unwrap() {
            Reply::Done(done) => done,
            other => panic!("unexpected {other:?}"),
        }
    }

    pub(crate) fn refusal(&self, command: Command) -> String {
        self.ask(command).unwrap_err().to_string()
    }

    pub(crate) fn list(&self) -> Authorities {
        match self.ask(Command::AuthorityList(AuthorityList {})).unwrap() {
            Reply::Authorities(list) => list,
            other => panic!("unexpected {other:?}"),
        }
    }

    pub(crate) fn root(&self, state: &str) -> Option<String> {
        let list = self.list().authorities;
        list.into_iter().find(|one| one.kind == "root" && one.state == state).map(|one| one.id)
    }

    /// The host tells that it holds the bundle in force, and which roots its chains end in.
    pub(crate) fn report(&self, certificate: &[u8], roots: &[&str]) -> v1::SyncReply {
        let inventory = v1::Inventory { roots: roots.iter().map(|root| (*root).to_owned()).collect() };
        let report = v1::SyncRequest {
            instance: "one".to_owned(),
            host_time_unix_ms: unix_ms(self.now()),
            bundle_sequence: self.pki().bundle(&[]).unwrap().sequence,
            inventory: Some(inventory),
            ..v1::SyncRequest::default()
        };
        self.pki().sync_report(Some(certificate), &report, "test").unwrap()
    }

    pub(crate) fn audit_lines(&self, event: &str) -> Vec<serde_json::Value> {
        let log = std::fs::read_to_string(self.dir.path().join("audit.jsonl")).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter(|line| line["event"] == event).collect()
    }
}

pub(crate) fn alice() -> Actor {
    Actor { name: "uid 1000 (alice)".to_owned(), role: Role::Admin }
}

#[test]
fn a_force_ends_with_the_root_it_was_for() {
    let desk = Desk::new();
    desk.enrol("web");
    desk.done(ROTATE);
    let prepared = desk.root("prepared").unwrap();
    desk.ahead.store(HOUR, std::sync::atomic::Ordering::SeqCst);
    desk.pass(10);
    desk.done(FORCE);
    assert_eq!(desk.root("prepared").unwrap(), prepared, "the clock is not believed");
    assert!(desk.list().forced);
    desk.done(taint(&prepared));
    assert!(!desk.list().forced, "the next root would cut off every host");
}

#[test]
fn a_root_that_left_the_bundle_is_nobodys_worry() {
    let desk = Desk::new();
    let mut chain = desk.enrol("web");
    for _ in 0..60 * 3 {
        desk.pass(8 * HOUR);
        chain = chain_of(desk.renew("web", Some(&chain[0])).unwrap());
    }
    assert!(desk.root("retired").is_some());
    let metrics = desk.metrics();
    assert!(metrics.contains("kind=\"root\""));
    for state in ["removed", "retired"] {
        assert!(!metrics.contains(&format!("state=\"{state}\"")), "{metrics}");
    }
}

#[test]
fn a_root_prepared_by_hand_signs_nothing_before_every_gate_is_open() {
    let desk = Desk::new();
    desk.enrol("web");
    let first = desk.root("active").unwrap();
    let done = desk.done(PREPARE);
    let prepared = desk.root("prepared").unwrap();
    assert!(done.what.contains(&prepared), "{done:?}");
    assert!(done.follows[0].contains("old_leaves") && done.follows[0].contains("by itself"), "{done:?}");

    let refused = desk.refusal(ACTIVATE);
    for part in ["old_leaves", "hosts that have not acknowledged", ": web", "it happens by itself, at "] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    assert_eq!(desk.root("active").unwrap(), first, "the refused step was not taken");
    assert!(desk.refusal(PREPARE).contains(&format!("root {prepared} is prepared already")));

    desk.pass(DAY + HOUR);
    assert_eq!(desk.root("active").unwrap(), prepared, "it came by itself");
    assert!(desk.refusal(ACTIVATE).contains("no root is prepared"));

    let prepares = desk.audit_lines("root_prepare");
    assert_eq!(prepares[0]["by"], "uid 1000 (alice)");
    assert_eq!(prepares[1]["result"], "refused");
    let activations = desk.audit_lines("root_activate");
    assert_eq!(activations[0]["result"], "refused");
    assert!(activations[0]["detail"].as_str().unwrap().contains("web"), "{activations:?}");
    assert!(activations[1]["by"].is_null(), "nobody asked for what happens by itself: {activations:?}");
}

#[test]
fn what_a_step_waits_for_is_listed_by_name_with_hosts_and_times() {
    let desk = Desk::new();
    let chain = desk.enrol("web");
    let due = desk.list().next_root;
    assert_eq!(due.iter().map(|gate| gate.name.as_str()).collect::<Vec<_>>(), ["due"]);
    assert!(due[0].until.is_some());
    desk.done(PREPARE);
    let gates = || desk.list().authorities.into_iter().find(|one| one.state == "prepared").unwrap().waits_for;
    let names = |gates: &[meshd_pki_api::admin::Gate]| gates.iter().map(|gate| gate.name.clone()).collect::<Vec<_>>();
    let before = gates();
    assert_eq!(names(&before), ["hosts", "old_leaves", "followers"]);
    assert_eq!(before[0].who, ["web"]);
    assert!(before[0].until.is_some(), "a silent host stops counting");
    desk.report(&chain[0], &[]);
    assert_eq!(names(&gates()), ["old_leaves", "followers"]);
    desk.pass(HOUR);
    assert_eq!(names(&gates()), ["old_leaves"]);
    let list = desk.list();
    let intermediate = list.authorities.iter().find(|one| one.kind == "intermediate").unwrap();
    assert_eq!((intermediate.state.as_str(), intermediate.replica.as_deref()), ("active", Some("local")));
    assert_eq!(intermediate.root, desk.root("active"));
    assert_eq!(intermediate.key_sha256.len(), 64);
}

#[test]
fn a_root_is_never_removed_early() {
    let desk = Desk::new();
    desk.enrol("web");
    let first = desk.root("active").unwrap();
    assert!(desk.refusal(remove(&first)).contains("signs now"));
    assert!(desk.refusal(remove("nonsense")).contains("there is no root nonsense"));
    desk.done(PREPARE);
    assert!(desk.refusal(remove(&desk.root("prepared").unwrap())).contains("is about to sign"));
    desk.pass(DAY + HOUR);
    let refused = desk.refusal(remove(&first));
    assert!(refused.contains("leaves_under") && refused.contains("it happens by itself, at "), "{refused}");
    desk.pass(29 * DAY);
    assert!(desk.refusal(remove(&first)).contains("leaves_under"));
    desk.pass(4 * DAY);
    assert!(desk.refusal(remove(&first)).contains("has left the bundle already"));
    assert!(desk.audit_lines("root_remove").iter().any(|line| line["result"] == "refused"));
}

#[test]
fn an_emergency_rotation_waits_for_acknowledgements_and_nothing_else() {
    let desk = Desk::new();
    let (web, db) = (desk.enrol("web"), desk.enrol("db"));
    let first = desk.root("active").unwrap();
    let done = desk.done(ROTATE);
    assert!(done.follows[0].contains(": db, web"), "{done:?}");
    assert!(!done.follows[0].contains("old_leaves"), "{done:?}");
    desk.report(&web[0], &[&first]);
    desk.pass(10);
    assert_eq!(desk.root("active").unwrap(), first);
    desk.report(&db[0], &[&first]);
    desk.pass(10);
    assert_ne!(desk.root("active").unwrap(), first);
    assert!(desk.list().urgent_since.is_none(), "the emergency is over");
    let refused = desk.refusal(remove(&first));
    assert!(refused.contains("leaves_under") && refused.contains("hosts_under"), "never skipped: {refused}");
    assert_eq!(desk.audit_lines("root_rotate_now")[0]["by"], "uid 1000 (alice)");
    let next = chain_of(desk.renew("web", Some(&web[0])).unwrap());
    assert_ne!(next[1], web[1], "the new root signs");
}

#[test]
fn forcing_needs_a_root_that_hosts_could_have_and_names_who_is_cut_off() {
    let desk = Desk::new();
    desk.enrol("web");
    let first = desk.root("active").unwrap();
    let refused = desk.refusal(FORCE);
    assert!(refused.contains("would cut off every host") && refused.contains("rotate --now"), "{refused}");
    desk.done(ROTATE);
    assert_eq!(desk.root("active").unwrap(), first);
    desk.done(FORCE);
    assert_ne!(desk.root("active").unwrap(), first);
    let line = desk.audit_lines("root_rotate_now").pop().unwrap();
    assert!(line["detail"].as_str().unwrap().contains("web"), "{line}");
}

#[test]
fn a_tainted_root_is_replaced_hosts_are_told_to_move_and_then_it_goes() {
    let desk = Desk::new();
    let web = desk.enrol("web");
    let first = desk.root("active").unwrap();
    let done = desk.done(taint(&first));
    assert!(done.follows.iter().any(|line| line.contains(": web")), "{done:?}");
    assert!(desk.refusal(taint(&first)).contains("is tainted since"));
    assert!(desk.refusal(taint("nonsense")).contains("there is no authority nonsense"));
    let told = desk.report(&web[0], &[&first]).tainted_roots;
    assert!(told.is_empty(), "nothing better is to be had yet: {told:?}");
    desk.pass(10);
    let second = desk.root("active").unwrap();
    assert_ne!(second, first);
    assert_eq!(desk.report(&web[0], &[&first]).tainted_roots, [first.as_str()]);
    desk.pass(10);
    assert!(desk.refusal(remove(&first)).contains("hosts_under"));
    let next = chain_of(desk.renew("web", Some(&web[0])).unwrap());
    desk.report(&next[0], &[&second]);
    desk.pass(10);
    assert_eq!(desk.root("retired").unwrap(), first);
    assert_eq!(desk.audit_lines("root_taint")[0]["by"], "uid 1000 (alice)");
    assert!(desk.refusal(taint(&first)).contains("has left the bundle"));
}

#[test]
fn a_root_tainted_before_it_signed_leaves_at_once() {
    let desk = Desk::new();
    desk.enrol("web");
    desk.done(PREPARE);
    let prepared = desk.root("prepared").unwrap();
    desk.done(taint(&prepared));
    assert_eq!(desk.root("retired").unwrap(), prepared);
    assert!(desk.root("active").is_some());
}

#[test]
fn a_tainted_intermediate_signs_nothing_more() {
    let desk = Desk::new();
    let before = desk.enrol("web");
    let id = desk.list().authorities.into_iter().find(|one| one.kind == "intermediate").unwrap().id;
    let done = desk.done(taint(&id));
    assert!(done.follows[0].contains(&format!("deny add --authority {id}")), "{done:?}");
    assert_ne!(desk.enrol("db")[1], before[1]);
    assert!(desk.refusal(taint(&id)).contains("is tainted already"));
    assert_eq!(desk.audit_lines("intermediate_taint").len(), 1);
    assert_eq!(desk.report(&before[0], &[]).tainted_intermediates, [id.as_str()]);
    // Until nothing it has signed can be valid.
    desk.pass(16 * DAY);
    assert_eq!(desk.report(&desk.enrol("later")[0], &[]).tainted_intermediates, <[&str; 0]>::default());
}

#[test]
fn no_step_is_taken_while_the_clock_is_not_believed() {
    let desk = Desk::new();
    let dir = tempfile::tempdir().unwrap();
    meshd_pki::state_dir::init(dir.path(), &crate::support::domain(), None, desk.now()).unwrap();
    // The wall clock moves with the desk's, the machine's time since boot does not.
    let (start, passed) = (desk.now(), Arc::new(std::sync::atomic::AtomicU64::new(0)));
    let ticks = passed.clone();
    let options = Options {
        clock: Arc::new(move || start + Duration::from_secs(ticks.load(std::sync::atomic::Ordering::SeqCst))),
        boot_time: Arc::new(|| Duration::from_secs(1000)),
        ..Options::default()
    };
    let pki = Pki::open(dir.path(), options).unwrap();
    passed.store(HOUR, std::sync::atomic::Ordering::SeqCst);
    pki.maintain().unwrap();
    let refused = pki.command(&alice(), PREPARE).unwrap_err().to_string();
    assert!(refused.contains("clock:") && refused.contains("jumped by 3600 s"), "{refused}");
    let Ok(Reply::Authorities(list)) = pki.command(&alice(), Command::AuthorityList(AuthorityList {})) else {
        panic!("no list")
    };
    assert!(list.clock_distrust.unwrap().contains("jumped"));
}

#[test]
fn the_same_commands_work_on_the_directory_of_a_pki_that_is_off() {
    let mut desk = Desk::new();
    desk.enrol("web");
    desk.pass(DAY + HOUR);
    let on_directory = |desk: &Desk, command| run_on(desk.dir.path(), &alice(), command, desk.now());
    assert!(matches!(on_directory(&desk, PREPARE), Ok(Reply::Done(_))));
    let refused = on_directory(&desk, ACTIVATE).unwrap_err().to_string();
    assert!(refused.contains("old_leaves"), "{refused}");
    desk.off_for(DAY);
    let refused = on_directory(&desk, ACTIVATE).unwrap_err().to_string();
    assert!(refused.contains("clock:") && refused.contains("start it"), "nobody vouches for the clock: {refused}");
    desk.open();
    desk.done(taint(&desk.root("prepared").unwrap()));
}
