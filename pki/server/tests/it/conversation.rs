//! The conversation between a running host and its PKI: what changes is there at once, and what is lost is made good.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use data_encoding::BASE64;
use meshd_identity::statements::{DenySet, RecoveryStatement, Whom};
use meshd_identity::{Bundle, SpiffeId, sha256};
use meshd_pki::admin::run_on;
use meshd_pki::status::Status;
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{AuthorityList, AuthorityTaint, DenyAdd, DenyWhom, HostBan, HostUnban, deny_whom};
use meshd_pki_api::v1;
use meshd_pki_api::v1::host_server::Host as HostApi;
use meshd_pki_client::fake::FakeCa;
use meshd_pki_client::{Agent, Surroundings};
use rcgen::{KeyPair, PublicKeyData};
use tokio::sync::mpsc::channel;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status as Answer, Streaming};

use crate::authority::alice;
use crate::impostors::serve_as;
use crate::records::{copy, put_record, record, say, unix};
use crate::support::{Host, Lab, domain, eventually, workload};

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

fn acked(lab: &Lab, host: &str) -> u64 {
    let host: serde_json::Value =
        serde_json::from_str(&record(&lab.state(), &format!("host/{host}")).unwrap()).unwrap();
    host["acked_sequence"].as_u64().unwrap_or(0)
}

/// Whether a server runs or not.
fn deny(lab: &Lab, id: &SpiffeId) {
    let whom = Some(DenyWhom { whom: Some(deny_whom::Whom::Identity(id.to_string())) });
    let command = Command::DenyAdd(DenyAdd { whom, reason: String::new() });
    run_on(&lab.state(), &alice(), command, lab.now()).unwrap();
}

/// Anything from the PKI, an answer or a push.
async fn hears(lab: &Lab, host: &Host) {
    let since = unix(lab.now());
    eventually("it hears from the PKI", || host.metrics.last_heard_unix().is_some_and(|heard| heard > since)).await;
}

fn denies(set: &DenySet, id: &SpiffeId) -> bool {
    set.entries.iter().any(|entry| entry.whom == Whom::Identity(id.clone()))
}

async fn until_denied(host: &mut Host, id: &SpiffeId) {
    let wait = host.denied.wait_for(|set| denies(set, id));
    let found = tokio::time::timeout(Duration::from_secs(30), wait).await;
    assert!(found.is_ok_and(|set| set.is_ok()), "the deny set never came; last error {:?}", host.metrics.last_error());
}

#[tokio::test]
async fn a_new_root_reaches_a_running_host_at_once_and_is_acknowledged() {
    let lab = Lab::start().await;
    let joined = lab.join("web", &[]).await.unwrap();
    let mut host = lab.host("web");
    eventually("the first report", || host.metrics.is_connected()).await;
    lab.pass(7 * DAY + HOUR);
    // Its certificate has ended meanwhile; it comes back, and from then on hears.
    host.want(&[]);
    host.until(|held| held.bundle.roots.len() == 2 && held.host.not_after > lab.now()).await;
    let sequence = host.now().bundle.sequence;
    assert!(sequence > joined.bundle.sequence);
    eventually("the PKI knows that the host has it", || acked(&lab, "web") == sequence).await;
    let renewals = host.metrics.refreshes_ok();
    lab.pass(8 * HOUR);
    lab.pass(7 * DAY);
    host.until(|held| held.bundle.sequence > sequence).await;
    assert_eq!(host.metrics.refreshes_ok(), renewals, "it came without a renewal");
}

#[tokio::test]
async fn a_deny_set_reaches_running_hosts_and_survives_restarts_and_older_snapshots() {
    let lab = Lab::start().await;
    let evil = workload("evil");
    lab.join("web", &[]).await.unwrap();
    copy(&lab.host_dir("web"), &lab.host_dir("snapshot"));
    let mut host = lab.host("web");
    eventually("the first report", || host.metrics.is_connected()).await;
    deny(&lab, &evil);
    until_denied(&mut host, &evil).await;
    drop(host);
    fs::remove_dir_all(lab.host_dir("web")).unwrap();
    copy(&lab.host_dir("snapshot"), &lab.host_dir("web"));
    let agent = Agent::open_in(&lab.host_dir("web"), lab.surroundings()).unwrap();
    assert!(denies(&agent.denied().borrow(), &evil), "forgotten with the identity");
}

