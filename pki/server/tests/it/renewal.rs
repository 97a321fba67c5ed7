use std::sync::Arc;
use std::time::{Duration, SystemTime};

use meshd_identity::{SpiffeId, inspect_svid};
use meshd_pki::commands::{add_entry, remove_entry};
use meshd_pki::lifetimes::Lifetimes;
use meshd_pki_client::{Agent, Surroundings};

use crate::support::{Host, Lab, domain, eventually, workload};

fn short() -> Lifetimes {
    Lifetimes { leaf: Duration::from_secs(8), ..Lifetimes::default() }
}

#[tokio::test]
async fn a_permitted_workload_gets_its_certificate_at_once() {
    let lab = Lab::start().await;
    let id = workload("payments");
    lab.join("web", &[&id]).await.unwrap();
    let mut host = lab.host("web");
    host.want(&[&id]);
    let held = host.until(|held| held.workloads.contains_key(&id)).await;
    let svid = &held.workloads[&id];
    assert_eq!(inspect_svid(&svid.chain[0]).unwrap().id, id);
    assert_ne!(svid.key.secret_der(), held.host.key.secret_der());
    assert_eq!(host.metrics.refreshes_ok(), 1);
    assert!(host.metrics.last_success_unix().is_some());
    assert!(host.metrics.clock_offset_ms().abs() < 5_000);
}

#[tokio::test]
async fn what_the_pki_does_not_permit_is_refused_and_both_sides_are_named() {
    let lab = Lab::start().await;
    let (mine, other) = (workload("payments"), workload("ledger"));
    let (somebody, foreign) =
        (SpiffeId::host(&domain(), "db").unwrap(), "spiffe://other/ns/shop/sa/x".parse().unwrap());
    lab.join("web", &[&mine]).await.unwrap();
    let mut host = lab.host("web");
    host.want(&[&mine, &other, &somebody, &foreign]);
    let held = host.until(|held| held.refused.len() == 3).await;
    assert!(held.workloads.contains_key(&mine), "the rest of the batch is served");
    let reason = &held.refused[&other];
    for part in
        ["host `web` claims ns/shop/sa/ledger", "permits it: ns/shop/sa/payments", "meshd-pki entry add --host web"]
    {
        assert!(reason.contains(part), "{part}: {reason}");
    }
    assert!(held.refused[&somebody].contains("meshd-system"), "{}", held.refused[&somebody]);
    assert!(held.refused[&foreign].contains("trust domain"), "{}", held.refused[&foreign]);
    assert_eq!(host.metrics.refreshes_failed(), 0, "a refusal is an answer");
}

#[tokio::test]
async fn an_entry_added_later_is_honoured() {
    let lab = Lab::start().await;
    let id = workload("ledger");
    lab.join("web", &[]).await.unwrap();
    let mut host = lab.host("web");
    host.want(&[&id]);
    host.until(|held| held.refused.contains_key(&id)).await;
    drop(host);
    assert!(add_entry(&lab.state(), "web", id.short(), SystemTime::now()).unwrap());
    let mut host = lab.host("web");
    host.want(&[&id]);
    let held = host.until(|held| held.workloads.contains_key(&id)).await;
    assert!(held.refused.is_empty());
    remove_entry(&lab.state(), "web", id.short(), SystemTime::now()).unwrap();
}

#[tokio::test]
async fn every_certificate_is_renewed_in_time_with_a_new_key() {
    let lab = Lab::start_with(short()).await;
    let id = workload("payments");
    lab.join("web", &[&id]).await.unwrap();
    let mut host = lab.host("web");
    host.want(&[&id]);
    let first = host.until(|held| held.workloads.contains_key(&id)).await;
    let second = host
        .until(|held| {
            held.host.serial != first.host.serial && held.workloads[&id].serial != first.workloads[&id].serial
        })
        .await;
    let share = |new: SystemTime, old: &meshd_pki_client::Svid| {
        let life = old.not_after.duration_since(old.issued_at).unwrap();
        new.duration_since(old.issued_at).unwrap().as_secs_f64() / life.as_secs_f64()
    };
    let at = share(second.host.issued_at, &first.host);
    // The schedule itself is tested as a pure function; a busy machine may be late.
    assert!((0.29..1.0).contains(&at), "renewed at {at} of its life");
    assert_ne!(second.host.key.secret_der(), first.host.key.secret_der());
    assert_ne!(second.workloads[&id].key.secret_der(), first.workloads[&id].key.secret_der());
    assert_eq!(host.metrics.refreshes_failed(), 0, "{:?}", host.metrics.last_error());
}

