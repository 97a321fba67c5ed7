//! Certificates live for a day: a clock that is hours off cuts a host off.

use std::time::{Duration, SystemTime};

use meshd_pki_client::Credentials;

use super::finding::Finding;

/// What systemd takes for "synchronised" (timedatectl).
const SYNCHRONISED: Duration = Duration::from_secs(16);

pub(super) struct ClockFacts {
    now: SystemTime,
    /// None: the kernel did not say.
    max_error: Option<Duration>,
    /// The latest moment the PKI has put into one of our certificates as the past.
    issued: Option<SystemTime>,
}

impl ClockFacts {
    pub(super) fn gather(credentials: Option<&Credentials>) -> ClockFacts {
        let issued = credentials.and_then(|credentials| {
            let svids = std::iter::once(&credentials.host).chain(credentials.workloads.values());
            svids.map(|svid| svid.not_before).max()
        });
        ClockFacts { now: SystemTime::now(), max_error: meshd_sys::clock::max_error().ok(), issued }
    }
}

pub(super) fn judge(facts: &ClockFacts) -> Vec<Finding> {
    let mut findings = vec![synchronised(facts)];
    findings.extend(facts.issued.map(|issued| not_behind(facts.now, issued)));
    findings
}

fn synchronised(facts: &ClockFacts) -> Finding {
    let check = "the clock is synchronised";
    match facts.max_error {
        Some(error) if error < SYNCHRONISED => Finding::ok(check, format!("at most {} ms off", error.as_millis())),
        _ => Finding::warning(
            check,
            "nothing keeps it right (chrony, systemd-timesyncd); a host whose clock is hours off is cut off",
            "enable time synchronisation, say `timedatectl set-ntp true`, or on a virtual machine the hypervisor's",
        ),
    }
}

fn not_behind(now: SystemTime, issued: SystemTime) -> Finding {
    let check = "the clock is not behind the PKI's";
    match issued.duration_since(now) {
        Err(_) => Finding::ok(check, ""),
        Ok(behind) if behind.is_zero() => Finding::ok(check, ""),
        Ok(behind) => Finding::failed(
            check,
            format!("by {} s at least: our newest certificate begins in the future", behind.as_secs().max(1)),
            "set the clocks of both hosts right",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn a_clock_nobody_keeps_right_is_warned_about() {
        let now = SystemTime::UNIX_EPOCH;
        let with = |max_error| synchronised(&ClockFacts { now, max_error, issued: None }).verdict;
        assert_eq!(with(Some(Duration::from_millis(20))), Verdict::Ok);
        assert_eq!(with(Some(Duration::from_secs(16))), Verdict::Warning);
        assert_eq!(with(None), Verdict::Warning);
    }

    #[test]
    fn a_certificate_of_the_future_betrays_a_clock_that_is_behind() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        assert_eq!(not_behind(now, now).verdict, Verdict::Ok);
        assert_eq!(not_behind(now, now - Duration::from_secs(60)).verdict, Verdict::Ok);
        assert_eq!(not_behind(now, now + Duration::from_secs(60)).verdict, Verdict::Failed);
    }
}
