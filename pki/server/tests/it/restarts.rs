//! What a host's agent goes on with when it is started again: after a defect, or after a snapshot was put back.

use std::collections::BTreeSet;
use std::fs;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::Poll;
use std::time::Duration;

use data_encoding::BASE64;
use meshd_pki_api::admin::HostBan;
use meshd_pki_api::admin::command::Command;
use meshd_pki_client::{Agent, Surroundings};
use tokio::sync::watch;

use crate::records::copy;
use crate::support::{Lab, eventually, workload};

/// Whether it ended by a panic.
async fn panics(running: impl Future<Output = ()>) -> bool {
    let mut running = pin!(running);
    let polled = poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| running.as_mut().poll(context))) {
        Ok(polled) => polled.map(|()| false),
        Err(_) => Poll::Ready(true),
    });
    polled.await
}

#[tokio::test]
async fn a_conversation_that_panics_is_told_and_held_again_and_renewal_goes_on() {
    let lab = Lab::start().await;
    let id = workload("payments");
    lab.join("web", &[&id]).await.unwrap();
    // The agent runs in the test's own task, its conversation in another: what asks for the time there is a report.
    let (armed, clock) = (Arc::new(AtomicBool::new(false)), lab.surroundings().clock);
    let trap = armed.clone();
    let defective = Surroundings::with_clock(Arc::new(move || {
        assert!(tokio::task::try_id().is_none() || !trap.swap(false, SeqCst), "a defect");
        clock()
    }));
    let surroundings = Surroundings { report_every: Duration::from_millis(200), ..defective };
    let mut agent = Agent::open_in(&lab.host_dir("web"), surroundings).unwrap();
    let (metrics, mut credentials) = (agent.metrics(), agent.watch());
    let (wishes, mut wanted) = watch::channel(BTreeSet::new());
    let first = async {
        eventually("a conversation", || metrics.is_connected()).await;
        armed.store(true, SeqCst);
    };
    let (panicked, ()) = tokio::join!(panics(agent.work(&mut wanted)), first);
    assert!(panicked, "whoever supervises it must learn of it");
    wishes.send_replace(BTreeSet::from([id.clone()]));
    let again = async {
        credentials.wait_for(|held| held.workloads.contains_key(&id)).await.unwrap();
        eventually("another conversation", || metrics.is_connected()).await;
    };
    tokio::select! {
        () = agent.work(&mut wanted) => panic!("it ended once more"),
        () = again => {}
    }
}

#[tokio::test]
async fn a_snapshot_from_before_a_ban_keeps_no_key_in_either_generation() {
    let lab = Lab::start().await;
    let id = workload("payments");
    lab.join("web", &[&id]).await.unwrap();
    let mut host = lab.host("web");
    host.want(&[&id]);
    let key = host.until(|held| held.workloads.contains_key(&id)).await.workloads[&id].key.clone();
    eventually("the first report", || host.metrics.is_connected()).await;
    copy(&lab.host_dir("web"), &lab.host_dir("snapshot"));
    lab.command(Command::HostBan(HostBan { host: "web".to_owned(), reason: String::new() })).unwrap();
    host.until(|held| held.banned).await;
    drop(host);
    fs::remove_dir_all(lab.host_dir("web")).unwrap();
    copy(&lab.host_dir("snapshot"), &lab.host_dir("web"));
    let generations = ["identity.0", "identity.1"].map(|name| lab.host_dir("web").join(name));
    let stored =
        |file: &PathBuf| fs::read_to_string(file).is_ok_and(|text| text.contains(&BASE64.encode(key.secret_der())));
    assert!(generations.iter().any(stored));
    let _host = lab.host("web");
    eventually("neither has it", || !generations.iter().any(stored)).await;
}
