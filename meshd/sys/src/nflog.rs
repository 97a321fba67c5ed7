//! What rules say with `-j NFLOG`: the beginning of a packet, the rule's prefix, and the user whose socket sent it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket, sockopt,
};

use super::nfnetlink::{HEADERS, attribute, encode, errno_of, find};
use super::sock_diag::{u16_at, u32_at};

/// NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET, NFULNL_MSG_CONFIG.
const PACKET: u16 = 4 << 8;
const CONFIG: u16 = 4 << 8 | 1;
const NFULA_CFG_CMD: u16 = 1;
const NFULA_CFG_MODE: u16 = 2;
const NFULA_CFG_NLBUFSIZ: u16 = 3;
const NFULA_CFG_QTHRESH: u16 = 5;
const NFULNL_CFG_CMD_BIND: u8 = 1;
const NFULNL_COPY_PACKET: u8 = 2;
const NFULA_PAYLOAD: u16 = 9;
const NFULA_PREFIX: u16 = 10;
const NFULA_UID: u16 = 11;
const NLM_F_ACK: u16 = 4;

/// What the kernel allocates per message; its default of a page or two would fill the socket's buffer soon.
const MESSAGE: u32 = 512;
/// Several thousand messages until they are read. Beyond that they are lost, which is told.
const BUFFER: usize = 4 << 20;

/// A group of NFLOG rules of this network namespace, listened to. Needs CAP_NET_ADMIN.
pub struct NfLog(OwnedFd);

/// One packet a rule told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logged<'a> {
    /// The rule's `--nflog-prefix`.
    pub prefix: &'a str,
    /// The user of the sending socket; None for what comes from elsewhere.
    pub uid: Option<u32>,
    /// The packet's first bytes, from its IP header on.
    pub packet: &'a [u8],
}

impl NfLog {
    /// Listens to `group`, for the first `copied` bytes of each packet. One listener can have a group: another gets
    /// `EBUSY`.
    pub fn bind(group: u16, copied: u32) -> io::Result<NfLog> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
        setsockopt(&netlink, sockopt::RcvBufForce, &BUFFER)?;
        sendto(netlink.as_raw_fd(), &bind_request(group, copied), &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        // The kernel has answered inside sendto().
        let mut reply = [0u8; 1024];
        let length = recv(netlink.as_raw_fd(), &mut reply, MsgFlags::empty())?;
        match errno_of(&reply[..length])? {
            0 => Ok(NfLog(netlink)),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Hands over all that has come and does not wait for more. True if messages were lost since the last time.
    pub fn drain(&self, mut each: impl FnMut(Logged<'_>)) -> io::Result<bool> {
        let mut datagram = [0u8; 16 * 1024];
        let mut lost = false;
        loop {
            match recv(self.0.as_raw_fd(), &mut datagram, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => packets(&datagram[..length], &mut each),
                Err(Errno::EAGAIN) => return Ok(lost),
                Err(Errno::ENOBUFS) => lost = true,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for NfLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn bind_request(group: u16, copied: u32) -> Vec<u8> {
    let mut attributes = Vec::with_capacity(48);
    attribute(&mut attributes, NFULA_CFG_CMD, &[NFULNL_CFG_CMD_BIND]);
    // struct nfulnl_msg_config_mode: range, mode, padding.
    let [a, b, c, d] = copied.to_be_bytes();
    attribute(&mut attributes, NFULA_CFG_MODE, &[a, b, c, d, NFULNL_COPY_PACKET, 0]);
    attribute(&mut attributes, NFULA_CFG_NLBUFSIZ, &MESSAGE.to_be_bytes());
    // Each at once, not a hundred together.
    attribute(&mut attributes, NFULA_CFG_QTHRESH, &1u32.to_be_bytes());
    let mut request = encode(CONFIG, 0, 1, &attributes);
    let flags = u16_at(&request, 6).unwrap_or_default() | NLM_F_ACK;
    request[6..8].copy_from_slice(&flags.to_ne_bytes());
    request[HEADERS - 2..HEADERS].copy_from_slice(&group.to_be_bytes());
    request
}

fn packets(mut messages: &[u8], each: &mut impl FnMut(Logged<'_>)) {
    while let Some(length) = u32_at(messages, 0).map(|length| length as usize) {
        if length < HEADERS || length > messages.len() {
            return;
        }
        if u16_at(messages, 4) == Some(PACKET)
            && let Some(logged) = logged(&messages[HEADERS..length])
        {
            each(logged);
        }
        messages = messages.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
}

fn logged(attributes: &[u8]) -> Option<Logged<'_>> {
    let prefix = std::str::from_utf8(find(attributes, NFULA_PREFIX)?).ok()?.trim_end_matches('\0');
    let uid = find(attributes, NFULA_UID).and_then(|uid| uid.try_into().ok()).map(u32::from_be_bytes);
    Some(Logged { prefix, uid, packet: find(attributes, NFULA_PAYLOAD)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(uid: Option<u32>) -> Vec<u8> {
        let mut attributes = Vec::new();
        attribute(&mut attributes, 1, &[8, 0, 3, 0]);
        attribute(&mut attributes, NFULA_PREFIX, b"meshd call 7\0");
        if let Some(uid) = uid {
            attribute(&mut attributes, NFULA_UID, &uid.to_be_bytes());
        }
        attribute(&mut attributes, NFULA_PAYLOAD, &[0x45, 0, 0, 60]);
        encode(PACKET, 2, 0, &attributes)
    }

    #[test]
    fn prefix_user_and_packet_of_every_message_are_read() {
        let datagram = [message(Some(1001)), message(None)].concat();
        let mut found = Vec::new();
        packets(&datagram, &mut |logged| found.push((logged.prefix.to_owned(), logged.uid, logged.packet.to_vec())));
        let expected = |uid| ("meshd call 7".to_owned(), uid, vec![0x45, 0, 0, 60]);
        assert_eq!(found, [expected(Some(1001)), expected(None)]);
        for length in 0..message(None).len() {
            packets(&datagram[..length], &mut |logged| panic!("{logged:?} out of {length} bytes"));
        }
    }
}
