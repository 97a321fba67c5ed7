//! TLS handshakes take turns. Of ten thousand begun together most would miss their deadline halfway, and the work on
//! them would be for nothing; begun one after the other, all of them end.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;
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
    places: Vec<Arc<Semaphore>>,
    hasher: RandomState,
}

/// The right to one handshake, until it is dropped.
pub(crate) struct Turn {
    _of_address: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Handshakes {
    pub(crate) fn new() -> Handshakes {
        let places = (0..PLACES).map(|_| Arc::new(Semaphore::new(OF_ONE_ADDRESS))).collect();
        Handshakes { all: Arc::new(Semaphore::new(AT_ONCE)), places, hasher: RandomState::new() }
    }

    /// Who came first is first; `None` when it took too long.
    pub(crate) async fn turn(&self, address: IpAddr) -> Option<Turn> {
        let place = self.hasher.hash_one(address.to_canonical()) as usize % PLACES;
        let in_order = async {
            // In this order: who waits for others of its own address keeps nobody else out.
            let of_address = self.places[place].clone().acquire_owned().await.ok()?;
            let of_all = self.all.clone().acquire_owned().await.ok()?;
            Some(Turn { _of_address: of_address, _of_all: of_all })
        };
        timeout(PATIENCE, in_order).await.ok().flatten()
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
