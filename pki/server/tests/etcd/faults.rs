//! What etcd can do to the PKI.

use meshd_pki::Refused;
use meshd_pki::admin::{Actor, Role};
use meshd_pki::commands::add_entry;
use meshd_pki::keeping::command::restore;
use meshd_pki::status::Status;
use meshd_pki::store::etcd::config::EtcdConfig;
use meshd_pki_api::admin::HostBan;
use meshd_pki_api::admin::command::Command;
use nix::sys::signal::Signal;

use crate::cluster::{Cluster, until};
use crate::desk::{Desk, HOUR, enrol, metric, metric_like, renew};
use crate::way::Way;

fn in_trouble(pki: &meshd_pki::Pki) -> bool {
    _ = pki.refresh();
    metric(pki, "store_trouble") == "1"
}

#[test]
fn killing_or_stopping_the_member_that_leads_etcd_costs_no_renewal() {
    let mut desk = Desk::new();
    let pki = desk.open("a");
    let mut chain = enrol(&pki, &desk.token("a", "web")).unwrap().svid.unwrap().chain;
    for n in 0..2 {
        let leader = desk.cluster.leader();
        let token = desk.token("a", &format!("host-{n}"));
        match n {
            0 => desk.cluster.kill_member(leader),
            _ => desk.cluster.signal_member(leader, Signal::SIGSTOP),
        }
        chain = renew(&pki, "web", &chain).unwrap();
        until("a new host gets in", || {
            chain = renew(&pki, "web", &chain).unwrap();
            enrol(&pki, &token).is_ok()
        });
        match n {
            0 => desk.cluster.start_member(leader),
            _ => desk.cluster.signal_member(leader, Signal::SIGCONT),
        }
        desk.cluster.healthy();
    }
}

#[test]
fn without_a_majority_renewals_go_on_also_across_a_restart_and_nobody_new_gets_in() {
    let mut desk = Desk::new();
    let pki = desk.open("a");
    let chain = enrol(&pki, &desk.token("a", "web")).unwrap().svid.unwrap().chain;
    let token = desk.token("a", "db");
    pki.maintain().unwrap();
    // The host is in a backup, as it is after an hour.
    meshd_pki::keeping::command::create(&desk.state("a"), desk.now() + std::time::Duration::from_secs(1)).unwrap();
    desk.cluster.kill_member(0);
    desk.cluster.kill_member(1);
    let chain = renew(&pki, "web", &chain).unwrap();
    until("the trouble shows", || in_trouble(&pki));
    assert!(matches!(enrol(&pki, &token), Err(Refused::Unavailable(_))));
    let chain = renew(&pki, "web", &chain).unwrap();
    assert_ne!(metric(&pki, "note_failures_total"), "0");
    drop(pki);
    let pki = desk.open("a");
    assert!(in_trouble(&pki));
    let mut chain = renew(&pki, "web", &chain).unwrap();
    // Past the time at which the intermediate would be replaced, and past the end of the PKI's own server certificate.
    for _ in 0..15 {
        desk.pass(8 * HOUR);
        pki.maintain().unwrap();
        chain = renew(&pki, "web", &chain).unwrap();
    }
    let ends: u64 = metric_like(&pki, "certificate_not_after_seconds{kind=\"endpoint\"").parse().unwrap();
    assert!(ends > desk.now().duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap().as_secs() + 8 * HOUR);
    desk.cluster.start_member(0);
    desk.cluster.start_member(1);
    until("the trouble is over", || !in_trouble(&pki));
    let token = desk.token("a", "cache");
    until("new hosts get in again", || enrol(&pki, &token).is_ok());
}

