//! Hosts and certificates that are shut out: by a ban, an eviction, the deny set.

use meshd_identity::signed::{self, VerifyingKey};
use meshd_identity::statements::{DenySet, Whom};
use meshd_identity::{Bundle, SpiffeId, inspect_svid};
use meshd_pki::Refused;
use meshd_pki::adoption::{Adopt, adopt};
use meshd_pki::commands::{TokenRequest, add_entry, create_token};
use meshd_pki::keeping::command::{create, restore};
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{
    BlastRadius, DenyAdd, DenyList, DenyRemove, DenyWhom, HostBan, HostBlastRadius, HostDetail, HostEvict, HostList,
    HostShow, HostUnban, deny_whom,
};
use meshd_pki_api::v1;
use rcgen::KeyPair;

use crate::enrolment::enrol_request;
use crate::keeping::spoil;
use crate::operation::{DAY, Desk, HOUR, chain_of};
use crate::support::{domain, request_over, workload};

fn ban(host: &str) -> Command {
    Command::HostBan(HostBan { host: host.to_owned(), reason: "stolen laptop".to_owned() })
}

fn unban(host: &str) -> Command {
    Command::HostUnban(HostUnban { host: host.to_owned() })
}

fn evict(host: &str) -> Command {
    Command::HostEvict(HostEvict { host: host.to_owned(), reason: String::new() })
}

fn deny(whom: deny_whom::Whom) -> Command {
    Command::DenyAdd(DenyAdd { whom: Some(DenyWhom { whom: Some(whom) }), reason: "test".to_owned() })
}

fn allow(whom: deny_whom::Whom) -> Command {
    Command::DenyRemove(DenyRemove { whom: Some(DenyWhom { whom: Some(whom) }) })
}

fn serial(certificate: &[u8]) -> String {
    inspect_svid(certificate).unwrap().serial
}

impl Desk {
    /// A certificate for one workload of a host.
    fn issue(&self, certificate: &[u8], id: &SpiffeId) -> Result<v1::issue_result::Outcome, Refused> {
        let csr = request_over(&KeyPair::generate().unwrap());
        let items = vec![v1::IssueItem { spiffe_id: id.to_string(), csr }];
        let request = v1::IssueBatchRequest { items, ..v1::IssueBatchRequest::default() };
        let reply = self.pki().issue_batch(Some(certificate), &request, "test")?;
        Ok(reply.results.into_iter().next().unwrap().outcome.unwrap())
    }

    fn leaf(&self, certificate: &[u8], id: &SpiffeId) -> Vec<u8> {
        match self.issue(certificate, id).unwrap() {
            v1::issue_result::Outcome::Svid(svid) => svid.chain[0].clone(),
            other => panic!("no certificate: {other:?}"),
        }
    }

    fn show(&self, host: &str) -> HostDetail {
        match self.ask(Command::HostShow(HostShow { host: host.to_owned() })).unwrap() {
            Reply::Host(host) => host,
            other => panic!("unexpected {other:?}"),
        }
    }

    fn state_of(&self, host: &str) -> String {
        self.show(host).summary.unwrap().state
    }

    fn radius(&self, host: &str) -> BlastRadius {
        match self.ask(Command::HostBlastRadius(HostBlastRadius { host: host.to_owned() })).unwrap() {
            Reply::BlastRadius(radius) => radius,
            other => panic!("unexpected {other:?}"),
        }
    }

    /// The deny set as a host gets it: verified with the bundle it is given.
    fn denied(&self, certificate: &[u8]) -> Vec<Whom> {
        let report = v1::SyncRequest { instance: "one".to_owned(), ..v1::SyncRequest::default() };
        let reply = self.pki().sync_report(Some(certificate), &report, "test").unwrap();
        if reply.deny_set.is_empty() {
            return Vec::new();
        }
        let bundle = Bundle::from_jwks(domain(), &self.pki().bundle(&[]).unwrap().jwks).unwrap();
        let keys: Vec<_> = bundle.roots.iter().filter_map(|root| VerifyingKey::from_certificate(root)).collect();
        let set: DenySet = signed::verify(&reply.deny_set, &keys).unwrap();
        set.entries.into_iter().map(|one| one.whom).collect()
    }
}

