//! Whose socket a first packet came from, asked while the packet waits for us: as it has not been answered yet, its
//! socket is still there, whatever the program does once it is connected.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use meshd_sys::sock_diag::{Lookup, SocketDiag};

use super::super::owner::RecordedOwner;
use super::nat::Seconds;

/// The kernel answers before the request has been sent whole; every connection waits for the pump.
const PATIENCE: Duration = Duration::from_millis(5);
/// A kernel that does not answer is left alone, so that packets hardly wait for it.
const REST: Seconds = 5;

type Ask = dyn FnMut(SocketAddr, SocketAddr) -> io::Result<Lookup> + Send;

/// The pump's means of asking.
pub(super) struct Openers {
    ask: Box<Ask>,
    rests_until: Seconds,
}

impl Openers {
    pub(super) fn open() -> io::Result<Openers> {
        let mut diag = SocketDiag::with_patience(PATIENCE)?;
        Ok(Openers { ask: Box::new(move |client, original| diag.owner(client, original)), rests_until: 0 })
    }

    /// The owner of the socket bound to `client` that connects to `original`, if the kernel says so right away.
    pub(super) fn owner(&mut self, client: SocketAddr, original: SocketAddr, now: Seconds) -> Option<RecordedOwner> {
        if now < self.rests_until {
            return None;
        }
        match (self.ask)(client, original) {
            Ok(Lookup::Owned(owner)) => Some(RecordedOwner { uid: owner.uid, cgroup: owner.cgroup }),
            Ok(Lookup::Orphaned { .. } | Lookup::Missing) => None,
            Err(error) => {
                self.rests_until = now + REST;
                tracing::warn!(
                    %client, %error,
                    "the kernel does not answer who opens connections; those that close at once go unidentified for {REST} s"
                );
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use meshd_sys::sock_diag::SocketOwner;

    use super::*;

    #[test]
    fn a_kernel_that_does_not_answer_is_left_alone_for_a_while() {
        let asked = Arc::new(AtomicU32::new(0));
        let count = asked.clone();
        let owner = SocketOwner { uid: 1001, inode: 5, cgroup: Some(77) };
        let ask = move |_, _| match count.fetch_add(1, Ordering::Relaxed) {
            0 => Err(ErrorKind::WouldBlock.into()),
            1 => Ok(Lookup::Owned(owner)),
            _ => Ok(Lookup::Orphaned { state: 6 }),
        };
        let mut openers = Openers { ask: Box::new(ask), rests_until: 0 };
        let [client, original] = ["10.0.0.9:40000", "240.240.3.7:443"].map(|end| end.parse().unwrap());
        let mut at = |now| openers.owner(client, original, now);
        assert_eq!((at(10), at(10), at(10 + REST - 1)), (None, None, None));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert_eq!(at(10 + REST), Some(RecordedOwner { uid: 1001, cgroup: Some(77) }));
        assert_eq!(at(10 + REST), None, "a socket that closes is nobody's");
    }
}
