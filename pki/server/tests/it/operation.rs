//! A PKI over days, with the clock in our hands.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, SystemTime};

use meshd_identity::{JoinToken, SpiffeId, inspect_svid};
use meshd_pki::commands::{CommandError, TokenRequest, add_entry, create_token};
use meshd_pki::lifetimes::Lifetimes;
use meshd_pki::pki::PkiError;
use meshd_pki::state_dir::StateError;
use meshd_pki::status::Status;
use meshd_pki::times::unix_ms;
use meshd_pki::upstream::watch::UpstreamFiles;
use meshd_pki::{Options, Pki, Refused, state_dir};
use meshd_pki_api::v1;
use rcgen::KeyPair;
use tempfile::TempDir;

use crate::support::{domain, request_over, workload};

pub(crate) const HOUR: u64 = 3600;
pub(crate) const DAY: u64 = 24 * HOUR;

/// A PKI without a server, whose clock only the test moves.
pub(crate) struct Desk {
    pub(crate) dir: TempDir,
    pub(crate) pki: Option<Pki>,
    start: SystemTime,
    pub(crate) passed: Arc<AtomicU64>,
    /// How far its wall clock is ahead, in seconds.
    pub(crate) ahead: Arc<AtomicU64>,
    pub(crate) lifetimes: Lifetimes,
    pub(crate) clock_is_right: bool,
    /// Of the intermediate from outside.
    pub(crate) upstream: Option<UpstreamFiles>,
}

impl Desk {
    pub(crate) fn new() -> Desk {
        Desk::with(Lifetimes::default())
    }

    pub(crate) fn with(lifetimes: Lifetimes) -> Desk {
        Desk::set_up(lifetimes, SystemTime::now())
    }

    pub(crate) fn starting(start: SystemTime) -> Desk {
        Desk::set_up(Lifetimes::default(), start)
    }

    fn set_up(lifetimes: Lifetimes, start: SystemTime) -> Desk {
        let dir = tempfile::tempdir().unwrap();
        state_dir::init(dir.path(), &domain(), None, start).unwrap();
        let (passed, ahead) = (Arc::default(), Arc::default());
        let mut desk = Desk { dir, pki: None, start, passed, ahead, lifetimes, clock_is_right: false, upstream: None };
        desk.open();
        desk
    }

    pub(crate) fn open(&mut self) {
        self.try_open().unwrap();
    }

    pub(crate) fn try_open(&mut self) -> Result<(), PkiError> {
        self.pki = None;
        let (start, passed, ahead) = (self.start, self.passed.clone(), self.ahead.clone());
        let right = Arc::new(move || start + Duration::from_secs(passed.load(SeqCst)));
        let options = Options::with_clock(self.lifetimes, right.clone());
        let clock = Arc::new(move || right() + Duration::from_secs(ahead.load(SeqCst)));
        let options = Options { clock, clock_is_right: self.clock_is_right, ..options };
        let options = Options { upstream: self.upstream.clone(), ..options };
        self.pki = Some(Pki::open(self.dir.path(), options)?);
        Ok(())
    }

