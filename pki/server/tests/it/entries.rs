//! Entries for hosts with some labels, for some processes, for a shorter life.

use std::time::{Duration, SystemTime};

use meshd_pki::commands::{TokenRequest, add_entry, create_token};
use meshd_pki::entries::{EntryRequest, Parent, put_entry, remove_label_entry};
use meshd_pki::labels::Label;
use meshd_pki_client::join;

use crate::support::{Lab, workload};

const UNIT: &str = "systemd:unit:checkout.service";

fn labels(all: &[&str]) -> Vec<Label> {
    all.iter().map(|text| text.parse().unwrap()).collect()
}

async fn join_with(lab: &Lab, host: &str, all: &[&str]) {
    let (pki, labels) = ([lab.address()], labels(all));
    let request = TokenRequest { host, pki: &pki, labels: &labels, ..TokenRequest::default() };
    let token = create_token(&lab.state(), &request, SystemTime::now()).unwrap();
    join(&lab.host_dir(host), &token, None).await.unwrap();
}

fn put(lab: &Lab, parent: Parent<'_>, selectors: &[&str], ttl: Option<Duration>) -> Result<(), String> {
    let selectors: Vec<String> = selectors.iter().map(|one| (*one).to_owned()).collect();
    let request = EntryRequest { parent, identity: "ns/shop/sa/checkout", selectors: &selectors, ttl };
    put_entry(&lab.state(), &request, SystemTime::now()).map_err(|error| error.to_string())
}

#[tokio::test]
async fn hosts_with_all_labels_of_an_entry_may_hold_its_identity_and_others_may_not() {
    let lab = Lab::start().await;
    join_with(&lab, "both", &["role=web", "site=a"]).await;
    join_with(&lab, "one", &["role=web"]).await;
    let meant = labels(&["role=web", "site=a"]);
    put(&lab, Parent::Labels(&meant), &[], None).unwrap();
    let id = workload("checkout");
    let (mut both, mut one) = (lab.host("both"), lab.host("one"));
    both.want(&[&id]);
    both.until(|held| held.workloads.contains_key(&id)).await;
    one.want(&[&id]);
    let refused = one.until(|held| held.refused.contains_key(&id)).await;
    assert!(refused.refused[&id].contains("host `one` claims ns/shop/sa/checkout"));
    drop(both);
    remove_label_entry(&lab.state(), &meant, "ns/shop/sa/checkout", SystemTime::now()).unwrap();
    let again = remove_label_entry(&lab.state(), &meant, "ns/shop/sa/checkout", SystemTime::now()).unwrap_err();
    assert!(again.to_string().contains("role=web,site=a"), "{again}");
    assert!(lab.audit_log().contains("hosts with role=web,site=a; selectors: "));
}

#[tokio::test]
async fn a_host_is_told_whose_an_identity_is_and_remembers() {
    let lab = Lab::start().await;
    join_with(&lab, "web", &["role=web"]).await;
    put(&lab, Parent::Labels(&labels(&["role=web"])), &["unix:uid:7"], None).unwrap();
    // The host's own entry is closer.
    put(&lab, Parent::Host("web"), &[UNIT], None).unwrap();
    let id = workload("checkout");
    let mut host = lab.host("web");
    host.want(&[&id]);
    let held = host.until(|held| held.workloads.contains_key(&id)).await;
    assert_eq!(held.selectors[&id], [UNIT]);
    drop(host);
    assert_eq!(lab.host("web").now().selectors[&id], [UNIT], "over a restart");
    // An entry made the plain way is there already, and keeps its terms.
    assert!(!add_entry(&lab.state(), "web", "ns/shop/sa/checkout", SystemTime::now()).unwrap());
}

#[tokio::test]
async fn an_entry_can_shorten_lives_and_never_lengthen_them() {
    let lab = Lab::start().await;
    join_with(&lab, "web", &[]).await;
    let id = workload("checkout");
    for (asked, most) in [(600, 600), (30 * 86_400, 86_400)] {
        put(&lab, Parent::Host("web"), &[], Some(Duration::from_secs(asked))).unwrap();
        let mut host = lab.host("web");
        host.want(&[&workload("none"), &id]);
        let held = host.until(|held| held.workloads.contains_key(&id)).await;
        let life = held.workloads[&id].not_after.duration_since(held.workloads[&id].issued_at).unwrap().as_secs();
        assert!(life <= most && life > most - 60, "{asked}: {life}");
        drop(host);
        // Asked for anew by the next agent.
        std::fs::remove_dir_all(lab.host_dir("web")).unwrap();
        join_with(&lab, "web", &[]).await;
    }
}

#[tokio::test]
async fn selectors_no_host_can_attest_are_refused_when_they_are_made() {
    let lab = Lab::start().await;
    join_with(&lab, "web", &[]).await;
    for selector in ["systemd:unit:web", "systemd:unit:a.slice", "unix:uid:root", "unix:gid:7", "unix:path:/bin/a", "x"]
    {
        let error = put(&lab, Parent::Host("web"), &[selector], None).unwrap_err();
        assert!(error.contains(selector) && error.contains("systemd:unit:NAME.service"), "{error}");
    }
    assert!(put(&lab, Parent::Host("web"), &[UNIT, "unix:uid:7"], None).unwrap_err().contains("give one"));
    assert!(put(&lab, Parent::Host("wbe"), &[UNIT], None).unwrap_err().contains("neither enrolled"));
}
