//! A PKI is lost with everything in it, and another takes its place: its hosts come back, nobody else does.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use meshd_pki::admin::{Actor, AdminError, Role, run_on};
use meshd_pki::adoption::{Adopt, Adopted, adopt};
use meshd_pki::recovery::{Request, vouch};
use meshd_pki::state_dir;
use meshd_pki::status::Status;
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{DenyList, EntryAdd, HostBan, HostUnban, RecoveryImport, RecoveryRequest};

use serde_json::{Value, json};

use crate::support::{Lab, domain, eventually, workload};

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

type Forge = fn(&mut Value);

fn ban(host: &str) -> Command {
    Command::HostBan(HostBan { host: host.to_owned(), reason: String::new() })
}

impl Lab {
    fn list(&self) -> PathBuf {
        self.file("hosts.json")
    }

    /// As an operator does, to a place of its own.
    fn copy_list(&self) {
        self.pki().maintain().unwrap();
        fs::copy(self.state().join("hosts.json"), self.list()).unwrap();
    }

    /// Nothing stays but the offline recovery key, and what was copied. Half a day later there is another PKI.
    async fn lose_pki(&mut self) {
        fs::rename(self.state().join("recovery.key"), self.file("offline.key")).unwrap();
        self.stop().await;
        fs::remove_dir_all(self.state()).unwrap();
        self.pass(12 * HOUR);
        state_dir::init(&self.state(), &domain(), None, self.now()).unwrap();
    }

    fn adopt(&self, without_roots: bool) -> anyhow::Result<Adopted> {
        let within = Duration::from_secs(7 * DAY);
        adopt(&self.state(), &Adopt { roster: &self.list(), within, without_roots }, self.now())
    }

    fn vouch(&self) {
        let wish = self.as_operator(Command::RecoveryRequest(RecoveryRequest {}));
        let request: Request = serde_json::from_value(serde_json::to_value(&wish).unwrap()).unwrap();
        let signed = vouch(&self.file("offline.key"), &request, self.now()).unwrap();
        let (statement, signed_by) = (signed.statement, signed.signed_by);
        self.as_operator(Command::RecoveryImport(RecoveryImport { statement, signed_by }));
    }

    fn try_as_operator(&self, command: Command) -> Result<Reply, AdminError> {
        let actor = Actor { name: "alice".to_owned(), role: Role::Admin };
        run_on(&self.state(), &actor, command, self.now())
    }

    fn as_operator(&self, command: Command) -> Reply {
        self.try_as_operator(command).unwrap()
    }

    fn denied(&self) -> usize {
        self.deny_set().len()
    }

    fn deny_set(&self) -> Vec<String> {
        match self.as_operator(Command::DenyList(DenyList {})) {
            Reply::DenySet(set) => set.entries.into_iter().map(|one| one.value).collect(),
            other => panic!("unexpected {other:?}"),
        }
    }

    fn status(&self) -> Status {
        Status::read(&self.state(), self.now()).unwrap()
    }

    fn roots(&self) -> Vec<String> {
        let roots = self.status().authorities.into_iter().filter(|one| one.kind == "root");
        roots.map(|one| one.state).collect()
    }

    /// The list as somebody made it who could.
    fn forge(&self, act: impl FnOnce(&mut Value)) {
        let mut list: Value = serde_json::from_slice(&fs::read(self.list()).unwrap()).unwrap();
        act(&mut list);
        fs::write(self.list(), list.to_string()).unwrap();
    }
}

