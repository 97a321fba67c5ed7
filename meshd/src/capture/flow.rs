//! Whom a captured connection was for, and which socket it came from: each backend hides it elsewhere.

use std::cell::RefCell;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use meshd_sys::conntrack::Conntrack;
use socket2::SockRef;

use super::tun::Flows;
use crate::telemetry::Exposition;

/// A connection as the application sees it: its own socket's address, and what it dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    pub client: SocketAddr,
    pub original: SocketAddr,
}

/// How to find the flow of an accepted connection. Each worker opens a `Recoverer` from it.
#[derive(Clone, Debug)]
pub enum Recovery {
    /// TPROXY: addresses are untouched.
    Transparent,
    /// REDIRECT: conntrack remembers what the kernel rewrote, source port included.
    Redirect,
    /// TUN: we rewrote it ourselves, and remember.
    Tun(Arc<Flows>),
}

impl Recovery {
    /// What there is to count about it.
    pub fn metrics(&self) -> Vec<Exposition> {
        match self {
            Recovery::Transparent | Recovery::Redirect => Vec::new(),
            Recovery::Tun(flows) => flows.metrics(),
        }
    }
}

/// One worker's means of recovery.
pub enum Recoverer {
    Transparent,
    Redirect(RefCell<Conntrack>),
    Tun(Arc<Flows>),
}

impl Recoverer {
    pub fn open(recovery: &Recovery) -> io::Result<Recoverer> {
        match recovery {
            Recovery::Transparent => Ok(Recoverer::Transparent),
            Recovery::Redirect => Ok(Recoverer::Redirect(RefCell::new(Conntrack::open()?))),
            Recovery::Tun(flows) => Ok(Recoverer::Tun(flows.clone())),
        }
    }

    /// The flow of an accepted connection; None if it was dialled here by itself, not captured.
    pub fn flow(&self, socket: &TcpStream, peer: SocketAddr, listeners: &[SocketAddr]) -> io::Result<Option<Flow>> {
        let dialled = socket.local_addr()?;
        match self {
            Recoverer::Transparent => {
                Ok((!listeners.contains(&dialled)).then_some(Flow { client: peer, original: dialled }))
            }
            Recoverer::Redirect(conntrack) => {
                // Cheap, and tells at once who was redirected; the source port may be rewritten, too (57 % of
                // 40,000 connections), so the client's address is asked of conntrack.
                let Some(original) = original_destination(socket, dialled)? else { return Ok(None) };
                if original == dialled {
                    return Ok(None);
                }
                let client = conntrack.borrow_mut().original_source(peer, dialled)?;
                Ok(client.map(|client| Flow { client, original }))
            }
            Recoverer::Tun(flows) => Ok(flows.recover(peer)),
        }
    }
}

/// SO_ORIGINAL_DST; None for a connection no NAT rule touched.
fn original_destination(socket: &TcpStream, dialled: SocketAddr) -> io::Result<Option<SocketAddr>> {
    let socket = SockRef::from(socket);
    let asked = if dialled.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    match asked {
        Ok(address) => Ok(address.as_socket()),
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}
