//! What the agent reads from the machine it runs on.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::UnixTime;
use rustls::time_provider::TimeProvider;

use crate::store::MACHINE_ID;

/// Whatever a lost push lost is known after this time.
const REPORT_EVERY: Duration = Duration::from_secs(30);

pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;
/// Time since boot, sleep included.
pub type BootTime = Arc<dyn Fn() -> Duration + Send + Sync>;

/// What an [`Agent`](crate::Agent) reads from its surroundings.
#[derive(Clone)]
pub struct Surroundings {
    pub clock: Clock,
    pub boot_time: BootTime,
    pub machine_id_file: PathBuf,
    /// Between two reports to the PKI.
    pub report_every: Duration,
}

impl Default for Surroundings {
    fn default() -> Surroundings {
        Surroundings {
            clock: Arc::new(SystemTime::now),
            boot_time: Arc::new(boot_time),
            machine_id_file: MACHINE_ID.into(),
            report_every: REPORT_EVERY,
        }
    }
}

impl Surroundings {
    /// Both clocks from one that tests turn.
    pub fn with_clock(clock: Clock) -> Surroundings {
        let wall = clock.clone();
        let boot_time = move || wall().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Surroundings { clock, boot_time: Arc::new(boot_time), ..Surroundings::default() }
    }
}

fn boot_time() -> Duration {
    // Fails only for clocks the kernel does not know; this one it has since 2.6.39.
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    time.map_or(Duration::ZERO, Duration::from)
}

/// The same clock for TLS.
pub(crate) struct TlsTime(pub(crate) Clock);

impl TimeProvider for TlsTime {
    fn current_time(&self) -> Option<UnixTime> {
        let since = (self.0)().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(since))
    }
}

impl fmt::Debug for TlsTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsTime").finish_non_exhaustive()
    }
}

/// The wall clock, carried on by the time since boot where it was set back: a machine whose clock jumps to 1970 still
/// renews in time. Jumps forward are believed, for as long as they last.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeline {
    wall: SystemTime,
    boot: Duration,
}

impl Timeline {
    pub(crate) fn from(surroundings: &Surroundings) -> Timeline {
        Timeline { wall: (surroundings.clock)(), boot: (surroundings.boot_time)() }
    }

    pub(crate) fn now(&self, surroundings: &Surroundings) -> SystemTime {
        self.at((surroundings.clock)(), (surroundings.boot_time)())
    }

    fn at(&self, wall: SystemTime, boot: Duration) -> SystemTime {
        wall.max(self.wall + boot.saturating_sub(self.boot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn time_goes_on_when_the_wall_clock_is_set_back_and_follows_it_forward() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000);
        let line = Timeline { wall: start, boot: HOUR };
        assert_eq!(line.at(start + HOUR, 2 * HOUR), start + HOUR);
        assert_eq!(line.at(SystemTime::UNIX_EPOCH, 3 * HOUR), start + 2 * HOUR);
        assert_eq!(line.at(start + 10 * HOUR, 2 * HOUR), start + 10 * HOUR);
        assert_eq!(line.at(start + HOUR, 2 * HOUR), start + HOUR, "a jump that was undone leaves nothing");
    }
}
