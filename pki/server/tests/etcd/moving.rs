//! From a file into etcd and back.

use std::path::Path;
use std::process::Command;

use meshd_pki::keeping::command::{create, restore};
use meshd_pki::keeping::moving::{to_etcd, to_sqlite};
use meshd_pki::replicas::replicas;
use meshd_pki::state_dir::StateDir;
use meshd_pki::status::Status;
use meshd_pki::store::etcd::config::EtcdConfig;
use meshd_pki::{Options, Pki};
use rcgen::KeyPair;

use crate::cluster::{Cluster, until};
use crate::desk::{Desk, enrol, metric, renew};

#[test]
fn a_pki_moves_into_etcd_and_back_and_its_hosts_do_not_notice() {
    let desk = Desk::in_a_file(Cluster::start);
    let a = desk.state("a");
    let file = desk.open("a");
    let chain = enrol(&file, &desk.token("a", "web")).unwrap().svid.unwrap().chain;
    let refused = to_etcd(&a, desk.cluster.config(), desk.now()).unwrap_err();
    assert!(refused.to_string().contains("another meshd-pki runs"), "{refused}");
    drop(file);

    let command = StateDir::open(&a).unwrap();
    let refused = to_etcd(&a, desk.cluster.config(), desk.now()).unwrap_err();
    assert!(refused.to_string().contains("a command is under way"), "{refused}");
    drop(command);
    let moved = to_etcd(&a, desk.cluster.config(), desk.now()).unwrap();
    assert!(moved.records > 5, "{moved:?}");
    assert!(!a.join("pki.db").exists());
    assert!(to_etcd(&a, desk.cluster.config(), desk.now()).unwrap_err().to_string().contains("in etcd already"));
    let pki = desk.open("a");
    let chain = renew(&pki, "web", &chain).unwrap();
    enrol(&pki, &desk.token("a", "db")).unwrap();
    let refused = to_sqlite(&a, desk.now()).unwrap_err();
    assert!(refused.to_string().contains("another meshd-pki runs"), "{refused}");
    let status = Status::read(&a, desk.now()).unwrap();
    assert!(status.problems.is_empty(), "{:?}", status.problems);
    assert!(status.to_text().contains("leads, a.example.org:15012"), "{}", status.to_text());
    drop(pki);

    to_sqlite(&a, desk.now()).unwrap();
    assert_eq!(desk.cluster.must(&["get", "--prefix", "/meshd/"]), "", "nothing stays that another server could use");
    let pki = desk.open("a");
    renew(&pki, "web", &chain).unwrap();
    assert_eq!(Status::read(&a, desk.now()).unwrap().hosts.len(), 2);
}

#[test]
fn what_was_restored_stays_across_a_move_and_the_list_of_hosts_from_before_is_put_aside() {
    let desk = Desk::new();
    let a = desk.state("a");
    let pki = desk.open("a");
    enrol(&pki, &desk.token("a", "web")).unwrap();
    desk.pass(10);
    let older = create(&a, desk.now()).unwrap();
    enrol(&pki, &desk.token("a", "db")).unwrap();
    desk.pass(10);
    pki.maintain().unwrap();
    create(&a, desk.now()).unwrap();
    drop(pki);
    desk.pass(10);
    restore(&a, Some(&older.path), desk.now()).unwrap();
    let aside = std::fs::read_dir(&a).unwrap().map(|entry| entry.unwrap().path());
    let aside = aside.into_iter().find(|path| path.to_str().unwrap().contains("damaged-")).unwrap();
    assert!(std::fs::read_to_string(aside.join("hosts.json")).unwrap().contains("\"db\""));
    desk.pass(10);
    to_sqlite(&a, desk.now()).unwrap();
    drop(desk.open("a"));
    let hosts = Status::read(&a, desk.now()).unwrap().hosts;
    assert_eq!(
        hosts.iter().map(|host| host.id.as_str()).collect::<Vec<_>>(),
        ["web"],
        "no newer backup took its place"
    );
}

/// Tokens that another command makes during a move, which is tried until it is done.
fn made_during(desk: &Desk, state: &str, mut act: impl FnMut() -> bool) -> Vec<String> {
    std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            let make = |n: u32| desk.try_token(state, &format!("host-{n}")).ok().map(|token| token.id);
            (0..20).filter_map(make).collect()
        });
        until("the records have moved", &mut act);
        made.join().unwrap()
    })
}

#[test]
fn what_commands_do_during_a_move_is_never_lost() {
    let desk = Desk::in_a_file(Cluster::start);
    let a = desk.state("a");
    let open = |state: &str| -> Vec<String> {
        let tokens = Status::read(&desk.state(state), desk.now()).unwrap().open_tokens;
        tokens.into_iter().map(|token| token.id).collect()
    };
    let made = made_during(&desk, "a", || to_etcd(&a, desk.cluster.config(), desk.now()).is_ok());
    let found = open("a");
    assert!(made.len() == 20 && made.iter().all(|id| found.contains(id)), "{} of {}", found.len(), made.len());
    desk.replica("b", desk.cluster.config()).unwrap();
    let made = made_during(&desk, "b", || to_sqlite(&a, desk.now()).is_ok());
    let found = open("a");
    assert!(!made.is_empty() && made.iter().all(|id| found.contains(id)), "{} of {}", found.len(), made.len());
}

