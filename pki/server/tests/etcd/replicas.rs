//! Several servers of one PKI.

use std::collections::BTreeSet;
use std::fs;

use meshd_identity::inspect_svid;
use meshd_pki::keeping::moving::remove_replica;
use meshd_pki::status::Status;

use crate::cluster::until;
use crate::desk::{DAY, Desk, HOUR, enrol, metric, renew_with};

fn two() -> Desk {
    let desk = Desk::new();
    desk.replica("b", desk.cluster.config()).unwrap();
    desk
}

fn audit(desk: &Desk, event: &str) -> usize {
    let lines = |name| fs::read_to_string(desk.state(name).join("audit.jsonl")).unwrap_or_default();
    let text = lines("a") + &lines("b");
    text.lines().filter(|line| line.contains(&format!("\"event\":\"{event}\""))).count()
}

#[test]
fn of_two_hosts_that_race_for_one_token_on_two_servers_exactly_one_gets_in() {
    let desk = two();
    let (a, b) = (desk.open("a"), desk.open("b"));
    for n in 0..5 {
        let token = desk.token("a", &format!("host-{n}"));
        until("the other server knows the token", || {
            b.refresh().unwrap();
            Status::read(&desk.state("b"), desk.now()).unwrap().open_tokens.iter().any(|open| open.id == token.id)
        });
        let results = std::thread::scope(|scope| {
            let racers = [&a, &b].map(|pki| scope.spawn(|| enrol(pki, &token)));
            racers.map(|racer| racer.join().unwrap())
        });
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
    }
}

#[test]
fn two_servers_issue_from_intermediates_of_their_own_and_take_each_step_once() {
    let desk = two();
    let (a, b) = (desk.open("a"), desk.open("b"));
    assert_eq!([metric(&a, "leads"), metric(&b, "leads")].concat(), "10");
    let reply = enrol(&a, &desk.token("a", "web")).unwrap();
    assert_eq!(reply.pki_addresses, ["a.example.org:15012"]);
    let (mut chain, mut sequence) = (reply.svid.unwrap().chain, reply.bundle.unwrap().sequence);
    let mut signers = BTreeSet::new();
    let mut sequences = BTreeSet::new();
    let mut bridges = Vec::new();
    // Through the first rotation, which begins after a week and has its second root sign a day later.
    for step in 0..28 {
        desk.pass(8 * HOUR);
        for pki in [&b, &a] {
            pki.maintain().unwrap();
        }
        for pki in [&a, &b] {
            pki.refresh().unwrap();
            let renewed = renew_with(pki, "web", &chain, sequence).unwrap();
            assert!(renewed.1 >= sequence, "step {step}: a server hands out an older bundle than the other");
            (chain, sequence) = renewed;
            signers.insert(chain[1].clone());
            sequences.insert(sequence);
            bridges.extend(chain.get(2).cloned());
            assert!(inspect_svid(&chain[0]).unwrap().not_after > desk.now());
        }
    }
    assert!(signers.len() >= 6, "each has its own, a new one every three days");
    assert!(sequences.len() >= 2);
    bridges.dedup();
    assert_eq!(bridges.len(), 1, "all servers carry the bridge that the leader made");
    for (event, times) in [("root_prepare", 1), ("root_activate", 1)] {
        assert_eq!(audit(&desk, event), times, "{event}");
    }
    let reply = enrol(&a, &desk.token("a", "db")).unwrap();
    assert_eq!(reply.pki_addresses, ["a.example.org:15012", "b.example.org:15012"]);
}

#[test]
fn a_leader_that_stops_leaves_the_lead_and_one_that_was_overtaken_writes_nothing() {
    let desk = two();
    let (a, b) = (desk.open("a"), desk.open("b"));
    let leads = |pki: &meshd_pki::Pki| {
        pki.refresh().unwrap();
        metric(pki, "leads") == "1"
    };
    assert!(leads(&a) && !leads(&b));
    let roots = || {
        let authorities = Status::read(&desk.state("b"), desk.now()).unwrap().authorities;
        authorities.iter().filter(|one| one.kind == "root").count()
    };
    // As when it stood still: it believes to lead while its key is gone and another's is there.
    desk.pass(7 * DAY + HOUR);
    desk.cluster.must(&["del", "/meshd/pki/prod.example.org/leader"]);
    until("another leads", || leads(&b) || !leads(&a));
    let (one, other) = (a.maintain(), b.maintain());
    one.unwrap();
    other.unwrap();
    until("one of them leads", || leads(&a) != leads(&b));
    a.maintain().unwrap();
    b.maintain().unwrap();
    assert_eq!((roots(), audit(&desk, "root_prepare")), (2, 1));

    let (stays, goes) = if leads(&a) { (b, a) } else { (a, b) };
    drop(goes);
    until("the one that stays leads", || leads(&stays));
}

#[test]
fn a_server_that_starts_years_ahead_changes_no_authority_while_another_leads() {
    let desk = two();
    let a = desk.open("a");
    let chain = enrol(&a, &desk.token("a", "web")).unwrap().svid.unwrap().chain;
    a.maintain().unwrap();
    assert_eq!(metric(&a, "leads"), "1");
    let before = Status::read(&desk.state("a"), desk.now()).unwrap();
    // By its clock no root can sign any more, so it may not even start.
    let b = desk.try_open_ahead("b", 30 * 365 * DAY);
    if let Ok(b) = &b {
        _ = b.maintain();
    }
    a.maintain().unwrap();
    let after = Status::read(&desk.state("a"), desk.now()).unwrap();
    let roots = |status: &Status| {
        let roots = status.authorities.iter().filter(|one| one.kind == "root");
        roots.map(|one| (one.id.clone(), one.state.clone())).collect::<Vec<_>>()
    };
    assert_eq!((roots(&after), after.bundle_sequence), (roots(&before), before.bundle_sequence));
    renew_with(&a, "web", &chain, before.bundle_sequence).unwrap();
}

#[test]
fn rotation_waits_for_a_server_that_is_away_until_it_is_removed() {
    let desk = two();
    let (a, b) = (desk.open("a"), desk.open("b"));
    let mut chain = enrol(&a, &desk.token("a", "web")).unwrap().svid.unwrap().chain;
    drop(b);
    let mut sequence = 0;
    let mut walk = |days: u64| {
        for _ in 0..days * 3 {
            desk.pass(8 * HOUR);
            a.maintain().unwrap();
            (chain, sequence) = renew_with(&a, "web", &chain, sequence).unwrap();
        }
    };
    walk(10);
    assert_eq!((audit(&desk, "root_prepare"), audit(&desk, "root_activate")), (1, 0));
    let status = Status::read(&desk.state("a"), desk.now()).unwrap();
    assert!(status.problems.iter().any(|problem| problem.contains("replica remove")), "{:?}", status.problems);
    let gone = status.replicas.iter().find(|one| !one.runs).unwrap().id.clone();
    remove_replica(&desk.state("a"), &gone, desk.now()).unwrap();
    walk(2);
    assert_eq!(audit(&desk, "root_activate"), 1);
}
