//! What operators do, asked of one of several servers.

use std::fs;
use std::time::{Duration, SystemTime};

use meshd_pki::admin::{Actor, AdminError, Role, run_on};
use meshd_pki::adoption::{Adopt, adopt};
use meshd_pki::commands::{TokenRequest, create_token};
use meshd_pki::replicas::replicas;
use meshd_pki::status::Status;
use meshd_pki::{Options, Pki, state_dir};
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{
    AuthorityActivate, AuthorityPrepare, AuthorityRotate, AuthorityTaint, DenyList, Done, EntryAdd, HostBan, HostEvict,
    HostList, HostUnban, RoleGrant, RoleList,
};

use crate::cluster::until;
use crate::desk::{Desk, domain, enrol, metric, renew};

fn alice() -> Actor {
    Actor { name: "alice".to_owned(), role: Role::Admin }
}

fn done(pki: &Pki, command: Command) -> Done {
    match pki.command(&alice(), command).unwrap() {
        Reply::Done(done) => done,
        other => panic!("unexpected {other:?}"),
    }
}

/// Of the roots, as one server has them.
fn roots(desk: &Desk, state: &str) -> Vec<(String, String)> {
    let authorities = Status::read(&desk.state(state), desk.now()).unwrap().authorities.into_iter();
    authorities.filter(|one| one.kind == "root").map(|one| (one.id, one.state)).collect()
}

fn audit(desk: &Desk, state: &str, event: &str) -> Vec<serde_json::Value> {
    let log = fs::read_to_string(desk.state(state).join("audit.jsonl")).unwrap_or_default();
    let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.filter(|line| line["event"] == event).collect()
}

/// The server that leads, and one that follows.
fn leader_and_follower() -> (Desk, Pki, Pki) {
    let desk = Desk::new();
    desk.replica("b", desk.cluster.config()).unwrap();
    let (a, b) = (desk.open("a"), desk.open("b"));
    a.maintain().unwrap();
    b.maintain().unwrap();
    assert_eq!([metric(&a, "leads"), metric(&b, "leads")].concat(), "10");
    (desk, a, b)
}

#[test]
fn a_ban_or_an_eviction_asked_of_one_server_is_enforced_by_the_other() {
    let (desk, a, b) = leader_and_follower();
    let mut chain = enrol(&a, &desk.token("a", "web")).unwrap().svid.unwrap().chain;
    until("both know the host", || renew(&b, "web", &chain).map(|renewed| chain = renewed).is_ok());

    let banned = done(&b, Command::HostBan(HostBan { host: "web".to_owned(), reason: "stolen".to_owned() }));
    assert_eq!(banned.what, "host web is banned");
    until("the other refuses it", || {
        renew(&a, "web", &chain).is_err_and(|refused| refused.to_string().contains("banned"))
    });
    a.refresh().unwrap();
    let denied = |pki: &Pki| match pki.command(&alice(), Command::DenyList(DenyList {})).unwrap() {
        Reply::DenySet(set) => (set.sequence, set.entries.len()),
        other => panic!("unexpected {other:?}"),
    };
    until("both hand out one deny set", || denied(&a) == denied(&b) && denied(&a).1 >= 3);
    let line = audit(&desk, "b", "host_ban").remove(0);
    assert_eq!((&line["by"], &line["host"]), (&"alice".into(), &"web".into()));

    done(&a, Command::HostUnban(HostUnban { host: "web".to_owned() }));
    until("the other serves it again", || {
        b.refresh().unwrap();
        denied(&b).1 == 0
    });
    chain = renew(&b, "web", &chain).unwrap();
    done(&a, Command::HostEvict(HostEvict { host: "web".to_owned(), reason: String::new() }));
    until("the other refuses it", || {
        renew(&b, "web", &chain).is_err_and(|refused| refused.to_string().contains("evicted"))
    });
}

#[test]
fn a_step_of_an_authority_asked_of_a_server_that_follows_is_refused_with_the_name_of_the_one_that_leads() {
    let (desk, a, b) = leader_and_follower();
    let known = replicas(&desk.state("a")).unwrap();
    let leader = known.iter().find(|one| one.leads).unwrap();
    let before = roots(&desk, "a");
    for step in [Command::AuthorityPrepare(AuthorityPrepare {}), Command::AuthorityActivate(AuthorityActivate {})] {
        let refused = b.command(&alice(), step).unwrap_err();
        assert!(matches!(refused, AdminError::NotNow(_)), "{refused}");
        let text = refused.to_string();
        assert!(text.contains(&format!("replica `{}` leads", leader.id)), "{text}");
        assert!(text.contains("a.example.org:15012"), "{text}");
    }
    assert_eq!(roots(&desk, "a"), before);
    assert_eq!(audit(&desk, "b", "root_prepare")[0]["result"], "refused");

    // One that was overtaken while it stood still learns it from etcd, whatever it believes.
    desk.cluster.must(&["del", "/meshd/pki/prod.example.org/leader"]);
    let asked = [&a, &b].map(|pki| pki.command(&alice(), Command::AuthorityPrepare(AuthorityPrepare {})).is_ok());
    assert!(asked != [true, true], "one root is prepared once");
    until("one of them leads and has prepared a root", || {
        for pki in [&a, &b] {
            _ = pki.command(&alice(), Command::AuthorityPrepare(AuthorityPrepare {}));
        }
        roots(&desk, "a").len() == 2
    });
    let prepared = ["a", "b"].map(|state| audit(&desk, state, "root_prepare")).concat();
    assert_eq!(prepared.iter().filter(|line| line["result"] == "ok").count(), 1);
}

