//! What the holder of the offline recovery key can do.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use meshd_identity::signed::{self, VerifyingKey};
use meshd_identity::statements::RecoveryStatement;
use meshd_pki::admin::{AdminError, run_on};
use meshd_pki::recovery::{Request, SignedStatement, succeed, vouch};
use meshd_pki::state_dir;
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{Recovery, RecoveryImport, RecoveryRequest, RecoveryShow};
use meshd_pki_api::v1;
use rcgen::{KeyPair, PublicKeyData};
use tempfile::TempDir;

use crate::authority::alice;
use crate::operation::Desk;
use crate::support::domain;

fn import(signed: &SignedStatement) -> Command {
    let (statement, signed_by) = (signed.statement.clone(), signed.signed_by.clone());
    Command::RecoveryImport(RecoveryImport { statement, signed_by })
}

fn read_request(reply: Reply) -> Request {
    serde_json::from_value(serde_json::to_value(&reply).unwrap()).unwrap()
}

fn public(key: &Path) -> Vec<u8> {
    KeyPair::from_pem(&std::fs::read_to_string(key).unwrap()).unwrap().subject_public_key_info()
}

fn statement(jws: &str, key: &Path) -> RecoveryStatement {
    signed::verify(jws, &[VerifyingKey::from_spki(&public(key)).unwrap()]).unwrap()
}

impl Desk {
    fn recovery_key(&self) -> PathBuf {
        self.dir.path().join("recovery.key")
    }

    fn recovery(&self) -> Recovery {
        match self.ask(Command::RecoveryShow(RecoveryShow {})).unwrap() {
            Reply::Recovery(recovery) => recovery,
            other => panic!("unexpected {other:?}"),
        }
    }

    fn served(&self) -> Vec<String> {
        self.pki().transitions(&v1::TransitionsRequest { sequence: 1 }).unwrap().recovery
    }
}

fn later(desk: &Desk, seconds: u64) -> SystemTime {
    desk.now() + Duration::from_secs(seconds)
}

#[test]
fn a_recovery_key_is_succeeded_and_its_successor_by_another() {
    let desk = Desk::new();
    let dir = tempfile::tempdir().unwrap();
    let (first, second, third) = (desk.recovery_key(), dir.path().join("second"), dir.path().join("third"));
    let one = succeed(&first, &second, &domain(), desk.now()).unwrap();
    assert_eq!(succeed(&first, &second, &domain(), desk.now()).unwrap().signed_by, one.signed_by, "the same next key");
    let done = desk.done(import(&one));
    assert!(done.what.contains("the next recovery key is"), "{done:?}");
    let web = desk.enrol_with(&desk.token("web", &[]).unwrap()).unwrap();
    assert_eq!(web.recovery_keys, [public(&first), public(&second)], "hosts pin two");
    assert!(statement(&desk.served()[0], &first).next_key.is_some());
    let report = v1::SyncRequest { instance: "one".to_owned(), ..v1::SyncRequest::default() };
    let told = desk.pki().sync_report(Some(&web.svid.unwrap().chain[0]), &report, "test").unwrap().recovery;
    assert_eq!(told, one.statement);

    let two = succeed(&second, &third, &domain(), later(&desk, 1)).unwrap();
    let refused = desk.refusal(import(&two));
    assert!(refused.contains("have not heard of it"), "hosts hear the last alone: {refused}");
    desk.pass(86_400);
    desk.done(import(&two));
    assert_eq!(desk.recovery().key_ids.len(), 2);
    let db = desk.enrol_with(&desk.token("db", &[]).unwrap()).unwrap();
    assert_eq!(db.recovery_keys, [public(&second), public(&third)]);
    assert_eq!(desk.served(), [one.statement, two.statement], "oldest first, for hosts that pin the first key");
    let lines = desk.audit_lines("recovery_import");
    assert_eq!((lines.len(), lines[0]["by"].as_str()), (2, Some("uid 1000 (alice)")));
    let superseded = succeed(&first, &dir.path().join("fourth"), &domain(), later(&desk, 2)).unwrap();
    assert!(desk.refusal(import(&superseded)).contains("does not know"));
}