#[test]
fn a_banned_host_gets_nothing_and_all_it_has_is_denied() {
    let desk = Desk::new();
    let (web, db) = (desk.enrol("web"), desk.enrol("db"));
    add_entry(desk.dir.path(), "web", "ns/shop/sa/payments", desk.now()).unwrap();
    let payments = desk.leaf(&web[0], &workload("payments"));
    let (unused, used) = (desk.token("web", &[]).unwrap(), desk.token("cache", &[]).unwrap());
    desk.enrol_with(&used).unwrap();

    let done = desk.done(ban("web"));
    assert!(done.what.contains("web is banned") && done.follows[0].contains("2 valid certificates"), "{done:?}");
    let refused = desk.renew("web", Some(&web[0])).unwrap_err();
    assert!(matches!(&refused, Refused::Forbidden(text) if text.contains("is banned")), "{refused}");
    let refused = desk.enrol_with(&unused).unwrap_err().to_string();
    assert!(refused.contains("expired at"), "a token from before the ban: {refused}");
    let fresh = desk.token("web", &[]).unwrap();
    let refused = desk.enrol_with(&fresh).unwrap_err().to_string();
    assert!(refused.contains("is banned"), "{refused}");
    let jwt = v1::IssueJwtRequest { spiffe_id: workload("payments").to_string(), audience: vec!["a".into()], ttl_s: 0 };
    assert!(desk.pki().issue_jwt(Some(&web[0]), &jwt, "test").unwrap_err().to_string().contains("is banned"));

    let id = SpiffeId::host(&domain(), "web").unwrap();
    let mut expected = vec![Whom::Identity(id), Whom::Serial(serial(&web[0])), Whom::Serial(serial(&payments))];
    expected.sort();
    assert_eq!(desk.denied(&db[0]), expected);
    desk.pass(3 * DAY);
    let db = desk.enrol("db");
    assert!(desk.denied(&db[0]).is_empty(), "what it had has ended");
    assert_eq!(desk.state_of("web"), "banned", "a ban does not end");
    assert!(desk.refusal(ban("web")).contains("banned already"));
    let line = desk.audit_lines("host_ban").remove(0);
    assert_eq!((line["by"].as_str(), line["host"].as_str()), (Some("uid 1000 (alice)"), Some("web")));
    assert!(line["detail"].as_str().unwrap().contains("stolen laptop"), "{line}");
}

#[test]
fn a_ban_by_mistake_is_undone_without_a_visit_to_the_host() {
    let desk = Desk::new();
    let (web, db) = (desk.enrol("web"), desk.enrol("db"));
    desk.done(ban("web"));
    let host = deny_whom::Whom::Host("web".to_owned());
    assert!(desk.refusal(allow(host)).contains("host unban web"), "half a ban is none");
    let done = desk.done(unban("web"));
    assert!(done.follows[0].contains("host evict web"), "{done:?}");
    chain_of(desk.renew("web", Some(&web[0])).unwrap());
    assert!(desk.denied(&db[0]).is_empty());
    assert!(desk.refusal(unban("web")).contains("is not banned"));
    assert_eq!(desk.audit_lines("host_unban").len(), 1);
}

