//! Roots of authorities outside, on their way in and out: nobody loses a root that somebody still hangs on.

use meshd_identity::{Bundle, root_id, roots_of};
use meshd_pki::upstream::commands::{UpstreamError, import};
use meshd_pki::upstream::watch::Upstream;
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::{DenyAdd, DenyWhom, deny_whom};
use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::authority::taint;
use crate::operation::{DAY, Desk, HOUR};
use crate::support::domain;
use crate::upstream::{Files, Offline, Says, blocked, pem_of, renew};

impl Desk {
    fn bring(&self, offline: &Offline, key: &KeyPair) -> Result<String, UpstreamError> {
        self.bring_for(offline, key, 365)
    }

    /// An intermediate that has been valid for three of these days.
    fn bring_for(&self, offline: &Offline, key: &KeyPair, days: u64) -> Result<String, UpstreamError> {
        let chain = offline.sign(key, Says::usual(self.now(), days));
        import(self.dir(), chain.as_bytes(), Some(key.serialize_pem().as_bytes()), self.now())?;
        Ok(chain)
    }

    fn bundle(&self) -> Bundle {
        Bundle::from_jwks(domain(), &self.pki().bundle(&[]).unwrap().jwks).unwrap()
    }

    fn holds(&self, offline: &Offline) -> bool {
        self.bundle().roots.iter().any(|root| pem_of(root) == offline.certificate)
    }

    /// The host tells what it hangs on as `meshd` does.
    fn tell(&self, chain: &[Vec<u8>]) {
        let bundle = self.bundle();
        let under = roots_of(&chain[1], bundle.roots.iter().map(Vec::as_slice));
        let ids: Vec<String> = under.into_iter().map(root_id).collect();
        assert_eq!(ids.len(), 1);
        self.report(&chain[0], &[ids[0].as_str()]);
    }

    /// A host that does what it should: `chain` is that of the end.
    fn live(&self, chain: &mut Vec<Vec<u8>>, days: u64) {
        for _ in 0..days * 3 {
            self.pass(8 * HOUR);
            *chain = renew(self, chain);
            self.tell(chain);
        }
    }
}

fn id_of(offline: &Offline) -> String {
    root_id(&CertificateDer::from_pem_slice(offline.certificate.as_bytes()).unwrap())
}

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

#[test]
fn a_tainted_root_from_outside_stays_while_a_host_hangs_on_it() {
    let desk = Desk::new();
    let mut chain = desk.enrol("web");
    let (first, second) = (Offline::new(desk.now(), "first"), Offline::new(desk.now(), "second"));
    desk.bring(&first, &key()).unwrap();
    desk.live(&mut chain, 3);
    assert_eq!(desk.root("active").unwrap(), id_of(&first));
    let old = chain.clone();
    desk.done(taint(&id_of(&first)));
    desk.bring(&second, &key()).unwrap();
    // The server hands the root out, then the host has it.
    desk.pass(10);
    desk.tell(&chain);
    desk.pass(10);
    assert_eq!(desk.root("active").unwrap(), id_of(&second));
    for _ in 0..3 {
        desk.pass(60);
        desk.tell(&old);
        assert!(desk.holds(&first), "a host still hangs on it");
    }
    chain = renew(&desk, &old);
    desk.tell(&chain);
    desk.pass(60);
    assert!(!desk.holds(&first), "nobody hangs on it");
    let again = desk.bring(&first, &key()).unwrap_err();
    assert!(matches!(&again, UpstreamError::Tainted { .. }), "{again}");
}

#[test]
fn a_root_left_by_an_intermediate_that_kept_its_key_stays_as_long_as_its_leaves_and_the_hold() {
    let desk = Desk::new();
    let mut chain = desk.enrol("web");
    let (first, second) = (Offline::new(desk.now(), "first"), Offline::new(desk.now(), "second"));
    let same = key();
    desk.bring(&first, &same).unwrap();
    desk.live(&mut chain, 40);
    let given = desk.bring(&second, &same).unwrap();
    desk.live(&mut chain, 2);
    assert!(given.contains(&pem_of(&chain[1])), "it signs under the second root now");
    assert!(desk.holds(&first), "what it signed under the first root is good for a day, and the hold for 30 days");
    desk.live(&mut chain, 25);
    assert!(desk.holds(&first));
    desk.live(&mut chain, 8);
    assert!(!desk.holds(&first));
}