#[test]
fn after_a_restore_the_bundle_is_published_anew_by_whoever_leads_later() {
    let desk = Desk::new();
    desk.replica("b", desk.cluster.config()).unwrap();
    let a = desk.state("a");
    drop(desk.open("a"));
    restore(&a, None, desk.now()).unwrap();
    let first = desk.open("b");
    first.maintain().unwrap();
    let second = desk.open("a");
    second.maintain().unwrap();
    let sequence = || Status::read(&a, desk.now()).unwrap().bundle_sequence;
    let before = sequence();
    second.maintain().unwrap();
    assert_eq!((metric(&second, "leads"), sequence()), ("0".to_owned(), before), "it does not lead");
    drop(first);
    until("the bundle is published anew", || {
        second.maintain().unwrap();
        sequence() > before
    });
}

#[test]
fn a_server_that_says_no_address_is_on_the_list_all_the_same() {
    let desk = Desk::new();
    let pki = Pki::open(&desk.state("a"), Options::default()).unwrap();
    let listed = replicas(&desk.state("a")).unwrap();
    assert!(listed.len() == 1 && listed[0].runs && listed[0].addresses.is_empty(), "{listed:?}");
    drop(pki);
}

#[test]
fn etcd_never_sees_a_private_key() {
    let desk = Desk::new();
    let pki = desk.open("a");
    enrol(&pki, &desk.token("a", "web")).unwrap();
    let stored = desk.cluster.must(&["get", "--prefix", "/meshd/", "--print-value-only"]);
    let words = stored.split('"').filter_map(|word| data_encoding::BASE64.decode(word.as_bytes()).ok());
    let keys: Vec<Vec<u8>> = words.filter(|bytes| KeyPair::try_from(bytes.as_slice()).is_ok()).collect();
    assert!(stored.contains("wrapped_key"), "{stored}");
    assert_eq!(keys, Vec::<Vec<u8>>::new());
    let kek = std::fs::read(desk.state("a").join("kek")).unwrap();
    assert!(!stored.contains(&data_encoding::BASE64.encode(&kek)));
}

#[test]
fn a_second_server_needs_the_wrapping_key_and_rights_in_etcd() {
    let desk = Desk::new();
    let stranger = EtcdConfig { user: None, password_file: None, ..desk.cluster.config_by_password() };
    let none = desk.replica("c", stranger).unwrap_err().to_string();
    assert!(none.contains("etcd refused"), "{none}");
    desk.replica("b", desk.cluster.config_by_password()).unwrap();
    let (a, b) = (desk.open("a"), desk.open("b"));
    let reply = enrol(&b, &desk.token("a", "web")).unwrap();
    a.refresh().unwrap();
    renew(&a, "web", &reply.svid.unwrap().chain).unwrap();
    drop((a, b));
    std::fs::write(desk.state("b").join("kek"), [7; 32]).unwrap();
    let wrong = desk.try_open("b").err().unwrap().to_string();
    assert!(wrong.contains("does not open with this wrapping key"), "{wrong}");
}

#[test]
fn the_commands_say_what_they_did_and_what_is_wrong() {
    let desk = Desk::in_a_file(Cluster::start);
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_meshd-pki")).args(arguments).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr))
    };
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let state = text(&desk.state("a"));
    let config = desk.cluster.config();
    let (ca, cert, key) = (text(&config.ca.unwrap()), text(&config.cert.unwrap()), text(&config.key.unwrap()));
    let etcd = ["--etcd", &config.endpoints[0], &config.endpoints[1], "--etcd-ca", &ca, "--etcd-cert", &cert];
    let (ok, said) = run(&[&["migrate", "--state", &state, "--to", "etcd"], &etcd[..]].concat());
    assert!(!ok && said.contains("go together"), "{said}");
    let with_key = [&etcd[..], &["--etcd-key", &key]].concat();
    let (ok, said) = run(&[&["migrate", "--state", &state, "--to", "etcd"], &with_key[..]].concat());
    assert!(ok && said.contains("records moved, all the same on both sides"), "{said}");
    let other = text(&desk.state("b"));
    let init = ["replica", "init", "--state", &other, "--trust-domain", "prod.example.org"];
    let (ok, said) = run(&[&init, &with_key[..]].concat());
    assert!(!ok && said.contains("copy `kek`"), "{said}");
    std::fs::copy(desk.state("a").join("kek"), desk.state("b").join("kek")).unwrap();
    let (ok, said) = run(&[&init, &with_key[..]].concat());
    assert!(ok && said.contains("is ready"), "{said}");
    let (ok, said) = run(&["replica", "list", "--state", &other]);
    assert!(ok && said.contains("REPLICA"), "{said}");
    let (ok, said) = run(&["replica", "remove", "--state", &other, "nobody"]);
    assert!(!ok && said.contains("no replica nobody"), "{said}");
    let (ok, said) = run(&["migrate", "--state", &other, "--to", "sqlite"]);
    assert!(ok && said.contains("records moved"), "{said}");
}