#[test]
fn an_evicted_host_comes_back_with_a_new_token_only() {
    let desk = Desk::new();
    let token = desk.token("web", &[]).unwrap();
    let key = KeyPair::generate().unwrap();
    let join = |token: &meshd_identity::JoinToken| {
        let proof = v1::JoinTokenProof { id: token.id.clone(), secret: token.secret.0.to_vec() };
        let attestation = Some(v1::enroll_request::Attestation::JoinToken(proof));
        let csr = request_over(&key);
        desk.pki().enrol(&v1::EnrollRequest { attestation, csr, ..v1::EnrollRequest::default() }, "test")
    };
    let web = join(&token).unwrap().svid.unwrap().chain;
    let done = desk.done(evict("web"));
    assert!(done.follows[0].contains("token create --host web"), "{done:?}");
    assert!(done.follows[1].contains("1 valid certificates") && done.follows[1].contains("deny add"), "{done:?}");
    let refused = desk.renew("web", Some(&web[0])).unwrap_err();
    assert!(matches!(&refused, Refused::Unauthenticated(text) if text.contains("was evicted")), "{refused}");
    assert!(join(&token).unwrap_err().to_string().contains("expired"), "the token it joined by is over");
    assert!(desk.refusal(evict("web")).contains("is evicted"));
    let web = join(&desk.token("web", &[]).unwrap()).unwrap().svid.unwrap().chain;
    chain_of(desk.renew("web", Some(&web[0])).unwrap());
    assert_eq!(desk.state_of("web"), "active");
    assert_eq!(desk.audit_lines("host_evict")[0]["by"], "uid 1000 (alice)");
}

#[test]
fn whoever_came_by_a_token_for_several_hosts_is_shut_out_alone() {
    let desk = Desk::new();
    let pki = ["10.0.0.1:15012".to_owned()];
    let asked = TokenRequest { host: "web", pki: &pki, max_uses: 9, ..TokenRequest::default() };
    let token = create_token(desk.dir.path(), &asked, desk.now()).unwrap();
    let key = KeyPair::generate().unwrap();
    let join = |key: &KeyPair| desk.pki().enrol(&enrol_request(&token, key), "test");
    let host = join(&key).unwrap().host_id;
    let done = desk.done(evict(&host));
    assert!(done.follows.iter().any(|line| line.contains(&token.id) && line.contains("several hosts")), "{done:?}");
    assert!(join(&key).unwrap_err().to_string().contains("is enrolled already"), "by the token and key it had");
    desk.done(ban(&host));
    join(&key).unwrap_err();

    desk.enrol("web");
    let done = desk.done(evict("web"));
    assert_eq!(done.follows.len(), 2, "the token does not make hosts named web: {done:?}");
    assert!(desk.show("web").open_tokens.is_empty());
    join(&KeyPair::generate().unwrap()).unwrap();
}

#[test]
fn an_evicted_host_cannot_attest_with_the_key_it_had() {
    let desk = Desk::new();
    let token = desk.token("web", &[]).unwrap();
    let key = KeyPair::generate().unwrap();
    let proof = v1::JoinTokenProof { id: token.id.clone(), secret: token.secret.0.to_vec() };
    let attestation = Some(v1::enroll_request::Attestation::JoinToken(proof));
    let csr = request_over(&key);
    let request = v1::EnrollRequest { attestation, csr: csr.clone(), ..v1::EnrollRequest::default() };
    desk.pki().enrol(&request, "test").unwrap();
    let attest = || {
        let nonce = desk.pki().challenge(&v1::ChallengeRequest { host_id: "web".to_owned() }).unwrap().nonce;
        let message = meshd_identity::statements::attestation_message(&domain(), "web", &nonce, &csr);
        let signature = signed::sign_bytes(&key.serialize_der(), &message).unwrap();
        let request =
            v1::AttestRequest { host_id: "web".to_owned(), nonce, signature, csr: csr.clone(), ..Default::default() };
        desk.pki().attest(&request, "test")
    };
    attest().unwrap();
    desk.done(evict("web"));
    assert!(attest().unwrap_err().to_string().contains("was evicted"));
    desk.done(ban("web"));
    assert!(attest().unwrap_err().to_string().contains("is banned"));
    let done = desk.done(unban("web"));
    assert!(done.follows[0].contains("still is") && done.follows[0].contains("token create --host web"), "{done:?}");
    assert_eq!(desk.state_of("web"), "evicted", "a ban undone leads back to where the host was");
    assert!(attest().unwrap_err().to_string().contains("was evicted"));
}