#[tokio::test]
async fn hosts_keep_what_they_have_until_all_know_the_new_pki_and_then_renew_with_it() {
    let mut lab = Lab::start().await;
    let (payments, checkout) = (workload("payments"), workload("checkout"));
    let old = lab.join("api", &[&payments]).await.unwrap();
    lab.join("web", &[&checkout]).await.unwrap();
    lab.join("gone", &[]).await.unwrap();
    lab.as_operator(ban("gone"));
    let denied = lab.denied();
    let mut running = Vec::new();
    for (name, id) in [("api", &payments), ("web", &checkout)] {
        let mut host = lab.host(name);
        host.want(&[id]);
        host.until(|held| held.workloads.contains_key(id)).await;
        eventually("it knows who is denied", || host.denied.borrow().entries.len() == denied).await;
        running.push(host);
    }
    lab.copy_list();
    lab.lose_pki().await;
    drop(running);
    let adopted = lab.adopt(false).unwrap();
    assert_eq!((adopted.hosts, adopted.known, adopted.entries), (3, 0, 2));
    assert_eq!((adopted.list.banned, adopted.list.roots.len(), adopted.list.is_ours), (1, 1, false));
    assert_eq!(lab.adopt(false).unwrap().known, 3, "a second time does no harm");
    let refused = lab.try_as_operator(ban("web")).unwrap_err().to_string();
    assert!(refused.contains("hosts hold a newer deny set"), "{refused}");
    lab.vouch();
    // Its address has to be moved first.
    lab.pass(HOUR);
    lab.run().await;

    // Both are due. One comes back; what it got now, the other would not believe.
    let mut web = lab.host("web");
    web.want(&[&checkout]);
    let knows = web.until(|held| held.bundle.roots.len() == 2).await;
    assert!(knows.bundle.roots.contains(&old.bundle.roots[0]), "the other is still believed");
    let waits = || web.metrics.last_error().is_some_and(|error| error.contains("1 hosts do not know the roots"));
    eventually("it waits for the other", waits).await;
    let under_old = web.now().host.chain[1].clone();
    assert_eq!(under_old, knows.host.chain[1]);

    let mut api = lab.host("api");
    api.want(&[&payments]);
    let renewed = api.until(|held| held.host.chain[1] != under_old && held.workloads.contains_key(&payments)).await;
    let signs = renewed.host.chain[1].clone();
    api.until(|held| held.workloads[&payments].chain[1] == signs).await;
    web.until(|held| held.host.chain[1] == signs && held.workloads[&checkout].chain[1] == signs).await;
    eventually("hosts have told whom they deny", || lab.denied() == denied).await;
    let log = lab.audit_log();
    assert!(log.contains("\"event\":\"host_adopt\"") && log.contains("\"event\":\"root_adopt\""), "{log}");
}

#[tokio::test]
async fn whoever_is_not_on_the_list_or_banned_or_late_stays_out() {
    let mut lab = Lab::start().await;
    for name in ["web", "banned"] {
        lab.join(name, &[]).await.unwrap();
    }
    lab.as_operator(ban("banned"));
    lab.copy_list();
    lab.join("unlisted", &[]).await.unwrap();
    lab.lose_pki().await;
    lab.adopt(false).unwrap();
    lab.vouch();
    lab.run().await;
    let advice = |lab: &Lab| lab.status().advice.join("; ");
    assert!(advice(&lab).contains("1 hosts of the PKI before have not come back; they may until"), "{}", advice(&lab));
    lab.pass(8 * DAY);
    assert!(advice(&lab).contains("they had until") && !advice(&lab).contains("they may"), "{}", advice(&lab));
    for (name, why) in [("unlisted", "is not enrolled here"), ("banned", "`banned` is banned"), ("web", "had until")] {
        let host = lab.host(name);
        eventually(name, || host.metrics.last_error().is_some_and(|error| error.contains(why))).await;
        assert!(host.now().host.not_after < lab.now(), "{name} got a certificate");
    }
}

#[tokio::test]
async fn where_the_keys_were_stolen_hosts_come_back_by_their_key_and_believe_nothing_of_the_old_roots() {
    let mut lab = Lab::start().await;
    let old = lab.join("web", &[]).await.unwrap();
    lab.copy_list();
    lab.lose_pki().await;
    assert!(lab.adopt(true).unwrap().list.roots.is_empty());
    lab.vouch();
    lab.run().await;
    let mut web = lab.host("web");
    let held = web.until(|held| held.host.serial != old.host.serial).await;
    assert_eq!(held.bundle.roots.len(), 1);
    assert!(!held.bundle.roots.contains(&old.bundle.roots[0]));
    assert!(lab.audit_log().contains("adopted from the PKI before"), "{}", lab.audit_log());
}

#[tokio::test]
async fn a_list_of_another_trust_domain_or_none_is_refused() {
    let mut lab = Lab::start().await;
    lab.copy_list();
    lab.lose_pki().await;
    let list = fs::read_to_string(lab.list()).unwrap();
    fs::write(lab.list(), list.replace("prod.example.org", "other.example.org")).unwrap();
    let refused = lab.adopt(false).unwrap_err().to_string();
    assert!(refused.contains("`other.example.org`"), "{refused}");
    fs::write(lab.list(), "{}").unwrap();
    let refused = lab.adopt(false).unwrap_err().to_string();
    assert!(refused.contains("is no hosts.json"), "{refused}");
    assert!(!list.contains("wrapped_key"), "{list}");
}

