use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::super::fake_server::{Fake, Running, payments, start};
use super::super::objects::Kind;
use super::super::samples;
use super::*;
use crate::Health;

/// A host's own, renewed at that moment.
fn lease(renewed: &str) -> Value {
    serde_json::json!({
        "metadata": { "name": "api-1", "namespace": "meshd-system" },
        "spec": { "holderIdentity": "api-1/7", "leaseDurationSeconds": 9, "renewTime": renewed },
    })
}

impl Running {
    async fn health(&mut self) -> Health {
        loop {
            match self.next().await {
                SourceEvent::Changed { changes, .. } => match &changes[0] {
                    Change::Set(record) => return record.places[0].health,
                    other => panic!("{other:?}"),
                },
                SourceEvent::Unavailable { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_that_renews_its_lease_no_longer_is_dead_when_the_server_says_so_again_and_alive_when_it_does() {
    let server = Fake::new();
    let notes = [("transport", "meshd"), ("lease", "api-1"), ("lease-holder", "api-1/7")];
    server.change(|script| {
        script.objects.insert(Kind::Slice, vec![samples::own_slice("payments-x", "10.0.0.7", &notes)]);
        script.objects.insert(Kind::Lease, vec![lease("1")]);
    });
    let began = Instant::now();
    let mut running = start(payments(), server.clone());
    assert_eq!(running.listed().await.1, ["10.0.0.7"]);
    assert_eq!(running.health().await, Health::Unhealthy);
    assert_eq!(began.elapsed().as_secs(), 9);
    server.set(Kind::Lease, lease("2"), "11").await;
    assert_eq!(running.health().await, Health::Healthy);
    // A server that cannot be asked ends nobody; and when it is back, hosts have their time anew.
    server.change(|script| {
        script.objects.insert(Kind::Lease, vec![lease("2")]);
        script.down = true;
    });
    running.unavailable().await;
    sleep(Duration::from_secs(60)).await;
    server.change(|script| script.down = false);
    let back = Instant::now();
    assert_eq!(running.health().await, Health::Unhealthy);
    assert!(back.elapsed() >= Duration::from_secs(9), "{:?}", back.elapsed());
}