#[test]
fn a_denied_identity_is_issued_to_nobody_until_it_is_allowed_again() {
    let desk = Desk::new();
    let web = desk.enrol("web");
    add_entry(desk.dir.path(), "web", "ns/shop/sa/payments", desk.now()).unwrap();
    let identity = || deny_whom::Whom::Identity("ns/shop/sa/payments".to_owned());
    desk.done(deny(identity()));
    let v1::issue_result::Outcome::Refusal(refusal) = desk.issue(&web[0], &workload("payments")).unwrap() else {
        panic!("a denied identity was issued")
    };
    assert!(refusal.message.contains("is denied"), "{}", refusal.message);
    let jwt = v1::IssueJwtRequest { spiffe_id: workload("payments").to_string(), audience: vec!["a".into()], ttl_s: 0 };
    assert!(desk.pki().issue_jwt(Some(&web[0]), &jwt, "test").unwrap_err().to_string().contains("is denied"));
    assert!(desk.refusal(deny(identity())).contains("denied already"));
    desk.pass(30 * DAY);
    let web = desk.enrol("web");
    assert_eq!(desk.denied(&web[0]), [Whom::Identity(workload("payments"))], "it does not end by itself");
    desk.done(allow(identity()));
    desk.leaf(&web[0], &workload("payments"));
    assert!(desk.refusal(allow(identity())).contains("not in the deny set"));
    let lines = (desk.audit_lines("deny_add"), desk.audit_lines("deny_remove"));
    assert_eq!((lines.0.len(), lines.1.len()), (1, 1));
    assert!(lines.0[0]["detail"].as_str().unwrap().contains("payments: test"), "{lines:?}");
}

#[test]
fn a_serial_is_denied_until_its_certificate_has_ended() {
    let desk = Desk::new();
    let (web, db) = (desk.enrol("web"), desk.enrol("db"));
    let text = serial(&web[0]).to_uppercase();
    let done = desk.done(deny(deny_whom::Whom::Serial(text)));
    assert!(done.what.contains("on host web"), "{done:?}");
    assert_eq!(desk.denied(&db[0]), [Whom::Serial(serial(&web[0]))]);
    assert!(desk.show("web").certificates[0].denied);
    desk.pass(DAY - HOUR);
    let db = desk.enrol("db");
    assert_eq!(desk.denied(&db[0]).len(), 1);
    desk.pass(2 * HOUR);
    assert!(desk.denied(&db[0]).is_empty());
    for bad in ["", "xyz", "0123456789012345678901234567890123456789a"] {
        let refused = desk.refusal(deny(deny_whom::Whom::Serial(bad.to_owned())));
        assert!(refused.contains("is not a serial"), "{refused}");
    }
}

#[test]
fn denying_a_host_cuts_what_it_holds_and_not_what_it_gets_next() {
    let desk = Desk::new();
    let (web, db) = (desk.enrol("web"), desk.enrol("db"));
    desk.done(deny(deny_whom::Whom::Host("web".to_owned())));
    assert_eq!(desk.denied(&db[0]), [Whom::Serial(serial(&web[0]))]);
    let next = chain_of(desk.renew("web", Some(&web[0])).unwrap());
    assert!(!desk.denied(&db[0]).contains(&Whom::Serial(serial(&next[0]))));
    let unknown = desk.refusal(deny(deny_whom::Whom::Host("wbe".to_owned())));
    assert!(unknown.contains("`wbe` is not enrolled; known hosts: db, web"), "{unknown}");
}

