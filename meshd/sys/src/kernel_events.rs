//! Tells that somebody changed netfilter rules, routing rules or routes: what happened is for the listener to look up.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

use super::sock_diag::{u16_at, u32_at};

/// 1 << (NFNLGRP_NFTABLES - 1): every committed transaction of nftables, and of iptables' nft variant.
const NFTABLES: u32 = 1 << 6;
/// RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV4_RULE, RTNLGRP_IPV6_ROUTE, RTNLGRP_IPV6_RULE.
const ROUTING: u32 = 1 << 6 | 1 << 7 | 1 << 10 | 1 << 18;

/// NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN, and its attributes.
const NFT_NEWGEN: u16 = 10 << 8 | 15;
const NFTA_GEN_PROC_PID: u16 = 2;
const NFTA_GEN_PROC_NAME: u16 = 3;
/// nlmsghdr + nfgenmsg: where attributes begin.
const HEADERS: usize = 16 + 4;

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

    /// What changed since the last time. Never waits.
    pub fn drain(&self) -> Changes {
        let mut changes = Changes::default();
        // Notifications of one transaction come in datagrams of at most a page or two.
        let mut datagram = [0u8; 16 * 1024];
        for socket in &self.sockets {
            loop {
                match recv(socket.as_raw_fd(), &mut datagram, MsgFlags::MSG_DONTWAIT) {
                    Ok(length) => {
                        changes.any = true;
                        changes.by = committer(&datagram[..length]).or(changes.by);
                    }
                    // The kernel dropped messages because we were slow: something did change.
                    Err(Errno::ENOBUFS) => changes.any = true,
                    Err(Errno::EINTR) => {}
                    Err(_) => break,
                }
            }
        }
        changes
    }
}

/// What happened to rules and routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub any: bool,
    /// The program that changed netfilter rules last, where the kernel says it: `firewalld (pid 712)`.
    pub by: Option<String>,
}

/// The kernel ends the notifications of a transaction with the new generation, and who made it.
fn committer(mut messages: &[u8]) -> Option<String> {
    let mut found = None;
    while let Some(length) = u32_at(messages, 0).map(|length| length as usize) {
        if length < HEADERS || length > messages.len() {
            break;
        }
        if u16_at(messages, 4) == Some(NFT_NEWGEN) {
            found = generation(&messages[HEADERS..length]).or(found);
        }
        messages = messages.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn generation(mut attributes: &[u8]) -> Option<String> {
    let (mut pid, mut name) = (None, None);
    while let Some(length) = u16_at(attributes, 0).map(usize::from) {
        let Some(value) = attributes.get(4..length) else { break };
        match u16_at(attributes, 2)? {
            NFTA_GEN_PROC_PID => pid = value.try_into().ok().map(u32::from_be_bytes),
            NFTA_GEN_PROC_NAME => name = Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned()),
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(format!("{} (pid {})", name?, pid?))
}

fn subscribe(protocol: SockProtocol, groups: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(netlink)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
        message.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(value);
        message.resize(message.len().next_multiple_of(4), 0);
    }

    fn message(kind: u16, attributes: &[u8]) -> Vec<u8> {
        let mut message = vec![0u8; HEADERS];
        message.extend_from_slice(attributes);
        let length = message.len() as u32;
        message[0..4].copy_from_slice(&length.to_ne_bytes());
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        message
    }

    #[test]
    fn whoever_changed_the_rules_is_named() {
        let mut attributes = Vec::new();
        attribute(&mut attributes, 1, &7u32.to_be_bytes());
        attribute(&mut attributes, NFTA_GEN_PROC_PID, &712u32.to_be_bytes());
        attribute(&mut attributes, NFTA_GEN_PROC_NAME, b"firewalld\0");
        let mut datagram = message(10 << 8, &[0; 8]);
        datagram.extend(message(NFT_NEWGEN, &attributes));
        assert_eq!(committer(&datagram).as_deref(), Some("firewalld (pid 712)"));
        for cut in 0..datagram.len() {
            assert_eq!(committer(&datagram[..cut]), None, "{cut} bytes");
        }
    }
}
