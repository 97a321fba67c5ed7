//! A PKI is lost with everything in it, and another takes its place: its hosts come back, nobody else does.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use meshd_pki::admin::{Actor, Role, run_on};
use meshd_pki::adoption::{Adopt, Adopted, adopt};
use meshd_pki::recovery::{Request, vouch};
use meshd_pki::state_dir;
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{DenyList, HostBan, RecoveryImport, RecoveryRequest};

use crate::support::{Lab, domain, eventually, workload};

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

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

    fn as_operator(&self, command: Command) -> Reply {
        let actor = Actor { name: "alice".to_owned(), role: Role::Admin };
        run_on(&self.state(), &actor, command, self.now()).unwrap()
    }

    fn denied(&self) -> usize {
        match self.as_operator(Command::DenyList(DenyList {})) {
            Reply::DenySet(set) => set.entries.len(),
            other => panic!("unexpected {other:?}"),
        }
    }
}

#[tokio::test]
async fn hosts_keep_what_they_have_until_all_know_the_new_pki_and_then_renew_with_it() {
    let mut lab = Lab::start().await;
    let (payments, checkout) = (workload("payments"), workload("checkout"));
    let old = lab.join("api", &[&payments]).await.unwrap();
    lab.join("web", &[&checkout]).await.unwrap();
    lab.join("gone", &[]).await.unwrap();
    lab.as_operator(Command::HostBan(HostBan { host: "gone".to_owned(), reason: String::new() }));
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
    assert_eq!(lab.adopt(false).unwrap().known, 3, "a second time does no harm");
    lab.vouch();
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
    lab.as_operator(Command::HostBan(HostBan { host: "banned".to_owned(), reason: String::new() }));
    lab.copy_list();
    lab.join("unlisted", &[]).await.unwrap();
    lab.lose_pki().await;
    lab.adopt(false).unwrap();
    lab.vouch();
    lab.run().await;
    lab.pass(8 * DAY);
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
    lab.adopt(true).unwrap();
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
