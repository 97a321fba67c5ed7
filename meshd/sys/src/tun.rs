//! A TUN device of our own, with offload: the kernel hands over segments of up to 64 KiB as they are,
//! each behind a virtio header (linux/virtio_net.h) that says how to cut and checksum them, and takes
//! the same form back. Without it, bulk traffic costs seven times as much.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{c_int, c_ulong};

const CONTROL: &str = "/dev/net/tun";
/// struct virtio_net_hdr without the count of merged buffers.
pub const VNET_HEADER: usize = 10;

/// What we take off the kernel's hands, by taking packets as they come: checksums, segmentation.
const OFFLOADS: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;

/// The device; it is gone when this is dropped, and with it every address and route on it.
#[derive(Debug)]
pub struct Tun(File);

impl Tun {
    /// Makes the device `name`, still down and without addresses. Needs CAP_NET_ADMIN and read and write
    /// permission on /dev/net/tun (which udev gives to everybody).
    ///
    /// # Errors
    /// `NotFound` without the kernel's tun module, `PermissionDenied` without either right,
    /// `ResourceBusy` when an interface of that name exists.
    pub fn create(name: &str) -> io::Result<Tun> {
        let mut request = request(name)?;
        let control = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(CONTROL)?;
        let fd = control.as_raw_fd();
        // SAFETY: TUNSETIFF reads and writes one struct ifreq, which lives until the call returns.
        check(unsafe { libc::ioctl(fd, libc::TUNSETIFF as _, &raw mut request) })?;
        let header = VNET_HEADER as c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        check(unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ as _, &raw const header) })?;
        // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
        check(unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD as _, c_ulong::from(OFFLOADS)) })?;
        Ok(Tun(control))
    }

    /// The next packet the kernel sends, behind its virtio header. Never blocks: `WouldBlock` when there is none.
    pub fn receive(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(frame)
    }

    /// Gives the kernel a packet to receive, behind its virtio header.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.0).write(frame).map(drop)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: struct ifreq is plain integers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an interface name has 1 to 15 characters"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // A device somebody else made is not ours to take over.
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    Ok(request)
}

fn check(returned: c_int) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_the_kernel_would_cut_is_refused() {
        for name in ["", "sixteen-letters-"] {
            assert_eq!(Tun::create(name).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name}");
        }
    }
}
