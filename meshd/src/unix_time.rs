//! Time as files and answers have it: seconds since 1970.

use std::time::SystemTime;

pub(crate) fn unix_now() -> u64 {
    unix_seconds(SystemTime::now())
}

/// 0 for what a wrong clock takes for earlier.
pub(crate) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
