//! Waiting for a condition, never for a time.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Polls `condition` until it holds; the error after `deadline` says what never came true.
pub fn until(deadline: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    until_some(deadline, what, || condition().then_some(()))
}

/// Polls `probe` until it has something to give.
pub fn until_some<T>(deadline: Duration, what: &str, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let give_up = Instant::now() + deadline;
    let mut pause = FIRST_PAUSE;
    loop {
        if let Some(found) = probe() {
            return Ok(found);
        }
        if Instant::now() >= give_up {
            bail!("{what}: not within {deadline:?}");
        }
        rest(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// For measuring over a span of time (a load phase); a test waits for a condition instead.
#[expect(clippy::disallowed_methods, reason = "the harness is blocking code on its own threads")]
pub fn rest(span: Duration) {
    std::thread::sleep(span);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_what_the_probe_found() {
        let mut asked = 0;
        let found = until_some(Duration::from_secs(5), "third time", || {
            asked += 1;
            (asked == 3).then_some(asked)
        });
        assert_eq!(found.unwrap(), 3);
    }

    #[test]
    fn says_what_it_waited_for() {
        let error = until(Duration::ZERO, "the moon", || false).unwrap_err();
        assert!(error.to_string().contains("the moon"), "{error}");
    }
}