    pub(crate) fn pki(&self) -> &Pki {
        self.pki.as_ref().unwrap()
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn metrics(&self) -> String {
        self.pki().metrics.encode()
    }

    pub(crate) fn now(&self) -> SystemTime {
        self.start + Duration::from_secs(self.passed.load(SeqCst))
    }

    pub(crate) fn pass(&self, seconds: u64) {
        self.off_for(seconds);
        self.pki().maintain().unwrap();
    }

    pub(crate) fn off_for(&self, seconds: u64) {
        self.passed.fetch_add(seconds, SeqCst);
    }

    pub(crate) fn token(&self, host: &str, allow: &[&str]) -> Result<JoinToken, CommandError> {
        let allow: Vec<String> = allow.iter().map(|id| (*id).to_owned()).collect();
        let ttl = Duration::from_secs(HOUR);
        let request =
            TokenRequest { host, allow: &allow, pki: &["10.0.0.1:15012".to_owned()], ttl, ..TokenRequest::default() };
        create_token(self.dir.path(), &request, self.now())
    }

    /// The chain of a host enrolled now.
    pub(crate) fn enrol(&self, host: &str) -> Vec<Vec<u8>> {
        let token = self.token(host, &[]).unwrap();
        self.enrol_with(&token).unwrap().svid.unwrap().chain
    }

    pub(crate) fn enrol_with(&self, token: &JoinToken) -> Result<v1::EnrollReply, Refused> {
        self.enrol_at(token, self.now())
    }

    pub(crate) fn enrol_at(&self, token: &JoinToken, host_time: SystemTime) -> Result<v1::EnrollReply, Refused> {
        let proof = v1::JoinTokenProof { id: token.id.clone(), secret: token.secret.0.to_vec() };
        let request = v1::EnrollRequest {
            attestation: Some(v1::enroll_request::Attestation::JoinToken(proof)),
            csr: request_over(&KeyPair::generate().unwrap()),
            host_time_unix_ms: unix_ms(host_time),
            ..v1::EnrollRequest::default()
        };
        self.pki().enrol(&request, "test")
    }

    pub(crate) fn renew(&self, host: &str, certificate: Option<&[u8]>) -> Result<v1::IssueBatchReply, Refused> {
        self.renew_holding(self.status().bundle_sequence, host, certificate)
    }

    /// Of a host that has that bundle.
    pub(crate) fn renew_holding(
        &self,
        bundle_sequence: u64,
        host: &str,
        certificate: Option<&[u8]>,
    ) -> Result<v1::IssueBatchReply, Refused> {
        let request = v1::IssueBatchRequest { bundle_sequence, ..self.renewal(host) };
        self.pki().issue_batch(certificate, &request, "test")
    }

    pub(crate) fn renewal(&self, host: &str) -> v1::IssueBatchRequest {
        let spiffe_id = SpiffeId::host(&domain(), host).unwrap().to_string();
        let csr = request_over(&KeyPair::generate().unwrap());
        let items = vec![v1::IssueItem { spiffe_id, csr }];
        v1::IssueBatchRequest {
            items,
            host_time_unix_ms: unix_ms(self.now()),
            bundle_sequence: self.status().bundle_sequence,
            ..v1::IssueBatchRequest::default()
        }
    }

    pub(crate) fn status(&self) -> Status {
        Status::read(self.dir.path(), self.now()).unwrap()
    }
}

pub(crate) fn chain_of(reply: v1::IssueBatchReply) -> Vec<Vec<u8>> {
    match reply.results.into_iter().next().unwrap().outcome {
        Some(v1::issue_result::Outcome::Svid(svid)) => svid.chain,
        other => panic!("expected a certificate, got {other:?}"),
    }
}

#[test]
fn the_intermediate_changes_every_three_days_and_the_bundle_does_not() {
    let desk = Desk::new();
    let first = desk.enrol("web");
    desk.pass(2 * DAY);
    assert_eq!(desk.enrol("db")[1], first[1], "two days on, the same intermediate signs");
    desk.pass(DAY + 1);
    let later = desk.enrol("cache");
    assert_ne!(later[1], first[1]);
    let status = desk.status();
    assert_eq!(status.authorities.iter().filter(|one| one.kind == "root").count(), 1);
    let intermediates: Vec<&str> =
        status.authorities.iter().filter(|one| one.kind == "intermediate").map(|one| one.state.as_str()).collect();
    assert_eq!(intermediates, ["old", "active"]);
}

#[test]
fn a_restart_keeps_the_intermediate() {
    let mut desk = Desk::new();
    let first = desk.enrol("web");
    desk.open();
    assert_eq!(desk.enrol("db")[1], first[1]);
}

#[test]
fn a_pki_that_was_off_for_months_starts_by_itself() {
    let mut desk = Desk::new();
    desk.enrol("web");
    desk.off_for(120 * DAY);
    desk.open();
    let chain = desk.enrol("web");
    assert!(inspect_svid(&chain[0]).unwrap().not_after > desk.now() + Duration::from_secs(23 * HOUR));
}

#[test]
fn a_pki_that_was_off_until_its_roots_had_ended_starts_with_a_new_one_and_enrols() {
    let mut desk = Desk::new();
    desk.enrol("web");
    let (before, sequence) = (desk.status().authorities.remove(0).id, desk.status().bundle_sequence);
    desk.passed.fetch_add(2 * 365 * DAY, SeqCst);
    desk.open();
    let chain = desk.enrol("web");
    assert!(inspect_svid(&chain[0]).unwrap().not_after > desk.now() + Duration::from_secs(23 * HOUR));
    let status = desk.status();
    let active: Vec<_> = status.authorities.iter().filter(|one| one.kind == "root" && one.state == "active").collect();
    assert!(active.len() == 1 && active[0].id != before, "{active:?}");
    assert!(status.bundle_sequence > sequence);
}

#[test]
fn a_certificate_is_judged_at_each_message_not_at_the_handshake() {
    let desk = Desk::new();
    let chain = desk.enrol("web");
    chain_of(desk.renew("web", Some(&chain[0])).unwrap());
    desk.pass(25 * HOUR);
    let refused = desk.renew("web", Some(&chain[0])).unwrap_err();
    assert!(matches!(&refused, Refused::Unauthenticated(text) if text.contains("ended at")), "{refused}");
}

#[test]
fn a_stolen_certificate_ends_when_its_host_joins_again() {
    let desk = Desk::new();
    let stolen = desk.enrol("web");
    desk.pass(HOUR);
    let stolen = chain_of(desk.renew("web", Some(&stolen[0])).unwrap());
    desk.pass(1);
    let own = desk.enrol("web");
    let refused = desk.renew("web", Some(&stolen[0])).unwrap_err();
    assert!(matches!(&refused, Refused::Unauthenticated(text) if text.contains("joined again")), "{refused}");
    chain_of(desk.renew("web", Some(&own[0])).unwrap());
}

#[test]
fn the_clock_of_a_new_host_is_on_record_from_its_first_message() {
    let desk = Desk::new();
    let token = desk.token("web", &[]).unwrap();
    let ahead = Duration::from_secs(HOUR);
    desk.enrol_at(&token, desk.now() + ahead).unwrap();
    assert_eq!(desk.status().hosts[0].clock_offset_ms, 3_600_000);
}

#[test]
fn issuing_needs_the_certificate_of_an_enrolled_host() {
    let desk = Desk::new();
    let refused = desk.renew("web", None).unwrap_err();
    assert!(matches!(&refused, Refused::Unauthenticated(text) if text.contains("meshd join")), "{refused}");
    let ca = meshd_pki_client::fake::FakeCa::new(domain());
    let of_workload = ca.svid(&workload("payments"));
    let refused = desk.renew("web", Some(&of_workload.chain[0])).unwrap_err();
    assert!(refused.to_string().contains("ns/shop/sa/payments"), "{refused}");
    let stranger = ca.svid(&SpiffeId::host(&domain(), "stranger").unwrap());
    let refused = desk.renew("web", Some(&stranger.chain[0])).unwrap_err();
    assert!(refused.to_string().contains("`stranger` is not enrolled"), "{refused}");
}

#[test]
fn a_refused_jwt_is_in_the_audit_log() {
    let desk = Desk::new();
    let request = v1::IssueJwtRequest { audience: vec!["billing".to_owned()], ..v1::IssueJwtRequest::default() };
    desk.pki().issue_jwt(None, &request, "test").unwrap_err();
    let log = std::fs::read_to_string(desk.dir.path().join("audit.jsonl")).unwrap();
    let refused = |line: &str| line.contains(r#""event":"issue_jwt","result":"refused""#);
    assert_eq!(log.lines().filter(|line| refused(line)).count(), 1);
}

#[test]
fn strangers_cannot_fill_the_audit_log() {
    let desk = Desk::new();
    let lines = || desk.status().audit_lines.unwrap();
    let before = lines();
    for _ in 0..200 {
        desk.renew("web", None).unwrap_err();
    }
    assert_eq!(lines() - before, 50);
}

#[test]
fn the_largest_batch_is_served_in_order() {
    let desk = Desk::new();
    let chain = desk.enrol("web");
    let csr = request_over(&KeyPair::generate().unwrap());
    let item = |n: usize| v1::IssueItem { spiffe_id: workload(&format!("w{n}")).to_string(), csr: csr.clone() };
    let names: Vec<String> = (0..250).map(|n| format!("ns/shop/sa/w{}", n * 2)).collect();
    for name in &names {
        add_entry(desk.dir.path(), "web", name, desk.now()).unwrap();
    }
    let request = v1::IssueBatchRequest { items: (0..500).map(item).collect(), ..v1::IssueBatchRequest::default() };
    let reply = desk.pki().issue_batch(Some(&chain[0]), &request, "test").unwrap();
    for (n, result) in reply.results.iter().enumerate() {
        assert_eq!(result.spiffe_id, workload(&format!("w{n}")).to_string());
        let issued = matches!(result.outcome, Some(v1::issue_result::Outcome::Svid(_)));
        assert_eq!(issued, n % 2 == 0, "w{n}");
    }
    let items = (0..501).map(item).collect();
    let refused = desk.pki().issue_batch(Some(&chain[0]), &v1::IssueBatchRequest { items, ..request }, "test");
    assert!(matches!(refused, Err(Refused::Invalid(text)) if text.contains("500 are allowed")));
}

#[test]
fn one_host_cannot_renew_as_another() {
    let desk = Desk::new();
    let (web, _) = (desk.enrol("web"), desk.enrol("db"));
    let reply = desk.renew("db", Some(&web[0])).unwrap();
    let outcome = reply.results.into_iter().next().unwrap().outcome;
    let Some(v1::issue_result::Outcome::Refusal(refusal)) = outcome else { panic!("a certificate of another host") };
    assert!(refusal.message.contains("host `web` claims ns/meshd-system/sa/db"), "{}", refusal.message);
    assert_eq!(refusal.code(), v1::refusal::Code::NotPermitted);
}

#[test]
fn the_enrolled_key_follows_the_host_and_the_old_one_stays_until_the_new_is_used() {
    let desk = Desk::new();
    let first = desk.enrol("web");
    let enrolled = || desk.status().hosts[0].key_sha256.clone();
    let at_enrolment = enrolled();
    let second = chain_of(desk.renew("web", Some(&first[0])).unwrap());
    assert_eq!(enrolled(), at_enrolment, "the reply may have been lost");
    desk.renew("web", Some(&second[0])).unwrap();
    assert_ne!(enrolled(), at_enrolment);
}

#[test]
fn an_expired_token_names_its_end_and_the_remedy() {
    let desk = Desk::new();
    let token = desk.token("web", &[]).unwrap();
    desk.pass(HOUR + 1);
    let refused = desk.enrol_with(&token).unwrap_err().to_string();
    assert!(refused.contains("expired at") && refused.contains("meshd-pki token create --host web"), "{refused}");
}

#[test]
fn without_an_audit_log_nobody_enrols_but_renewals_go_on() {
    let desk = Desk::new();
    let chain = desk.enrol("web");
    let token = desk.token("db", &[]).unwrap();
    let log = desk.dir.path().join("audit.jsonl");
    std::fs::rename(&log, desk.dir.path().join("moved")).unwrap();
    std::fs::create_dir(&log).unwrap();
    assert!(matches!(desk.enrol_with(&token), Err(Refused::Unavailable(_))));
    assert_eq!(desk.status().hosts.len(), 1, "the refused host was not admitted");
    chain_of(desk.renew("web", Some(&chain[0])).unwrap());
    assert!(desk.pki().metrics.encode().contains("meshd_pki_audit_failures_total 3"));
    std::fs::remove_dir(&log).unwrap();
    desk.enrol_with(&token).unwrap();
}

#[test]
fn status_shows_hosts_tokens_and_a_whole_audit_chain() {
    let desk = Desk::new();
    desk.enrol("web");
    desk.token("db", &["ns/shop/sa/ledger"]).unwrap();
    let status = desk.status();
    assert_eq!((status.hosts[0].id.as_str(), status.hosts[0].state.as_str()), ("web", "active"));
    assert_eq!(status.open_tokens.len(), 1);
    assert_eq!(status.open_tokens[0].identities, ["ns/shop/sa/ledger"]);
    assert_eq!(status.valid_certificates, 1);
    assert!(status.problems.is_empty(), "{:?}", status.problems);
    assert!(status.audit_lines.unwrap() >= 4);
    let text = status.to_text();
    assert!(text.contains("prod.example.org") && text.contains("chain whole"), "{text}");
}

#[test]
fn a_changed_audit_log_is_a_problem_in_status() {
    let desk = Desk::new();
    desk.enrol("web");
    let log = desk.dir.path().join("audit.jsonl");
    let text = std::fs::read_to_string(&log).unwrap();
    std::fs::write(&log, text.lines().skip(1).map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    assert!(desk.status().problems.iter().any(|problem| problem.contains("chain is broken")));
}

#[test]
fn identities_a_token_or_entry_cannot_carry_are_refused_where_they_are_typed() {
    let desk = Desk::new();
    let error = |result: Result<JoinToken, CommandError>| result.unwrap_err().to_string();
    assert!(error(desk.token("web", &["shop/payments"])).contains("ns/<namespace>/sa/<name>"));
    assert!(error(desk.token("web", &["spiffe://other/ns/a/sa/b"])).contains("another trust domain"));
    assert!(error(desk.token("web", &["ns/meshd-system/sa/pki"])).contains("namespace of hosts"));
    assert!(error(desk.token("pki", &[])).contains("reserved"));
    assert!(error(desk.token("a b", &[])).contains("host id"));
    let unknown = add_entry(desk.dir.path(), "wbe", "ns/shop/sa/x", desk.now()).unwrap_err().to_string();
    assert!(unknown.contains("`wbe`") && unknown.contains("known hosts: none"), "{unknown}");
}

#[test]
fn two_servers_do_not_share_a_state_directory() {
    let desk = Desk::new();
    let second = Pki::open(desk.dir.path(), Options::default());
    assert!(matches!(second.err().unwrap(), PkiError::State(StateError::Running { .. })));
}

#[test]
fn a_damaged_database_is_noticed_at_start() {
    let desk = Desk::new();
    desk.enrol("web");
    let dir: &Path = desk.dir.path();
    let copy = tempfile::tempdir().unwrap();
    for file in ["pki.db", "kek"] {
        std::fs::copy(dir.join(file), copy.path().join(file)).unwrap();
    }
    let database = copy.path().join("pki.db");
    let mut bytes = std::fs::read(&database).unwrap();
    let from = bytes.len().min(4096);
    bytes[from..].fill(0xa5);
    std::fs::write(&database, bytes).unwrap();
    assert!(Pki::open(copy.path(), Options::default()).is_err());
}

#[test]
fn lifetimes_that_cannot_work_are_refused_at_start() {
    let desk = Desk::new();
    let lifetimes = Lifetimes { leaf: Duration::from_secs(30 * DAY), ..Lifetimes::default() };
    let error = Pki::open(desk.dir.path(), Options { lifetimes, ..Options::default() }).err().unwrap();
    assert!(error.to_string().contains("--leaf-ttl"), "{error}");
}
