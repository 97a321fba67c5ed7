//! Connections are few, so that one client must not have them all.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use meshd_sys::sock_diag::{Lookup, SocketDiag};

/// Who asks: on this host a user, as all of them come from one address; elsewhere an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Client {
    User(u32),
    Address(IpAddr),
}

impl Client {
    /// Of the connection between `peer` and `local`, our end of it.
    pub(super) fn of(diag: Option<&mut SocketDiag>, peer: SocketAddr, local: SocketAddr) -> Client {
        match diag.filter(|_| peer.ip().is_loopback()).map(|diag| diag.owner(peer, local)) {
            Some(Ok(Lookup::Owned(owner))) => Client::User(owner.uid),
            _ => Client::Address(peer.ip().to_canonical()),
        }
    }
}

/// How much each client holds at the moment.
#[derive(Clone, Debug)]
pub(super) struct Shares {
    most: usize,
    held: Arc<Mutex<HashMap<Client, usize>>>,
}

/// Counted against its client until dropped.
#[derive(Debug)]
pub(super) struct Share {
    shares: Shares,
    client: Client,
}

impl Shares {
    pub(super) fn of(most: usize) -> Shares {
        Shares { most, held: Arc::default() }
    }

    /// None: the client holds as much as one may.
    pub(super) fn take(&self, client: Client) -> Option<Share> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.entry(client).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Share { shares: self.clone(), client })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut held = self.shares.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_client_gets_its_share_again_when_it_gives_one_back() {
        let shares = Shares::of(2);
        let (greedy, other) = (Client::User(1), Client::User(2));
        let one = shares.take(greedy).unwrap();
        let _two = shares.take(greedy).unwrap();
        assert!(shares.take(greedy).is_none());
        assert!(shares.take(other).is_some());
        drop(one);
        assert!(shares.take(greedy).is_some());
    }

    #[test]
    fn who_holds_nothing_is_forgotten() {
        let shares = Shares::of(1);
        drop(shares.take(Client::User(1)));
        assert!(shares.held.lock().unwrap().is_empty());
    }

    #[test]
    fn on_this_host_a_client_is_a_user_and_elsewhere_an_address() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, peer) = listener.accept().unwrap();
        let mut diag = SocketDiag::open().unwrap();
        let local = ours.local_addr().unwrap();
        let uid = nix::unistd::getuid().as_raw();
        assert_eq!(Client::of(Some(&mut diag), peer, local), Client::User(uid));
        assert_eq!(Client::of(None, peer, local), Client::Address(peer.ip()));
        let far = "192.0.2.1:50000".parse().unwrap();
        assert_eq!(Client::of(Some(&mut diag), far, local), Client::Address(far.ip()));
    }
}
