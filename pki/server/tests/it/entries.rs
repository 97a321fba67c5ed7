//! Entries for hosts with some labels, for some processes, for a shorter life.

use std::time::{Duration, SystemTime};

use meshd_pki::commands::{TokenRequest, add_entry, create_token};
use meshd_pki::entries::{EntryRequest, Parent, put_entry, remove_label_entry};
use meshd_pki::labels::Label;
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{EntryAdd, EntryList, EntryRemove, HostBlastRadius, HostShow, TokenCreate};
use meshd_pki_api::v1::IssueJwtRequest;
use meshd_pki_client::join;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::records::unix;
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
    let request = EntryRequest { selectors: &selectors, ttl, ..EntryRequest::new(parent, "ns/shop/sa/checkout") };
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
async fn an_entry_taken_away_leaves_what_is_still_good_to_whom_it_was_for() {
    let lab = Lab::start().await;
    let ours = labels(&["role=web"]);
    join_with(&lab, "web", &["role=web"]).await;
    put(&lab, Parent::Labels(&ours), &[UNIT], None).unwrap();
    let id = workload("checkout");
    let mut host = lab.host("web");
    host.want(&[&id]);
    host.until(|held| held.workloads.contains_key(&id)).await;
    remove_label_entry(&lab.state(), &ours, "ns/shop/sa/checkout", SystemTime::now()).unwrap();
    lab.pass(16 * 3600);
    host.want(&[]);
    host.want(&[&id]);
    let held = host.until(|held| held.refused.contains_key(&id)).await;
    assert!(held.workloads.contains_key(&id), "it is good to its end");
    assert_eq!(held.selectors[&id], [UNIT]);
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
    for selector in ["systemd:unit:web", "systemd:unit:a.slice", "unix:uid:root", "unix:gid:-1", "unix:path:a", "x"] {
        let error = put(&lab, Parent::Host("web"), &[selector], None).unwrap_err();
        assert!(error.contains(selector) && error.contains("systemd:unit:NAME.service"), "{error}");
    }
    let two_units = put(&lab, Parent::Host("web"), &[UNIT, "systemd:unit:b.service"], None).unwrap_err();
    assert!(two_units.contains("no process is both"), "{two_units}");
    let all = [UNIT, "unix:uid:7", "unix:gid:7", "unix:path:/usr/bin/a"];
    assert_eq!(put(&lab, Parent::Host("web"), &all, None), Ok(()));
    assert!(put(&lab, Parent::Host("wbe"), &[UNIT], None).unwrap_err().contains("neither enrolled"));
}

/// What web may hold, without terms yet.
const CHECKOUT_ON_WEB: EntryRequest<'_> = EntryRequest::new(Parent::Host("web"), "ns/shop/sa/checkout");

fn put_terms(lab: &Lab, request: &EntryRequest<'_>) -> Result<(), String> {
    put_entry(&lab.state(), request, lab.now()).map_err(|error| error.to_string())
}

#[tokio::test]
async fn an_entry_has_names_a_hint_the_life_of_tokens_and_an_end_that_nothing_outlives() {
    let lab = Lab::start().await;
    join_with(&lab, "web", &[]).await;
    let names = ["pay.example.org".to_owned()];
    let request = EntryRequest {
        dns_names: &names,
        hint: "internal",
        jwt_ttl: Some(Duration::from_secs(60)),
        expires_in: Some(Duration::from_secs(3600)),
        ..CHECKOUT_ON_WEB
    };
    put_terms(&lab, &request).unwrap();
    let id = workload("checkout");
    let mut host = lab.host("web");
    host.want(&[&id]);
    let held = host.until(|held| held.workloads.contains_key(&id)).await;
    drop(host);
    assert_eq!(lab.host("web").now().hints[&id], "internal", "over a restart");
    let svid = &held.workloads[&id];
    assert!(svid.not_after <= lab.now() + Duration::from_secs(3600), "it outlives its entry");
    let (_, parsed) = X509Certificate::from_der(&svid.chain[0]).unwrap();
    let names = parsed.subject_alternative_name().unwrap().unwrap().value.general_names.clone();
    assert!(names.contains(&GeneralName::DNSName("pay.example.org")) && names.len() == 2, "{names:?}");

    let token = |ttl_s| {
        let request = IssueJwtRequest { spiffe_id: id.to_string(), audience: vec!["ledger".to_owned()], ttl_s };
        lab.pki().issue_jwt(Some(&held.host.chain[0]), &request, "test")
    };
    for asked in [0, 600] {
        let life = token(asked).unwrap().not_after_unix - unix(lab.now());
        assert!((50..=60).contains(&life), "{asked}: {life}");
    }
    lab.pass(3600);
    let ended = token(0).unwrap_err().to_string();
    assert!(ended.contains("the PKI's entry for it ended at"), "{ended}");
    let mut host = lab.host("web");
    host.want(&[&id]);
    let refused = host.until(|held| held.refused.contains_key(&id)).await;
    assert!(refused.refused[&id].contains("ended at") && refused.refused[&id].contains("entry list"));
}