#[test]
fn an_authority_in_use_is_never_denied() {
    let desk = Desk::new();
    let web = desk.enrol("web");
    let status = desk.status();
    let id = |kind: &str, state: &str| {
        let found = desk.status().authorities.into_iter().find(|one| one.kind == kind && one.state == state);
        found.unwrap().id
    };
    for one in status.authorities {
        let refused = desk.refusal(deny(deny_whom::Whom::Authority(one.id.clone())));
        assert!(refused.contains(&format!("authority taint {}", one.id)), "{refused}");
    }
    desk.pass(3 * DAY + 1);
    let old = id("intermediate", "old");
    desk.done(deny(deny_whom::Whom::Authority(old)));
    let web = {
        assert!(desk.renew("web", Some(&web[0])).is_err(), "it ended in between");
        desk.enrol("web")
    };
    assert!(matches!(&desk.denied(&web[0])[..], [Whom::Authority(key)] if key.len() == 64));
    let refused = desk.refusal(deny(deny_whom::Whom::Authority("nonsense".to_owned())));
    assert!(refused.contains("there is no authority nonsense"), "{refused}");
    let refused = desk.refusal(deny(deny_whom::Whom::Identity("ns/meshd-system/sa/pki".to_owned())));
    assert!(refused.contains("the PKI itself"), "{refused}");
}

#[test]
fn the_deny_set_is_signed_anew_when_another_root_signs() {
    let desk = Desk::new();
    desk.enrol("web");
    desk.done(deny(deny_whom::Whom::Identity("ns/shop/sa/payments".to_owned())));
    // Past the first rotation and the removal of the first root.
    for _ in 0..50 {
        desk.pass(DAY);
    }
    let bundle = Bundle::from_jwks(domain(), &desk.pki().bundle(&[]).unwrap().jwks).unwrap();
    assert_eq!(bundle.roots.len(), 1, "the first root is gone");
    let web = desk.enrol("web");
    assert_eq!(desk.denied(&web[0]), [Whom::Identity(workload("payments"))]);
}

#[test]
fn the_blast_radius_is_what_root_on_the_host_could_be() {
    let desk = Desk::new();
    let web = desk.enrol("web");
    desk.enrol("db");
    for (host, identity) in [("web", "ns/shop/sa/payments"), ("web", "ns/shop/sa/gone"), ("db", "ns/shop/sa/payments")]
    {
        add_entry(desk.dir.path(), host, identity, desk.now()).unwrap();
    }
    desk.leaf(&web[0], &workload("gone"));
    meshd_pki::commands::remove_entry(desk.dir.path(), "web", "ns/shop/sa/gone", desk.now()).unwrap();
    desk.token("web", &[]).unwrap();
    let radius = desk.radius("web");
    let seen: Vec<_> = radius
        .identities
        .iter()
        .map(|one| (one.identity.as_str(), one.permitted, one.valid_certificates, one.other_hosts.join(" ")))
        .collect();
    let none = String::new;
    assert_eq!(
        seen,
        [
            ("ns/meshd-system/sa/web", true, 1, none()),
            ("ns/shop/sa/gone", false, 1, none()),
            ("ns/shop/sa/payments", true, 0, "db".to_owned()),
        ]
    );
    assert_eq!(radius.open_tokens.len(), 1);
    let unknown = desk.refusal(Command::HostBlastRadius(HostBlastRadius { host: "wbe".to_owned() }));
    assert!(unknown.contains("known hosts: db, web"), "{unknown}");
}

#[test]
fn hosts_and_the_deny_set_are_listed() {
    let desk = Desk::new();
    desk.enrol("web");
    desk.enrol("db");
    desk.done(ban("db"));
    let Reply::Hosts(hosts) = desk.ask(Command::HostList(HostList { after: String::new() })).unwrap() else {
        panic!("no hosts")
    };
    let seen: Vec<_> = hosts.hosts.iter().map(|one| (one.id.as_str(), one.state.as_str())).collect();
    assert_eq!(seen, [("db", "banned"), ("web", "active")]);
    let Reply::DenySet(set) = desk.ask(Command::DenyList(DenyList {})).unwrap() else { panic!("no deny set") };
    let kinds: Vec<_> = set.entries.iter().map(|one| (one.kind.as_str(), one.until.is_some())).collect();
    assert_eq!(kinds, [("identity", true), ("serial", true)]);
    assert!(!set.is_behind);
}

