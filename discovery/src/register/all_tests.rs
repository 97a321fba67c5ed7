use std::sync::Arc;

use tokio::time::{Instant, sleep};

use super::super::fake::{Client, Store, TTL};
use super::super::offer::tests::offer;
use super::*;

fn host(client: &Arc<Client>) -> Registrations {
    let registrations = Registrations::new(vec![client.clone()]);
    registrations.offer(&[offer()]);
    registrations
}

fn address(store: &Store) -> Option<String> {
    store.get(&offer().key).map(|said| said.address.to_string())
}

/// Waits for it, on the paused clock.
async fn until(mut is: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < 10 * TTL, "never");
        sleep(Duration::from_millis(10)).await;
    }
    began.elapsed()
}

fn phase(host: &Registrations) -> Phase {
    host.rows()[0].phase
}

#[tokio::test(start_paused = true)]
async fn a_registration_is_there_for_as_long_as_its_host_and_one_lease_longer() {
    let store = Store::default();
    let host = host(&store.client("10.0.0.1"));
    until(|| address(&store).is_some()).await;
    sleep(5 * TTL).await;
    assert_eq!((address(&store).as_deref(), phase(&host)), (Some("10.0.0.1"), Phase::Held));
    drop(host);
    let gone = until(|| address(&store).is_none()).await;
    assert!(gone > TTL / 2 && gone <= TTL, "{gone:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_served_no_longer_is_taken_away_and_what_changed_is_written_in_the_same_life() {
    let store = Store::default();
    let host = host(&store.client("10.0.0.1"));
    until(|| address(&store).is_some()).await;
    let before = store.get(&offer().key).unwrap();
    let ill = Offer { health: Health::Unhealthy, ..offer() };
    host.offer(std::slice::from_ref(&ill));
    until(|| store.get(&offer().key).unwrap().health == Health::Unhealthy).await;
    assert_eq!(store.get(&offer().key).unwrap().epoch, before.epoch);
    host.offer(&[]);
    until(|| address(&store).is_none()).await;
    host.offer(&[]);
    assert!(host.rows().is_empty(), "{:?}", host.rows());
    host.offer(&[offer()]);
    until(|| address(&store).is_some()).await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_stood_still_while_another_took_its_name_leaves_it_alone() {
    let store = Store::default();
    let (old_client, new_client) = (store.client("10.0.0.1"), store.client("10.0.0.2"));
    let old = host(&old_client);
    until(|| address(&store).is_some()).await;
    old_client.stand_still(true);
    until(|| address(&store).is_none()).await;
    let new = host(&new_client);
    until(|| address(&store).as_deref() == Some("10.0.0.2")).await;
    old_client.stand_still(false);
    until(|| phase(&old) == Phase::Superseded).await;
    sleep(3 * TTL).await;
    assert_eq!((address(&store).as_deref(), phase(&new)), (Some("10.0.0.2"), Phase::Held));
    // Nor does it take away what is not its own.
    old.withdraw().await;
    assert_eq!((address(&store).as_deref(), phase(&old)), (Some("10.0.0.2"), Phase::Gone));
}

#[tokio::test(start_paused = true)]
async fn a_host_replaced_while_it_lives_notices_and_returns_when_the_other_has_ended() {
    let store = Store::default();
    let first = host(&store.client("10.0.0.1"));
    until(|| address(&store).is_some()).await;
    let second = host(&store.client("10.0.0.2"));
    until(|| phase(&first) == Phase::Superseded).await;
    assert_eq!(address(&store).as_deref(), Some("10.0.0.2"));
    drop(second);
    until(|| address(&store).as_deref() == Some("10.0.0.1")).await;
}

#[tokio::test(start_paused = true)]
async fn after_an_outage_longer_than_the_lease_and_in_an_emptied_backend_it_is_registered_again() {
    let store = Store::default();
    let host = host(&store.client("10.0.0.1"));
    until(|| address(&store).is_some()).await;
    let before = store.get(&offer().key).unwrap().epoch;
    store.set_down(true);
    sleep(3 * TTL).await;
    let row = &host.rows()[0];
    assert_eq!((row.phase, row.error.as_deref()), (Phase::Registering, Some("scripted: down")));
    store.set_down(false);
    until(|| address(&store).is_some()).await;
    assert!(store.get(&offer().key).unwrap().epoch > before);
    store.empty();
    let again = until(|| address(&store).is_some()).await;
    assert!(again <= TTL / 2, "{again:?}");
    until(|| host.rows()[0].error.is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_ends_says_so_first_and_then_is_gone_and_registers_nothing_more() {
    let store = Store::default();
    let host = host(&store.client("10.0.0.1"));
    until(|| address(&store).is_some()).await;
    assert!(host.drain().await);
    assert_eq!(store.get(&offer().key).unwrap().weight, 0);
    sleep(2 * TTL).await;
    assert!(address(&store).is_some(), "kept while connections drain");
    host.withdraw().await;
    assert_eq!(address(&store), None);
    host.offer(&[offer()]);
    sleep(TTL).await;
    assert_eq!(address(&store), None);
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_is_away_holds_up_the_end_of_a_host_for_seconds_only() {
    let store = Store::default();
    let host = host(&store.client("10.0.0.1"));
    until(|| address(&store).is_some()).await;
    store.set_down(true);
    let began = Instant::now();
    assert!(!host.drain().await);
    host.withdraw().await;
    assert!(began.elapsed() <= 2 * TELL_DEADLINE, "{:?}", began.elapsed());
}
