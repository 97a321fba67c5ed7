//! What the kernel knows about the quality of its clock.

use std::io;
use std::time::Duration;

/// The most the clock can be off, as whoever disciplines it (chrony, timesyncd, ntpd) last said. Grows while nobody
/// does, and is 16 s on a host where nobody ever did.
pub fn max_error() -> io::Result<Duration> {
    // SAFETY: timex is plain integers, for which zero is valid; modes = 0 asks without changing anything.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a timex that lives through the call.
    if unsafe { libc::adjtimex(&raw mut timex) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::from_micros(u64::try_from(timex.maxerror).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_answers_everybody() {
        // The kernel caps it at 16 s (NTP_PHASE_LIMIT).
        assert!(max_error().unwrap() <= Duration::from_secs(17));
    }
}