#[tokio::test]
async fn names_that_mean_others_and_hints_too_long_are_refused() {
    let lab = Lab::start().await;
    join_with(&lab, "web", &[]).await;
    for name in ["*.example.org", "Pay.example.org", "-a.example.org", "a..b", "", "10.0.0.1:80", "a b"] {
        let names = [name.to_owned()];
        let error = put_terms(&lab, &EntryRequest { dns_names: &names, ..CHECKOUT_ON_WEB }).unwrap_err();
        assert!(error.contains(&format!("`{name}` is no name of DNS")), "{error}");
    }
    let many: Vec<String> = (0..17).map(|number| format!("a{number}.example.org")).collect();
    let error = put_terms(&lab, &EntryRequest { dns_names: &many, ..CHECKOUT_ON_WEB }).unwrap_err();
    assert!(error.contains("at most 16"), "{error}");
    let long = "x".repeat(1025);
    for hint in [&long, "a\nb"] {
        let error = put_terms(&lab, &EntryRequest { hint, ..CHECKOUT_ON_WEB }).unwrap_err();
        assert!(error.contains("1024 bytes"), "{error}");
    }
}

#[tokio::test]
async fn operators_make_list_and_remove_entries_with_terms() {
    let lab = Lab::start().await;
    let asked = TokenCreate {
        host: "web".to_owned(),
        pki: vec![lab.address()],
        ttl_s: 600,
        max_uses: 2,
        from: vec!["127.0.0.0/8".to_owned()],
        labels: vec!["role=web".to_owned()],
        ..TokenCreate::default()
    };
    let Reply::Token(token) = lab.command(Command::TokenCreate(asked.clone())).unwrap() else { panic!("no token") };
    let id = join(&lab.host_dir("one"), &token.token.parse().unwrap(), None).await.unwrap().host_id;
    join(&lab.host_dir("two"), &token.token.parse().unwrap(), Some("web-two")).await.unwrap();
    let refusal = |command: Command| lab.command(command).unwrap_err().to_string();
    let from = TokenCreate { from: vec!["10.1.0.0/33".to_owned()], ..asked.clone() };
    assert!(refusal(Command::TokenCreate(from)).contains("`10.1.0.0/33` is no network"));
    let labels = TokenCreate { labels: vec!["role".to_owned()], ..asked };
    assert!(refusal(Command::TokenCreate(labels)).contains("`role` is no label"));

    let identity = || "ns/shop/sa/checkout".to_owned();
    let labels = || vec!["role=web".to_owned()];
    let entry = EntryAdd { identity: identity(), labels: labels(), ttl_s: Some(600), ..EntryAdd::default() };
    let entry = EntryAdd { selectors: vec![UNIT.to_owned()], ..entry };
    lab.command(Command::EntryAdd(entry.clone())).unwrap();
    let own = EntryAdd { host: id.clone(), identity: identity(), ..EntryAdd::default() };
    lab.command(Command::EntryAdd(own)).unwrap();
    let both = EntryAdd { host: id.clone(), ..entry.clone() };
    assert!(refusal(Command::EntryAdd(both)).contains("not both"));
    let neither = EntryAdd { labels: Vec::new(), ..entry };
    assert!(refusal(Command::EntryAdd(neither)).contains("name one"));

    let list = |host: &str| match lab.command(Command::EntryList(EntryList { host: host.to_owned() })).unwrap() {
        Reply::Entries(entries) => entries.entries,
        other => panic!("unexpected {other:?}"),
    };
    let (all, of_host) = (list(""), list(&id));
    assert_eq!((all.len(), of_host.len(), of_host[0].host.as_str()), (2, 1, id.as_str()));
    assert_eq!((&all[1].labels, &all[1].selectors, all[1].ttl_s), (&labels(), &vec![UNIT.to_owned()], Some(600)));

    let Reply::Host(host) = lab.command(Command::HostShow(HostShow { host: "web-two".to_owned() })).unwrap() else {
        panic!("no host")
    };
    assert_eq!(host.labels, ["role=web"]);
    assert_eq!(host.summary.unwrap().identities, [identity()]);
    let radius = lab.command(Command::HostBlastRadius(HostBlastRadius { host: "web-two".to_owned() })).unwrap();
    let Reply::BlastRadius(radius) = radius else { panic!("no radius") };
    let reach = radius.identities.iter().find(|one| one.identity == identity()).unwrap();
    assert!(reach.permitted && reach.other_hosts == [id.as_str()], "{reach:?}");

    let gone = EntryRemove { identity: identity(), labels: labels(), ..EntryRemove::default() };
    lab.command(Command::EntryRemove(gone.clone())).unwrap();
    assert!(refusal(Command::EntryRemove(gone)).contains("role=web"));
    assert_eq!(list("").len(), 1);
    let log = lab.audit_log();
    let by = log.lines().filter(|line| line.contains("entry_") && line.contains("\"by\":\"root\""));
    assert_eq!(by.count(), 3, "{log}");
}