#[tokio::test]
async fn renewal_survives_a_restart_of_the_pki_on_the_same_state() {
    let mut lab = Lab::start_with(short()).await;
    let id = workload("payments");
    lab.join("web", &[&id]).await.unwrap();
    let mut host = lab.host("web");
    host.want(&[&id]);
    let before = host.until(|held| held.workloads.contains_key(&id)).await;
    lab.stop().await;
    eventually("a renewal fails while the PKI is down", || host.metrics.refreshes_failed() > 0).await;
    let during = host.now();
    assert_eq!(during.host.serial, before.host.serial, "a failure takes nothing away");
    assert!(during.workloads.contains_key(&id));
    assert!(host.metrics.last_error().unwrap().contains("cannot reach"), "{:?}", host.metrics.last_error());
    lab.run().await;
    let after = host.until(|held| held.host.serial != before.host.serial).await;
    assert_eq!(after.bundle, before.bundle);
    assert_eq!(host.metrics.last_error(), None);
}

#[tokio::test]
async fn an_agent_restarts_with_the_pki_down_and_has_everything() {
    let mut lab = Lab::start().await;
    let id = workload("payments");
    lab.join("web", &[&id]).await.unwrap();
    let mut host = lab.host("web");
    host.want(&[&id]);
    let before = host.until(|held| held.workloads.contains_key(&id)).await;
    drop(host);
    lab.stop().await;
    let agent = Agent::open(&lab.host_dir("web")).unwrap();
    let after = agent.watch().borrow().clone();
    assert_eq!(after.host.serial, before.host.serial);
    assert_eq!(after.workloads[&id].serial, before.workloads[&id].serial);
    assert_eq!(after.workloads[&id].key.secret_der(), before.workloads[&id].key.secret_der());
    assert_eq!(after.bundle, before.bundle);
}

#[tokio::test]
async fn a_full_disk_does_not_stop_renewal() {
    let lab = Lab::start().await;
    let id = workload("payments");
    lab.join("web", &[&id]).await.unwrap();
    let mut host = lab.host("web");
    // A directory where the next generation's temporary file should go: no write can succeed, even as root.
    let obstacle = lab.host_dir("web").join("identity.0.tmp");
    std::fs::create_dir(&obstacle).unwrap();
    host.want(&[&id]);
    let held = host.until(|held| held.workloads.contains_key(&id)).await;
    assert_eq!(host.metrics.store_failures(), 1);
    std::fs::remove_dir(&obstacle).unwrap();
    // Any wake-up writes what could not be written; a change of wishes is one.
    host.want(&[]);
    eventually("the credentials reach the disk", || {
        let stored = Agent::open(&lab.host_dir("web")).unwrap().watch().borrow().clone();
        stored.workloads.get(&id).is_some_and(|svid| svid.serial == held.workloads[&id].serial)
    })
    .await;
}

#[tokio::test]
async fn a_host_whose_clock_is_far_ahead_backs_off_and_says_so() {
    let lab = Lab::start().await;
    let joined = lab.join("web", &[]).await.unwrap();
    let fourteen_hours = Duration::from_secs(14 * 3600);
    let clock = Arc::new(move || SystemTime::now() + fourteen_hours);
    let surroundings = Surroundings { clock, ..Surroundings::default() };
    let mut host = Host::run(Agent::open_in(&lab.host_dir("web"), surroundings).unwrap());
    host.until(|held| held.host.serial != joined.host.serial).await;
    eventually("the agent notices that new certificates look old", || host.metrics.refreshes_failed() > 0).await;
    let error = host.metrics.last_error().unwrap();
    assert!(error.contains("ahead of the PKI's") && error.contains("NTP"), "{error}");
    assert!(host.metrics.clock_offset_ms() > 13 * 3_600_000);
    assert!(host.metrics.refreshes_ok() <= 2, "{} renewals in a row", host.metrics.refreshes_ok());
}