#[test]
fn a_new_pki_is_vouched_for_with_the_key_of_the_lost_one() {
    let lost: TempDir = tempfile::tempdir().unwrap();
    state_dir::init(lost.path(), &domain(), None, SystemTime::now()).unwrap();
    let desk = Desk::new();
    let old_key = lost.path().join("recovery.key");
    let request = read_request(desk.ask(Command::RecoveryRequest(RecoveryRequest {})).unwrap());
    let signed = vouch(&old_key, &request, desk.now()).unwrap();
    desk.done(import(&signed));
    let said = statement(&desk.served()[0], &old_key);
    let named = said.bundle.unwrap();
    let bundle = desk.pki().bundle(&data_encoding::HEXLOWER.decode(named.sha256.as_bytes()).unwrap()).unwrap();
    assert_eq!(bundle.sequence, named.sequence, "the bundle it names is to be had");
    assert_eq!(said.next_key, Some(request.next_key), "its recovery key comes next");
    let web = desk.enrol_with(&desk.token("web", &[]).unwrap()).unwrap();
    assert_eq!(web.recovery_keys, [public(&desk.recovery_key())], "new hosts never knew the lost one");
    // Weeks and rotations later the named bundle is still to be had, and the way from it.
    for _ in 0..20 {
        desk.pass(86_400);
    }
    let reply = desk.pki().transitions(&v1::TransitionsRequest { sequence: named.sequence }).unwrap();
    assert!(!reply.steps.is_empty() && reply.recovery.len() == 1);
}

#[test]
fn statements_that_hosts_would_not_believe_are_refused() {
    let desk = Desk::new();
    let dir = tempfile::tempdir().unwrap();
    let (key, next) = (desk.recovery_key(), dir.path().join("next"));
    let request = read_request(desk.ask(Command::RecoveryRequest(RecoveryRequest {})).unwrap());
    let refused = |signed: Result<SignedStatement, meshd_pki::recovery::RecoveryError>, expected: &str| {
        let refused = desk.refusal(import(&signed.unwrap()));
        assert!(refused.contains(expected), "{expected}: {refused}");
    };
    refused(succeed(&key, &next, &"other.example".parse().unwrap(), desk.now()), "is for `other.example`");
    refused(succeed(&key, &next, &domain(), later(&desk, 3600)), "set the clock");
    refused(succeed(&next, &key, &domain(), desk.now()), "does not know");
    let elsewhere = Request { bundle_sha256: "00".repeat(32), ..request.clone() };
    refused(vouch(&key, &elsewhere, desk.now()), "never had the bundle");
    let good = vouch(&key, &request, desk.now()).unwrap();
    let forged =
        SignedStatement { signed_by: succeed(&next, &key, &domain(), desk.now()).unwrap().signed_by, ..good.clone() };
    refused(Ok(forged), "does not verify");
    assert!(desk.served().is_empty(), "nothing of it is served");
    desk.done(import(&good));
    refused(Ok(good), "hear only later ones");
    assert_eq!(desk.recovery().key_ids.len(), 1, "a PKI that vouches for itself keeps its key");
}

#[test]
fn the_recovery_key_works_on_a_pki_that_is_off() {
    let dir = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    state_dir::init(dir.path(), &domain(), None, now).unwrap();
    let signed = succeed(&dir.path().join("recovery.key"), &dir.path().join("next"), &domain(), now).unwrap();
    run_on(dir.path(), &alice(), import(&signed), now).unwrap();
    let again: AdminError = run_on(dir.path(), &alice(), import(&signed), now).unwrap_err();
    assert!(again.to_string().contains("served already"), "{again}");
}