#[tokio::test]
async fn what_somebody_put_into_a_list_that_no_pki_writes_is_refused() {
    let mut lab = Lab::start().await;
    lab.join("web", &[&workload("checkout")]).await.unwrap();
    lab.copy_list();
    lab.lose_pki().await;
    let list = fs::read(lab.list()).unwrap();
    let forged: [(&str, Forge); 6] = [
        ("a sequence of it is from", |list| list["sequence"] = json!(u64::MAX)),
        ("a sequence of it is from", |list| list["deny_sequence"] = json!(u64::MAX)),
        ("host `a/b`", |list| list["hosts"][0]["id"] = json!("a/b")),
        ("meshd-system", |list| {
            list["entries"][0]["spiffe_id"] = json!("spiffe://prod.example.org/ns/meshd-system/sa/db");
        }),
        ("its certificate is of", |list| list["roots"][0]["id"] = json!("00112233445566778899aabbccddeeff")),
        ("root `", |list| list["roots"][0]["certificate"] = json!("AAAA")),
    ];
    for (why, forge) in forged {
        fs::write(lab.list(), &list).unwrap();
        lab.forge(forge);
        let refused = format!("{:#}", lab.adopt(false).unwrap_err());
        assert!(refused.contains(why), "{why}: {refused}");
    }
    assert!(lab.status().hosts.is_empty(), "nothing is taken over by half");
    fs::write(lab.list(), &list).unwrap();
    lab.forge(|list| list["roots"][0]["not_after"] = json!(i64::MAX));
    lab.adopt(false).unwrap();
    let authorities = lab.status().authorities;
    assert!(authorities.iter().all(|one| one.not_after.starts_with("20")), "the certificate says when it ends");
}

#[tokio::test]
async fn of_the_old_roots_those_in_use_stay_and_the_new_pki_keeps_its_own_calendar() {
    let mut lab = Lab::start().await;
    for _ in 0..12 {
        lab.pass(DAY);
    }
    assert_eq!(lab.roots(), ["old", "active"]);
    lab.copy_list();
    lab.lose_pki().await;
    assert_eq!(lab.adopt(false).unwrap().list.roots.len(), 1, "nothing under the first can be valid");
    assert_eq!(lab.roots(), ["old", "active"]);
    lab.run().await;
    lab.pass(7 * DAY);
    assert_eq!(lab.roots(), ["old", "active", "prepared"], "its first root is replaced after a week");
}

#[tokio::test]
async fn a_host_with_short_lived_identities_waits_for_others_half_their_life_at_most() {
    let mut lab = Lab::start().await;
    let checkout = workload("checkout");
    for name in ["web", "api"] {
        lab.join(name, &[&checkout]).await.unwrap();
    }
    let (host, identity, ttl_s) = ("web".to_owned(), checkout.to_string(), Some(300));
    lab.as_operator(Command::EntryAdd(EntryAdd { host, identity, ttl_s, ..EntryAdd::default() }));
    lab.copy_list();
    lab.lose_pki().await;
    lab.adopt(false).unwrap();
    lab.vouch();
    lab.run().await;
    let web = lab.host("web");
    web.want(&[&checkout]);
    let waits = || web.metrics.last_error().is_some_and(|error| error.contains("do not know the roots"));
    eventually("it waits for the other", waits).await;
    let has_reported = || lab.status().hosts.iter().any(|host| host.id == "web" && host.bundle_sequence > 0);
    eventually("its report is on record", has_reported).await;
    drop(web);
    lab.pass(160);
    let mut web = lab.host("web");
    web.want(&[&checkout]);
    web.until(|held| held.workloads.contains_key(&checkout)).await;
}

#[tokio::test]
async fn a_ban_refuses_what_the_lost_pki_gave_the_host_and_cuts_nobody_else_off() {
    let mut lab = Lab::start().await;
    let (alone, shared) = (workload("checkout"), workload("payments"));
    lab.join("web", &[&alone, &shared]).await.unwrap();
    lab.join("api", &[&shared]).await.unwrap();
    lab.copy_list();
    lab.lose_pki().await;
    lab.adopt(false).unwrap();
    let Reply::Done(done) = lab.as_operator(ban("web")) else { panic!("no ban") };
    let system = "spiffe://prod.example.org/ns/meshd-system/sa/web".to_owned();
    assert_eq!(lab.deny_set(), [system, alone.to_string()]);
    let said = done.follows.join("; ");
    assert!(said.contains("nobody is believed to be ns/shop/sa/checkout"), "{said}");
    assert!(said.contains("--identity ns/shop/sa/payments` cuts them off, and api, too"), "{said}");
    lab.as_operator(Command::HostUnban(HostUnban { host: "web".to_owned() }));
    assert_eq!(lab.denied(), 0);
    lab.pass(25 * HOUR);
    lab.as_operator(ban("web"));
    assert_eq!(lab.denied(), 1, "everything from before has ended");
}