#[test]
fn an_emergency_rotation_asked_of_a_server_that_follows_is_taken_by_the_one_that_leads() {
    let (desk, a, b) = leader_and_follower();
    let first = roots(&desk, "a").remove(0).0;
    let asked = done(&b, Command::AuthorityRotate(AuthorityRotate { force: false }));
    assert!(asked.follows.iter().any(|one| one.contains("leads and takes the steps")), "{asked:?}");
    let steps = |state: &str| {
        let of = |event| audit(&desk, state, event).len();
        (of("root_prepare"), of("root_activate"))
    };
    until("the new root signs", || {
        for pki in [&b, &a] {
            pki.maintain().unwrap();
        }
        roots(&desk, "b").iter().any(|(id, state)| *id != first && state == "active")
    });
    assert_eq!((steps("a"), steps("b")), ((1, 1), (0, 0)));
    assert_eq!(audit(&desk, "b", "root_rotate_now")[0]["by"], "alice");

    let second = roots(&desk, "a").into_iter().find(|(_, state)| state == "active").unwrap().0;
    done(&b, Command::AuthorityTaint(AuthorityTaint { id: second.clone() }));
    until("a tainted root is replaced", || {
        for pki in [&a, &b] {
            pki.maintain().unwrap();
        }
        roots(&desk, "b").iter().any(|(id, state)| *id != first && *id != second && state == "active")
    });
    enrol(&b, &desk.token("a", "web")).unwrap();
}

#[test]
fn commands_on_a_state_directory_in_etcd_reach_the_servers_that_run_elsewhere() {
    let (desk, a, b) = leader_and_follower();
    let mut chain = enrol(&a, &desk.token("a", "web")).unwrap().svid.unwrap().chain;
    drop(b);
    let on_b = |command: Command| run_on(&desk.state("b"), &alice(), command, desk.now());
    let identity = "ns/shop/sa/web".to_owned();
    let entry = EntryAdd { host: "web".to_owned(), identity: identity.clone(), ..EntryAdd::default() };
    on_b(Command::EntryAdd(entry)).unwrap();
    on_b(Command::RoleGrant(RoleGrant { identity, role: "read".to_owned() })).unwrap();
    let granted = |pki: &Pki| match pki.command(&alice(), Command::RoleList(RoleList {})).unwrap() {
        Reply::Roles(roles) => roles.roles.len(),
        other => panic!("unexpected {other:?}"),
    };
    until("the server that runs knows the role", || granted(&a) == 1);
    chain = renew(&a, "web", &chain).unwrap();
    let refused = on_b(Command::AuthorityPrepare(AuthorityPrepare {})).unwrap_err().to_string();
    assert!(refused.contains("leads and takes the steps"), "{refused}");
    on_b(Command::HostBan(HostBan { host: "web".to_owned(), reason: String::new() })).unwrap();
    until("the server that runs refuses it", || renew(&a, "web", &chain).is_err());
    drop(a);
    let alone = on_b(Command::AuthorityPrepare(AuthorityPrepare {})).unwrap_err().to_string();
    assert!(alone.contains("no server of this PKI leads now"), "{alone}");
}

#[test]
fn a_list_of_hosts_longer_than_a_transaction_of_etcd_is_adopted_and_every_server_knows_them() {
    let lost = tempfile::tempdir().unwrap();
    let (desk, a, _b) = leader_and_follower();
    state_dir::init(lost.path(), &domain(), None, desk.now()).unwrap();
    let before = Pki::open(lost.path(), Options::default()).unwrap();
    let (pki, allow) = (["10.0.0.1:15012".to_owned()], ["ns/shop/sa/web".to_owned()]);
    for n in 0..130 {
        let host = format!("host-{n}");
        let request = TokenRequest { host: &host, pki: &pki, allow: &allow, ..TokenRequest::default() };
        enrol(&before, &create_token(lost.path(), &request, SystemTime::now()).unwrap()).unwrap();
    }
    before.maintain().unwrap();
    let roster = lost.path().join("hosts.json");
    let asked = Adopt { roster: &roster, within: Duration::from_secs(3600), without_roots: false };
    let adopted = adopt(&desk.state("b"), &asked, desk.now()).unwrap();
    assert_eq!((adopted.hosts, adopted.known, adopted.entries), (130, 0, 130));
    let known = || match a.command(&alice(), Command::HostList(HostList { after: String::new() })).unwrap() {
        Reply::Hosts(list) => list.hosts.iter().filter(|host| host.identities == ["ns/shop/sa/web"]).count(),
        other => panic!("unexpected {other:?}"),
    };
    until("the other server knows them", || known() == 130);
    assert_eq!(roots(&desk, "a").iter().filter(|(_, state)| state == "old").count(), 1);
}
