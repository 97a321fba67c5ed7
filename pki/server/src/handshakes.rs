//! TLS handshakes take turns. Of ten thousand begun together most would miss their deadline halfway, and the work on
//! them would be for nothing; begun one after the other, all of them end.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// Enough to keep every core busy over slow networks, few enough that each ends long before its deadline.
const AT_ONCE: usize = 256;
/// One that stands still keeps its place until the deadline: no single address may have them all.
const OF_ONE_ADDRESS: usize = 64;
/// Addresses are told apart by so many places, drawn anew at each start.
const PLACES: usize = 1024;
/// Hosts wait for 20 s; what could not begin long before is not begun.
const PATIENCE: Duration = Duration::from_secs(15);

pub(crate) struct Handshakes {
    all: Arc<Semaphore>,
    places: Vec<Place>,
    hasher: RandomState,
}

struct Place {
    turns: Arc<Semaphore>,
    waiting: AtomicUsize,
}

/// One of those who wait at a place, until it is dropped.
pub(crate) struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The right to one handshake, until it is dropped.
pub(crate) struct Turn {
    _of_address: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Handshakes {
    pub(crate) fn new() -> Handshakes {
        let place = |_| Place { turns: Arc::new(Semaphore::new(OF_ONE_ADDRESS)), waiting: AtomicUsize::new(0) };
        let places = (0..PLACES).map(place).collect();
        Handshakes { all: Arc::new(Semaphore::new(AT_ONCE)), places, hasher: RandomState::new() }
    }

    /// Before anything is known of who comes from there; `None` when as many as `most` wait there already.
    pub(crate) fn wait(&self, address: IpAddr, most: usize) -> Option<Waiting<'_>> {
        let waiting = &self.place(address).waiting;
        let before = waiting.fetch_add(1, Ordering::Relaxed);
        let entered = Waiting(waiting);
        (before < most).then_some(entered)
    }

    fn place(&self, address: IpAddr) -> &Place {
        &self.places[self.hasher.hash_one(network(address)) as usize % PLACES]
    }

    /// Who came first is first; `None` when it took too long.
    pub(crate) async fn turn(&self, address: IpAddr) -> Option<Turn> {
        let turns = &self.place(address).turns;
        let in_order = async {
            // In this order: who waits for others of its own address keeps nobody else out.
            let of_address = turns.clone().acquire_owned().await.ok()?;
            let of_all = self.all.clone().acquire_owned().await.ok()?;
            Some(Turn { _of_address: of_address, _of_all: of_all })
        };
        timeout(PATIENCE, in_order).await.ok().flatten()
    }
}

/// Of IPv6 whoever has one address has all of its /64.
fn network(address: IpAddr) -> u128 {
    match address.to_canonical() {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address) >> 64 << 64,
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    async fn hold_all_of(handshakes: &Handshakes, address: IpAddr) -> Vec<Turn> {
        let mut held = Vec::new();
        for _ in 0..OF_ONE_ADDRESS {
            held.push(handshakes.turn(address).await.unwrap());
        }
        // The runtime makes a task that was busy for so long wait, whatever is ready.
        tokio::task::yield_now().await;
        held
    }

    #[tokio::test(start_paused = true)]
    async fn who_holds_many_handshakes_keeps_out_nobody_but_itself() {
        let handshakes = Handshakes::new();
        let _held = hold_all_of(&handshakes, address(1)).await;
        let mapped = "::ffff:10.0.0.1".parse().unwrap();
        assert!(handshakes.turn(mapped).await.is_none(), "the same address, written otherwise");
        let mut others = 0;
        for last in 2..6 {
            others += usize::from(handshakes.turn(address(last)).await.is_some());
        }
        // One of them may happen to share the place.
        assert!(others >= 1);
    }

    #[test]
    fn all_addresses_of_one_network_of_ipv6_share_a_place() {
        let network_of = |text: &str| network(text.parse().unwrap());
        assert_eq!(network_of("2001:db8:0:1::1"), network_of("2001:db8:0:1:ffff::2"));
        assert_ne!(network_of("2001:db8:0:1::1"), network_of("2001:db8:0:2::1"));
        assert_eq!(network_of("::ffff:10.0.0.1"), network_of("10.0.0.1"));
        assert_ne!(network_of("10.0.0.1"), network_of("10.0.0.2"));
    }

    #[test]
    fn no_more_wait_at_one_place_than_may() {
        let handshakes = Handshakes::new();
        let first = handshakes.wait(address(1), 2).unwrap();
        let _second = handshakes.wait(address(1), 2).unwrap();
        assert!(handshakes.wait(address(1), 2).is_none());
        assert!(handshakes.wait(address(1), 2).is_none(), "who was refused does not count");
        drop(first);
        assert!(handshakes.wait(address(1), 2).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn turns_come_in_the_order_they_were_asked_for() {
        let handshakes = Handshakes::new();
        let mut held = hold_all_of(&handshakes, address(1)).await;
        let (mut first, mut second) = (pin!(handshakes.turn(address(1))), pin!(handshakes.turn(address(1))));
        assert!(poll(first.as_mut()).is_pending() && poll(second.as_mut()).is_pending());
        held.pop();
        assert!(poll(second.as_mut()).is_pending());
        let Poll::Ready(Some(turn)) = poll(first.as_mut()) else { panic!("the first still waits") };
        assert!(poll(second.as_mut()).is_pending());
        drop(turn);
        assert!(matches!(poll(second.as_mut()), Poll::Ready(Some(_))));
    }
}