#[tokio::test]
async fn a_pki_restored_from_a_backup_learns_from_its_hosts_whom_it_denied() {
    let mut lab = Lab::start().await;
    let evil = workload("evil");
    lab.join("web", &[]).await.unwrap();
    lab.stop().await;
    let backup = lab.host_dir("backup");
    copy(&lab.state(), &backup);
    lab.run().await;
    let mut host = lab.host("web");
    eventually("the first report", || host.metrics.is_connected()).await;
    deny(&lab, &evil);
    until_denied(&mut host, &evil).await;
    let sequence = host.denied.borrow().sequence;
    lab.stop().await;
    fs::remove_dir_all(lab.state()).unwrap();
    copy(&backup, &lab.state());
    assert_eq!(record(&lab.state(), "deny"), None);
    lab.run().await;
    eventually("the PKI denies again", || {
        record(&lab.state(), "deny").is_some_and(|deny| deny.contains(evil.as_str()))
    })
    .await;
    // What it then says is newer than what the host lent it.
    host.denied.wait_for(|set| set.sequence > sequence).await.unwrap();
    assert!(denies(&host.denied.borrow(), &evil));
}

#[tokio::test]
async fn what_a_tainted_intermediate_signed_is_issued_anew_long_before_it_is_due() {
    let lab = Lab::start().await;
    let id = workload("payments");
    lab.join("web", &[&id]).await.unwrap();
    let surroundings = Surroundings { report_every: Duration::from_secs(1), ..lab.surroundings() };
    let mut host = Host::run(Agent::open_in(&lab.host_dir("web"), surroundings).unwrap());
    host.want(&[&id]);
    let before = host.until(|held| held.workloads.contains_key(&id)).await;
    let Reply::Authorities(list) = lab.command(Command::AuthorityList(AuthorityList {})).unwrap() else { panic!() };
    let tainted = list.authorities.into_iter().find(|one| one.kind == "intermediate").unwrap().id;
    lab.command(Command::AuthorityTaint(AuthorityTaint { id: tainted })).unwrap();
    eventually("the host hears of it", || host.metrics.is_connected()).await;
    hears(&lab, &host).await;
    hears(&lab, &host).await;
    // The longest that a host waits, drawn by each for itself.
    lab.pass(601);
    host.want(&[]);
    host.want(&[&id]);
    let after = host.until(|held| held.workloads[&id].serial != before.workloads[&id].serial).await;
    let signers = |svid: &meshd_pki_client::Svid| svid.chain[1].clone();
    assert_ne!(signers(&after.workloads[&id]), signers(&before.workloads[&id]));
    host.until(|held| signers(&held.host) != signers(&before.host)).await;
}

#[tokio::test]
async fn a_banned_host_gives_up_its_identities_when_it_is_told_and_has_them_again_when_the_ban_ends() {
    let lab = Lab::start().await;
    let id = workload("payments");
    lab.join("web", &[&id]).await.unwrap();
    let surroundings = || Surroundings { report_every: Duration::from_secs(1), ..lab.surroundings() };
    let run = || Host::run(Agent::open_in(&lab.host_dir("web"), surroundings()).unwrap());
    let mut host = run();
    host.want(&[&id]);
    let before = host.until(|held| held.workloads.contains_key(&id)).await;
    eventually("the first report", || host.metrics.is_connected()).await;
    lab.command(Command::HostBan(HostBan { host: "web".to_owned(), reason: String::new() })).unwrap();
    let banned = host.until(|held| held.banned).await;
    assert!(banned.workloads.is_empty() && banned.refused[&id].contains("host unban web"), "{banned:?}");
    drop(host);
    for generation in ["identity.0", "identity.1"] {
        let stored = fs::read_to_string(lab.host_dir("web").join(generation)).unwrap();
        assert!(!stored.contains(&BASE64.encode(before.workloads[&id].key.secret_der())), "the key is on disk");
    }
    let mut host = run();
    host.want(&[&id]);
    assert!(host.now().banned && host.now().workloads.is_empty(), "forgotten over a restart");
    lab.command(Command::HostUnban(HostUnban { host: "web".to_owned() })).unwrap();
    let back = host.until(|held| held.workloads.contains_key(&id)).await;
    assert!(!back.banned && back.workloads[&id].serial != before.workloads[&id].serial);
}