#[test]
fn a_root_certified_again_with_its_key_takes_the_place_of_the_first() {
    let desk = Desk::new();
    let mut chain = desk.enrol("web");
    let first = Offline::new(desk.now(), "company");
    let old = first.certificate.clone();
    desk.bring(&first, &key()).unwrap();
    desk.live(&mut chain, 3);
    desk.pass(HOUR);
    let renewed = first.again(desk.now(), "company");
    assert_ne!(old, renewed.certificate);
    let given = desk.bring(&renewed, &key()).unwrap();
    desk.live(&mut chain, 3);
    let roots = desk.list().authorities.into_iter().filter(|one| one.kind == "root");
    let active: Vec<String> = roots.filter(|one| one.state == "active").map(|one| one.id).collect();
    assert_eq!(active, [id_of(&renewed)]);
    assert!(given.contains(&pem_of(&chain[1])), "the intermediate under it is used");
    let next = desk.bring(&renewed, &key()).unwrap();
    desk.pki().refresh().unwrap();
    chain = renew(&desk, &chain);
    assert!(next.contains(&pem_of(&chain[1])), "and so is every further one");
    desk.live(&mut chain, 35);
    assert!(desk.holds(&renewed), "the one in use stays");
    assert!(!desk.bundle().roots.iter().any(|root| pem_of(root) == old), "the first has gone");
}

#[test]
fn an_ended_intermediate_from_outside_names_its_cure_and_the_next_one_that_lies_ready_is_found_at_the_start() {
    let mut desk = Desk::new();
    let mut chain = desk.enrol("web");
    let offline = Offline::new(desk.now(), "drawer");
    desk.bring_for(&offline, &key(), 20).unwrap();
    desk.live(&mut chain, 3);
    desk.off_for(15 * DAY);
    let lines = || desk.audit_lines("intermediate").len();
    let before = lines();
    for _ in 0..3 {
        desk.pki().refresh().unwrap_err();
    }
    assert_eq!(lines(), before, "the ended one is not put on record again and again");
    let refused = desk.try_open().unwrap_err().to_string();
    assert!(refused.contains("meshd-pki import") && !refused.contains("initialise"), "{refused}");

    let files = Files::new();
    desk.upstream = Some(files.paths());
    let next = key();
    let given = offline.sign(&next, Says::usual(desk.now(), 365));
    files.write("chain.pem", &given);
    files.write("key.pem", &next.serialize_pem());
    desk.open();
    let chain = desk.enrol("web");
    assert!(given.contains(&pem_of(&chain[1])));
    assert!(!blocked(&desk));
}

#[test]
fn a_start_after_the_end_of_an_intermediate_goes_on_under_another_root_that_was_brought() {
    let mut desk = Desk::new();
    let mut chain = desk.enrol("web");
    let (first, second) = (Offline::new(desk.now(), "first"), Offline::new(desk.now(), "second"));
    desk.bring_for(&first, &key(), 20).unwrap();
    desk.live(&mut chain, 3);
    desk.off_for(15 * DAY);
    let given = desk.bring(&second, &key()).unwrap();
    desk.open();
    assert!(given.contains(&pem_of(&desk.enrol("web")[1])));
}

#[test]
fn files_that_were_refused_are_taken_when_the_reason_has_passed() {
    let desk = Desk::new();
    let files = Files::new();
    let mut upstream = Upstream::new(&files.paths());
    let (offline, key) = (Offline::new(desk.now(), "drawer"), key());
    files.write("chain.pem", &offline.sign(&key, Says { from: desk.now(), ..Says::usual(desk.now(), 365) }));
    files.write("key.pem", &key.serialize_pem());
    upstream.look(desk.pki());
    assert!(blocked(&desk), "hosts whose clocks are behind would refuse it");
    desk.pass(240);
    upstream.look(desk.pki());
    assert!(blocked(&desk));
    desk.pass(120);
    upstream.look(desk.pki());
    assert!(!blocked(&desk));
    assert_eq!(desk.audit_lines("upstream").len(), 2, "refused once, taken once");
}