#[test]
fn more_hosts_than_one_reply_holds_are_listed_in_several() {
    let mut desk = Desk::new();
    desk.enrol("web");
    desk.pass(10);
    let mut list: serde_json::Value =
        serde_json::from_slice(&std::fs::read(desk.dir().join("hosts.json")).unwrap()).unwrap();
    let known = list["hosts"][0].clone();
    let named = |n: usize| {
        let mut host = known.clone();
        host["id"] = format!("host-{n:04}").into();
        host
    };
    list["hosts"] = (0..1200).map(named).collect();
    let roster = desk.dir().join("many.json");
    std::fs::write(&roster, list.to_string()).unwrap();
    desk.pki = None;
    let within = std::time::Duration::from_secs(HOUR);
    adopt(desk.dir(), &Adopt { roster: &roster, within, without_roots: false }, desk.now()).unwrap();
    desk.open();
    let page = |after: &str| match desk.ask(Command::HostList(HostList { after: after.to_owned() })).unwrap() {
        Reply::Hosts(hosts) => hosts,
        other => panic!("unexpected {other:?}"),
    };
    let first = page("");
    assert_eq!((first.hosts.len(), first.next.as_deref()), (1000, Some("host-0999")));
    let second = page("host-0999");
    assert_eq!((second.hosts.len(), second.next), (201, None), "and `web`");
}

#[test]
fn a_pki_restored_from_a_backup_waits_for_the_set_that_hosts_hold() {
    let desk = Desk::new();
    desk.enrol("web");
    std::fs::write(desk.dir.path().join("deny.floor"), format!("{}\n", u64::MAX / 2)).unwrap();
    let refused = desk.refusal(ban("web"));
    assert!(refused.contains("newer deny set") && refused.contains("host evict"), "{refused}");
    assert_eq!(desk.state_of("web"), "active", "nothing was done by half");
    desk.done(evict("web"));
}

#[test]
fn who_was_shut_out_moments_before_the_database_was_damaged_stays_out() {
    let mut desk = Desk::new();
    desk.enrol("web");
    desk.enrol("db");
    desk.pass(10);
    desk.done(ban("web"));
    desk.done(evict("db"));
    desk.pass(10);
    desk.pki = None;
    spoil(&desk.dir().join("pki.db"));
    desk.off_for(5);
    desk.open();
    assert_eq!((desk.state_of("web").as_str(), desk.state_of("db").as_str()), ("banned", "evicted"));
}

#[test]
fn a_ban_that_a_restored_backup_has_forgotten_comes_back_with_the_deny_set_of_hosts() {
    let mut desk = Desk::new();
    desk.enrol("web");
    let db = desk.enrol("db");
    desk.pass(10);
    let older = create(desk.dir(), desk.now()).unwrap();
    desk.done(ban("web"));
    let report = |desk: &Desk, deny_set: String| {
        let report = v1::SyncRequest { instance: "one".to_owned(), deny_set, ..v1::SyncRequest::default() };
        desk.pki().sync_report(Some(&db[0]), &report, "test").unwrap().deny_set
    };
    let held = report(&desk, String::new());
    desk.pass(10);
    desk.pki = None;
    restore(desk.dir(), Some(&older.path), desk.now()).unwrap();
    desk.open();
    assert_eq!(desk.state_of("web"), "active", "the backup is from before");
    report(&desk, held);
    assert_eq!(desk.state_of("web"), "banned");
    assert_eq!(desk.audit_lines("host_ban").len(), 2);
}

#[test]
fn a_host_whose_identity_is_denied_does_not_get_in_by_a_token() {
    let desk = Desk::new();
    let id = SpiffeId::host(&domain(), "web").unwrap().to_string();
    desk.done(deny(deny_whom::Whom::Identity(id)));
    let refused = desk.enrol_with(&desk.token("web", &[]).unwrap()).unwrap_err();
    assert!(matches!(&refused, Refused::Forbidden(text) if text.contains("is denied")), "{refused}");
}
