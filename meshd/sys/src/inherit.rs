//! Listeners handed over by systemd (LISTEN_FDS, sd_listen_fds(3)) or by an older meshd, by name.

use std::net::TcpListener;
use std::os::fd::FromRawFd;

/// First descriptor passed (SD_LISTEN_FDS_START).
const FIRST: i32 = 3;

/// The named listeners this process was started with. Call once, before any other descriptor is opened.
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
            (names.next().unwrap_or_default().to_owned(), listener)
        })
        .collect()
}