#[test]
fn a_host_that_does_not_acknowledge_waits_no_longer_than_the_intermediate_in_use_lives() {
    let desk = Desk::new();
    let mut chain = desk.enrol("web");
    let (first, second) = (Offline::new(desk.now(), "first"), Offline::new(desk.now(), "second"));
    desk.bring_for(&first, &key(), 20).unwrap();
    desk.live(&mut chain, 3);
    let held = desk.status().bundle_sequence;
    desk.bring(&second, &key()).unwrap();
    for _ in 0..12 * 3 {
        desk.pass(8 * HOUR);
        chain = crate::operation::chain_of(desk.renew_holding(held, "web", Some(&chain[0])).unwrap());
    }
    assert_eq!(desk.root("active").unwrap(), id_of(&second), "nobody could be issued anything a day later");
    let activations = desk.audit_lines("root_activate");
    assert!(activations.last().unwrap()["detail"].as_str().unwrap().contains("about to end"), "{activations:?}");
}

#[test]
fn an_intermediate_under_a_root_that_was_left_makes_it_sign_again() {
    let desk = Desk::new();
    let mut chain = desk.enrol("web");
    let (first, second) = (Offline::new(desk.now(), "first"), Offline::new(desk.now(), "second"));
    let back = key();
    desk.bring(&first, &back).unwrap();
    desk.live(&mut chain, 3);
    desk.bring(&second, &key()).unwrap();
    desk.live(&mut chain, 3);
    assert_eq!(desk.root("active").unwrap(), id_of(&second));
    let given = desk.bring(&first, &back).unwrap();
    desk.live(&mut chain, 1);
    assert_eq!(desk.root("active").unwrap(), id_of(&first));
    assert!(given.contains(&pem_of(&chain[1])));
    assert!(desk.holds(&second), "its leaves are out there");
}

#[test]
fn the_root_that_signs_what_hosts_are_told_is_replaced_while_certificates_come_from_outside() {
    let desk = Desk::new();
    let mut chain = desk.enrol("web");
    let ours = desk.root("active").unwrap();
    desk.bring_for(&Offline::new(desk.now(), "drawer"), &key(), 3600).unwrap();
    desk.live(&mut chain, 3);
    assert_eq!(desk.root("old").unwrap(), ours);
    desk.done(taint(&ours));
    desk.pass(60);
    assert!(desk.root("prepared").is_some());
    desk.live(&mut chain, 1);
    let speaker = desk.root("old").unwrap();
    assert_ne!(speaker, ours, "the next signs, and the tainted one has left");
    assert!(!desk.bundle().roots.iter().any(|root| root_id(root) == ours));
    // The same before it ends, and it never signs certificates.
    let issuer = chain[1].clone();
    for _ in 0..230 * 24 / 20 {
        desk.pass(20 * HOUR);
        chain = renew(&desk, &chain);
        desk.tell(&chain);
    }
    assert!(!desk.bundle().roots.iter().any(|root| root_id(root) == speaker));
    assert_eq!(chain[1], issuer);
    let problems = desk.status().problems;
    assert!(problems.is_empty(), "{problems:?}");
}

#[test]
fn files_that_were_overtaken_are_not_gone_back_to_and_what_is_denied_is_taken_from_nobody() {
    let mut desk = Desk::new();
    let mut chain = desk.enrol("web");
    let (files, offline) = (Files::new(), Offline::new(desk.now(), "drawer"));
    let (leaked, next) = (key(), key());
    let old = desk.bring(&offline, &leaked).unwrap();
    files.write("chain.pem", &old);
    files.write("key.pem", &leaked.serialize_pem());
    desk.live(&mut chain, 3);
    let given = desk.bring(&offline, &next).unwrap();
    desk.pass(10);
    desk.upstream = Some(files.paths());
    desk.open();
    Upstream::new(&files.paths()).look(desk.pki());
    assert!(blocked(&desk), "the tool that keeps the files is behind, and that is told");
    chain = renew(&desk, &chain);
    assert!(given.contains(&pem_of(&chain[1])));
    let back = || import(desk.dir(), old.as_bytes(), Some(leaked.serialize_pem().as_bytes()), desk.now());
    let mut list = desk.list().authorities.into_iter();
    let id = list.rfind(|one| one.kind == "intermediate" && one.state == "old").unwrap().id;
    let whom = Some(DenyWhom { whom: Some(deny_whom::Whom::Authority(id)) });
    desk.done(Command::DenyAdd(DenyAdd { whom: whom.clone(), reason: String::new() }));
    let refused = back().unwrap_err();
    assert!(matches!(&refused, UpstreamError::Denied { .. }), "{refused}");
    desk.done(Command::DenyRemove(meshd_pki_api::admin::DenyRemove { whom }));
    back().unwrap();
    desk.pass(10);
    assert!(old.contains(&pem_of(&renew(&desk, &chain)[1])), "an operator may go back");
}