#[tokio::test]
async fn a_host_that_was_away_when_it_was_banned_is_told_by_what_is_signed() {
    let lab = Lab::start().await;
    let id = workload("payments");
    lab.join("web", &[&id]).await.unwrap();
    let mut host = lab.host("web");
    host.want(&[&id]);
    host.until(|held| held.workloads.contains_key(&id)).await;
    drop(host);
    lab.command(Command::HostBan(HostBan { host: "web".to_owned(), reason: String::new() })).unwrap();
    lab.pki().refresh().unwrap();
    let mut host = lab.host("web");
    assert!(!host.now().banned, "nobody has told it");
    let banned = host.until(|held| held.banned).await;
    assert!(banned.workloads.is_empty());
}

#[tokio::test]
async fn what_hangs_on_a_tainted_root_is_issued_anew_long_before_it_is_due() {
    let lab = Lab::start().await;
    let id = workload("payments");
    lab.join("web", &[&id]).await.unwrap();
    let surroundings = Surroundings { report_every: Duration::from_secs(1), ..lab.surroundings() };
    let mut host = Host::run(Agent::open_in(&lab.host_dir("web"), surroundings).unwrap());
    host.want(&[&id]);
    let before = host.until(|held| held.workloads.contains_key(&id)).await;
    let authorities = Status::read(&lab.state(), lab.now()).unwrap().authorities;
    let root = authorities.into_iter().find(|one| one.kind == "root").unwrap().id;
    lab.command(Command::AuthorityTaint(AuthorityTaint { id: root })).unwrap();
    // The next root is prepared, and signs when the host has it; only then is there something better to be had.
    let sequence = host.until(|held| held.bundle.roots.len() == 2).await.bundle.sequence;
    eventually("the PKI knows that the host has it", || acked(&lab, "web") == sequence).await;
    lab.pass(10);
    // The first may be an answer from before.
    hears(&lab, &host).await;
    hears(&lab, &host).await;
    lab.pass(601);
    host.want(&[]);
    host.want(&[&id]);
    let after = host.until(|held| held.host.serial != before.host.serial).await;
    assert!(before.host.not_after.duration_since(lab.now()).unwrap() > Duration::from_secs(23 * HOUR));
    assert_ne!(after.workloads[&id].serial, before.workloads[&id].serial);
}

#[tokio::test]
async fn a_next_recovery_key_is_pinned_when_the_current_one_names_it() {
    let lab = Lab::start().await;
    lab.join("web", &[]).await.unwrap();
    let next = KeyPair::generate().unwrap().subject_public_key_info();
    let statement = |key: &[u8], at| RecoveryStatement {
        trust_domain: domain(),
        issued_at: unix(lab.now()) + at,
        bundle: None,
        next_key: Some(BASE64.encode(key)),
    };
    let forged = meshd_identity::signed::sign(
        &KeyPair::generate().unwrap().serialize_der(),
        &statement(&KeyPair::generate().unwrap().subject_public_key_info(), 1),
    );
    let publish = |jws: String| {
        put_record(&lab.state(), "setting/recovery_statements", &serde_json::to_string(&[jws]).unwrap());
    };
    publish(forged.unwrap());
    let host = lab.host("web");
    eventually("the first report", || host.metrics.is_connected()).await;
    drop(host);
    let on_disk = || {
        ["identity.0", "identity.1"].iter().any(|slot| {
            let file = fs::read_to_string(lab.host_dir("web").join(slot)).unwrap_or_default();
            let state =
                file.split_once('\n').and_then(|(_, json)| serde_json::from_str::<serde_json::Value>(json).ok());
            let keys = state.map(|state| state["recovery_keys"].clone());
            keys.is_some_and(|keys| {
                keys.as_array().is_some_and(|keys| keys.len() == 2 && keys[1] == BASE64.encode(&next))
            })
        })
    };
    assert!(!on_disk());
    publish(say(&lab.state(), &statement(&next, 0)));
    let _host = lab.host("web");
    eventually("both keys are pinned on disk", on_disk).await;
}

#[tokio::test]
async fn a_conversation_is_resumed_with_a_new_certificate_and_after_a_restart_of_the_pki() {
    let mut lab = Lab::start().await;
    let evil = workload("evil");
    let joined = lab.join("web", &[]).await.unwrap();
    let mut host = lab.host("web");
    eventually("the first report", || host.metrics.is_connected()).await;
    lab.pass(12 * HOUR);
    host.want(&[]);
    host.until(|held| held.host.serial != joined.host.serial).await;
    lab.stop().await;
    eventually("the host notices", || !host.metrics.is_connected()).await;
    deny(&lab, &evil);
    lab.run().await;
    until_denied(&mut host, &evil).await;
}

