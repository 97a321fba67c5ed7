//! Finds cloned hosts: two processes that use one host's key at the same time.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

/// Reports come every 30 s; one process that takes over from another never hears of the first again.
const MEMORY: Duration = Duration::from_secs(15 * 60);

#[derive(Debug)]
struct Known {
    current: String,
    /// Who was current before, and is believed to be gone.
    before: Option<String>,
    seen: SystemTime,
}

/// Who reports under which host's key.
#[derive(Debug, Default)]
pub(crate) struct Instances {
    hosts: HashMap<String, Known>,
}

impl Instances {
    /// Notes a report. True when a process came back that another had taken over from: both are alive.
    pub(crate) fn report(&mut self, host: &str, instance: &str, now: SystemTime) -> bool {
        let Some(known) = self.hosts.get_mut(host) else {
            let known = Known { current: instance.to_owned(), before: None, seen: now };
            self.hosts.insert(host.to_owned(), known);
            return false;
        };
        let is_fresh = now.duration_since(known.seen).is_ok_and(|age| age < MEMORY);
        known.seen = now;
        if known.current == instance {
            return false;
        }
        let came_back = is_fresh && known.before.as_deref() == Some(instance);
        known.before = Some(std::mem::replace(&mut known.current, instance.to_owned()));
        came_back
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_is_no_clone_and_two_that_alternate_are() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000);
        let mut instances = Instances::default();
        for instance in ["a", "a", "b", "b", "c"] {
            assert!(!instances.report("web", instance, now), "{instance}");
        }
        assert!(instances.report("web", "b", now));
        assert!(!instances.report("api", "b", now), "another host");
    }

    #[test]
    fn a_snapshot_restored_much_later_is_no_clone() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000);
        let mut instances = Instances::default();
        instances.report("web", "a", now);
        instances.report("web", "b", now);
        assert!(!instances.report("web", "a", now + MEMORY));
    }
}
