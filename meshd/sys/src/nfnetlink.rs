//! Netfilter's netlink: one exact question, one answer. Shared by what asks conntrack and what asks nftables.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_HEADER: usize = 16;
/// nlmsghdr + nfgenmsg: where attributes begin.
pub(crate) const HEADERS: usize = NLMSG_HEADER + 4;
pub(crate) const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// A netlink socket to ask with. Needs CAP_NET_ADMIN.
pub(crate) struct Nfnetlink {
    netlink: OwnedFd,
    sequence: u32,
}

impl Nfnetlink {
    pub(crate) fn open() -> io::Result<Nfnetlink> {
        let netlink =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
        // The kernel answers inside sendto(); the timeout only bounds a kernel that does not answer at all.
        setsockopt(&netlink, sockopt::ReceiveTimeout, &TimeVal::milliseconds(200))?;
        Ok(Nfnetlink { netlink, sequence: 0 })
    }

    /// Asks message `kind` (subsystem in the high byte) and has `read` take the answer's attributes apart, which
    /// says None to one it does not understand. None: the kernel knows no such thing.
    pub(crate) fn ask<T>(
        &mut self,
        kind: u16,
        family: u8,
        attributes: &[u8],
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> io::Result<Option<T>> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = encode(kind, family, self.sequence, attributes);
        sendto(self.netlink.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut reply = [0u8; 2048];
        loop {
            let length = recv(self.netlink.as_raw_fd(), &mut reply, MsgFlags::empty())?;
            let message = &reply[..length];
            // A late answer to an earlier question that timed out is not the answer to this one.
            if message.get(8..12) == Some(&self.sequence.to_ne_bytes()) {
                return decode(message, read);
            }
        }
    }
}

pub(crate) fn encode(kind: u16, family: u8, sequence: u32, attributes: &[u8]) -> Vec<u8> {
    let mut request = vec![0u8; HEADERS];
    request.extend_from_slice(attributes);
    let length = request.len() as u32;
    request[0..4].copy_from_slice(&length.to_ne_bytes());
    request[4..6].copy_from_slice(&kind.to_ne_bytes());
    request[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request[8..12].copy_from_slice(&sequence.to_ne_bytes());
    request[NLMSG_HEADER] = family;
    request
}

pub(crate) fn decode<T>(message: &[u8], read: impl Fn(&[u8]) -> Option<T>) -> io::Result<Option<T>> {
    if u16_at(message, 4).ok_or_else(truncated)? == NLMSG_ERROR {
        let errno = errno_of(message)?;
        return if errno == nix::libc::ENOENT { Ok(None) } else { Err(io::Error::from_raw_os_error(errno)) };
    }
    let attributes = message.get(HEADERS..).ok_or_else(truncated)?;
    read(attributes).ok_or_else(truncated).map(Some)
}

/// Of a message that is an error or, with 0, an acknowledgement.
pub(crate) fn errno_of(message: &[u8]) -> io::Result<i32> {
    let errno = message.get(NLMSG_HEADER..NLMSG_HEADER + 4).ok_or_else(truncated)?;
    Ok(-i32::from_ne_bytes(errno.try_into().map_err(|_| truncated())?))
}

/// struct nlattr: length with header, type, value, padded to 4 bytes.
pub(crate) fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

pub(crate) fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while attributes.len() >= 4 {
        let length = usize::from(u16_at(attributes, 0)?);
        if length < 4 || length > attributes.len() {
            return None;
        }
        if u16_at(attributes, 2)? & TYPE_MASK == wanted {
            return attributes.get(4..length);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "nfnetlink reply is too short: kernel and meshd disagree on its layout")
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}