/// A PKI with a stream that loses every push, and in its first conversation every answer.
struct Forgetful {
    bundle: v1::TrustBundle,
    conversations: Arc<AtomicU32>,
}

#[tonic::async_trait]
impl HostApi for Forgetful {
    async fn sync(
        &self,
        request: Request<Streaming<v1::SyncRequest>>,
    ) -> Result<Response<BoxStream<v1::SyncReply>>, Answer> {
        let (replies, stream) = channel(4);
        let first = self.conversations.fetch_add(1, SeqCst) == 0;
        let (bundle, mut reports) = (self.bundle.clone(), request.into_inner());
        tokio::spawn(async move {
            let mut seen = 0;
            while let Ok(Some(_)) = reports.message().await {
                seen += 1;
                // The first report is too early; the news comes up only in the answer to the next.
                let bundle = (seen > 1).then(|| bundle.clone());
                let reply = v1::SyncReply { bundle, ..v1::SyncReply::default() };
                if !first && replies.send(Ok(reply)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// Adds the root of another authority to the bundle on a host's disk.
fn believe_also(dir: &Path, held: &Bundle, ca: &FakeCa) -> Bundle {
    let roots = [held.roots.clone(), ca.bundle().roots].concat();
    hold(dir, Bundle::new(domain(), held.sequence, 300, roots).unwrap())
}

/// Puts another bundle on a host's disk.
fn hold(dir: &Path, bundle: Bundle) -> Bundle {
    let file = dir.join("identity.1");
    let content = fs::read_to_string(&file).unwrap();
    let (header, json) = content.split_once('\n').unwrap();
    let mut state: serde_json::Value = serde_json::from_str(json).unwrap();
    state["bundle"] = String::from_utf8(bundle.to_jwks()).unwrap().into();
    let covered = format!("{}\n{state}", header.split_once(' ').unwrap().1);
    let sum = data_encoding::HEXLOWER.encode(&sha256(covered.as_bytes()));
    fs::write(&file, format!("sha256={sum} {covered}")).unwrap();
    bundle
}

#[tokio::test]
async fn a_host_with_a_newer_bundle_than_its_pki_has_renews_all_the_same() {
    let lab = Lab::start().await;
    let joined = lab.join("web", &[]).await.unwrap();
    // As after a backup of the PKI was restored that is older than its last bundle.
    let newer = Bundle::new(domain(), joined.bundle.sequence + 1000, 300, joined.bundle.roots.clone()).unwrap();
    hold(&lab.host_dir("web"), newer.clone());
    lab.pass(12 * HOUR);
    let mut host = lab.host("web");
    let held = host.until(|held| held.host.serial != joined.host.serial).await;
    assert_eq!(held.bundle, newer);
    assert_eq!(host.metrics.last_error(), None);
    lab.pass(7 * DAY);
    host.want(&[]);
    host.until(|held| held.bundle.sequence > newer.sequence).await;
}

#[tokio::test]
async fn a_dead_stream_is_left_and_a_lost_push_is_in_the_answer_to_the_next_report() {
    let mut lab = Lab::start().await;
    let ca = FakeCa::new(domain());
    // Joined for real; then a server takes over that the host believes just as well.
    let joined = lab.join("web", &[]).await.unwrap();
    let (dir, address): (_, SocketAddr) = (lab.host_dir("web"), lab.address().parse().unwrap());
    lab.stop().await;
    let believed = believe_also(&dir, &joined.bundle, &ca);
    let sequence = believed.sequence + 1;
    let news = Bundle::new(domain(), sequence, 300, believed.roots).unwrap();
    let bundle = v1::TrustBundle { trust_domain: domain().to_string(), sequence, jwks: news.to_jwks() };
    let conversations = Arc::new(AtomicU32::new(0));
    let pki = ca.svid(&SpiffeId::pki(&domain()));
    serve_as(Forgetful { bundle, conversations: conversations.clone() }, &pki, address).await;
    let surroundings = Surroundings { report_every: Duration::from_secs(1), ..lab.surroundings() };
    let mut host = Host::run(Agent::open_in(&dir, surroundings).unwrap());
    host.until(|held| held.bundle.sequence == sequence).await;
    assert!(conversations.load(SeqCst) >= 2, "the first one was dead");
}
