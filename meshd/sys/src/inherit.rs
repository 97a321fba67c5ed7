//! Listeners handed over by systemd (LISTEN_FDS, sd_listen_fds(3)) or by an older meshd, by name.

use std::net::TcpListener;
use std::os::fd::FromRawFd;

use nix::fcntl::FcntlArg::F_SETFD;
use nix::fcntl::{FdFlag, fcntl};

/// First descriptor passed (SD_LISTEN_FDS_START).
const FIRST: i32 = 3;

/// The named listeners this process was started with. Call once: each descriptor is adopted.
pub fn listeners() -> Vec<(String, TcpListener)> {
    let for_us = std::env::var("LISTEN_PID").ok().and_then(|pid| pid.parse::<u32>().ok()) == Some(std::process::id());
    let count = std::env::var("LISTEN_FDS").ok().and_then(|count| count.parse::<usize>().ok()).unwrap_or(0);
    if !for_us || count == 0 {
        return Vec::new();
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    (FIRST..)
        .take(count)
        .map(|fd| {
            // SAFETY: LISTEN_PID says that descriptors 3..3+LISTEN_FDS were passed to this very process to own;
            // main calls this once, before anything else could have taken one of those numbers.
            let listener = unsafe { TcpListener::from_raw_fd(fd) };
            // A connection that is gone when we accept must not block a worker; `nft` and `ip` need no copy.
            let adopted =
                listener.set_nonblocking(true).is_ok() && fcntl(&listener, F_SETFD(FdFlag::FD_CLOEXEC)).is_ok();
            debug_assert!(adopted, "an open descriptor takes flags");
            (names.next().unwrap_or_default().to_owned(), listener)
        })
        .collect()
}
