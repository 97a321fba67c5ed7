//! Tells that somebody changed netfilter rules, routing rules or routes: what happened is for the listener to look up.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

/// 1 << (NFNLGRP_NFTABLES - 1): every committed transaction of nftables, and of iptables' nft variant.
const NFTABLES: u32 = 1 << 6;
/// RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV4_RULE, RTNLGRP_IPV6_ROUTE, RTNLGRP_IPV6_RULE.
const ROUTING: u32 = 1 << 6 | 1 << 7 | 1 << 10 | 1 << 18;

pub struct KernelEvents {
    sockets: Vec<OwnedFd>,
}

impl KernelEvents {
    pub fn open() -> io::Result<KernelEvents> {
        let mut sockets = vec![subscribe(SockProtocol::NetlinkRoute, ROUTING)?];
        match subscribe(SockProtocol::NetlinkNetFilter, NFTABLES) {
            Ok(socket) => sockets.push(socket),
            // A kernel without netfilter has no rules that could change.
            Err(error) if error.raw_os_error() == Some(Errno::EPROTONOSUPPORT as i32) => {}
            Err(error) => return Err(error),
        }
        Ok(KernelEvents { sockets })
    }

    /// Whether anything changed since the last time. Never waits.
    pub fn drain(&self) -> bool {
        let mut changed = false;
        let mut discarded = [0u8; 4096];
        for socket in &self.sockets {
            loop {
                match recv(socket.as_raw_fd(), &mut discarded, MsgFlags::MSG_DONTWAIT) {
                    Ok(_) => changed = true,
                    // The kernel dropped messages because we were slow: something did change.
                    Err(Errno::ENOBUFS) => changed = true,
                    Err(Errno::EINTR) => {}
                    Err(_) => break,
                }
            }
        }
        changed
    }
}

fn subscribe(protocol: SockProtocol, groups: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(netlink)
}