#[test]
fn what_was_compacted_while_a_server_looked_away_is_read_anew() {
    let mut desk = Desk::new();
    // `b` uses one member only, which goes away.
    let one = EtcdConfig { endpoints: desk.cluster.endpoints()[..1].to_vec(), ..desk.cluster.config() };
    desk.replica("b", one).unwrap();
    let (a, b) = (desk.open("a"), desk.open("b"));
    let chain = enrol(&a, &desk.token("a", "web")).unwrap().svid.unwrap().chain;
    until("both know the host", || renew(&b, "web", &chain).is_ok());
    desk.cluster.kill_member(0);
    until("the server that is cut off notices", || in_trouble(&b));
    for n in 0..20 {
        add_entry(&desk.state("a"), "web", &format!("ns/shop/sa/w{n}"), desk.now()).unwrap();
    }
    let status = desk.cluster.must(&["endpoint", "status", "-w", "json"]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let revision = status[0]["Status"]["header"]["revision"].as_u64().unwrap();
    desk.cluster.must(&["compact", &revision.to_string()]);
    desk.cluster.start_member(0);
    until("the trouble is over", || !in_trouble(&b));
    let token = desk.token("a", "db");
    until("it follows again", || enrol(&b, &token).is_ok());
    let known = Status::read(&desk.state("b"), desk.now()).unwrap();
    assert_eq!(known.hosts.iter().find(|host| host.id == "web").unwrap().identities.len(), 20);
}

#[test]
fn an_etcd_that_is_full_costs_no_renewal() {
    let desk = Desk::with(|dir| Cluster::start_with(dir, Some(8 << 20)));
    let pki = desk.open("a");
    let chain = enrol(&pki, &desk.token("a", "web")).unwrap().svid.unwrap().chain;
    let token = desk.token("a", "db");
    let junk = "x".repeat(100_000);
    until("etcd is full", || !desk.cluster.root(&["put", "/junk", &junk]).status.success());
    let chain = renew(&pki, "web", &chain).unwrap();
    assert!(matches!(enrol(&pki, &token), Err(Refused::Unavailable(_))));
    assert!(in_trouble(&pki));
    renew(&pki, "web", &chain).unwrap();
    desk.cluster.must(&["del", "/junk"]);
    let status = desk.cluster.must(&["endpoint", "status", "-w", "json"]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let revision = status[0]["Status"]["header"]["revision"].as_u64().unwrap();
    desk.cluster.must(&["compact", &revision.to_string()]);
    desk.cluster.must(&["defrag"]);
    desk.cluster.must(&["alarm", "disarm"]);
    until("new hosts get in again", || enrol(&pki, &token).is_ok());
    assert!(!in_trouble(&pki));
}

#[test]
fn an_etcd_that_was_wiped_is_not_believed_and_a_backup_brings_it_back() {
    let desk = Desk::new();
    let pki = desk.open("a");
    let chain = enrol(&pki, &desk.token("a", "web")).unwrap().svid.unwrap().chain;
    let token = desk.token("a", "db");
    meshd_pki::keeping::command::create(&desk.state("a"), desk.now() + std::time::Duration::from_secs(1)).unwrap();
    desk.cluster.must(&["del", "--prefix", "/meshd/"]);
    until("the trouble shows", || in_trouble(&pki));
    let chain = renew(&pki, "web", &chain).unwrap();
    assert!(matches!(enrol(&pki, &token), Err(Refused::Unavailable(_))));
    drop(pki);
    let pki = desk.open("a");
    let chain = renew(&pki, "web", &chain).unwrap();
    until("a server that starts now says that the records are lost", || {
        pki.store_trouble().is_some_and(|trouble| trouble.contains("has lost"))
    });
    assert!(matches!(enrol(&pki, &token), Err(Refused::Unavailable(_))));
    pki.maintain().unwrap();
    assert_eq!(desk.cluster.must(&["get", "--prefix", "/meshd/pki/prod.example.org/r/"]), "", "no second PKI begins");
    assert!(in_trouble(&pki) && metric(&pki, "leads") == "0");
    let backups = || std::fs::read_dir(desk.state("a").join("backups")).unwrap().count();
    let before = backups();
    desk.pass(2 * HOUR);
    pki.maintain().unwrap();
    assert_eq!(backups(), before, "what comes from a backup is not backed up anew");
    drop(pki);
    restore(&desk.state("a"), None, desk.now()).unwrap();
    let pki = desk.open("a");
    assert!(!in_trouble(&pki));
    renew(&pki, "web", &chain).unwrap();
    enrol(&pki, &desk.token("a", "db")).unwrap();
    let status = Status::read(&desk.state("a"), desk.now()).unwrap();
    assert!(status.problems.iter().any(|problem| problem.contains("restored at")), "{:?}", status.problems);
}

#[test]
fn a_ban_whose_answer_was_lost_is_told_as_done_once() {
    let desk = Desk::new();
    let member = desk.cluster.endpoints().remove(0);
    let way = Way::to(&member);
    let config = EtcdConfig { endpoints: vec![way.endpoint()], ..desk.cluster.config() };
    desk.replica("b", config).unwrap();
    let pki = desk.open("b");
    for n in 0..3 {
        let host = format!("web-{n}");
        until("etcd is followed", || !in_trouble(&pki));
        enrol(&pki, &desk.token("b", &host)).unwrap();
        way.lose_the_next_answer();
        let ban = Command::HostBan(HostBan { host: host.clone(), reason: "stolen".to_owned() });
        let actor = Actor { name: "alice".to_owned(), role: Role::Admin };
        pki.command(&actor, ban).unwrap();
        let log = std::fs::read_to_string(desk.state("b").join("audit.jsonl")).unwrap();
        let told = log.lines().filter(|line| line.contains("\"host_ban\"") && line.contains(&host)).count();
        assert_eq!(told, 1, "{log}");
    }
    assert!(way.lost() > 0, "an answer was lost");
}

#[test]
fn an_etcd_that_forgets_who_is_logged_in_fails_no_change() {
    let desk = Desk::new();
    desk.replica("b", desk.cluster.config_by_password()).unwrap();
    let pki = desk.open("b");
    for n in 0..3 {
        let token = desk.token("a", &format!("web-{n}"));
        desk.cluster.must(&["auth", "disable"]);
        desk.cluster.must(&["auth", "enable"]);
        enrol(&pki, &token).unwrap();
    }
}

#[test]
fn an_etcd_that_came_back_empty_under_a_running_server_is_noticed_at_once() {
    let mut desk = Desk::new();
    let pki = desk.open("a");
    let chain = enrol(&pki, &desk.token("a", "web")).unwrap().svid.unwrap().chain;
    let token = desk.token("a", "db");
    for n in 0..3 {
        desk.cluster.kill_member(n);
        desk.cluster.forget_member(n);
    }
    (0..3).for_each(|n| desk.cluster.start_member(n));
    until("the server says that the records are lost", || {
        pki.store_trouble().is_some_and(|trouble| trouble.contains("has lost"))
    });
    assert!(matches!(enrol(&pki, &token), Err(Refused::Unavailable(_))));
    renew(&pki, "web", &chain).unwrap();
}
