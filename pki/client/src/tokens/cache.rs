//! Tokens in memory, until half of their life is over, or as long as they live when there is no other. Pure.

use std::collections::{BTreeSet, HashMap};
use std::time::SystemTime;

use meshd_identity::SpiffeId;

/// Sets of audiences remembered per identity: whoever asks for ever new ones displaces its own only.
const PER_IDENTITY: usize = 128;

#[derive(Default)]
pub(super) struct Cache(HashMap<SpiffeId, Vec<Entry>>);

struct Entry {
    audience: BTreeSet<String>,
    token: String,
    fresh_until: SystemTime,
    not_after: SystemTime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    Fresh(String),
    /// Still valid, and due to be replaced.
    Stale(String),
    Nothing,
}

impl Cache {
    pub(super) fn find(&self, identity: &SpiffeId, audience: &BTreeSet<String>, now: SystemTime) -> Found {
        let entry = self.0.get(identity).and_then(|all| all.iter().find(|entry| entry.audience == *audience));
        match entry {
            Some(entry) if now < entry.fresh_until => Found::Fresh(entry.token.clone()),
            Some(entry) if now < entry.not_after => Found::Stale(entry.token.clone()),
            _ => Found::Nothing,
        }
    }

    pub(super) fn keep(
        &mut self,
        identity: &SpiffeId,
        audience: BTreeSet<String>,
        token: String,
        now: SystemTime,
        not_after: SystemTime,
    ) {
        self.0.retain(|_, all| {
            all.retain(|entry| now < entry.not_after);
            !all.is_empty()
        });
        let Ok(life) = not_after.duration_since(now) else { return };
        let all = self.0.entry(identity.clone()).or_default();
        all.retain(|entry| entry.audience != audience);
        if all.len() >= PER_IDENTITY {
            // In the order they came: the first is the oldest.
            all.remove(0);
        }
        all.push(Entry { audience, token, fresh_until: now + life / 2, not_after });
    }

    /// The PKI does not permit it any more.
    pub(super) fn forget(&mut self, identity: &SpiffeId) {
        self.0.remove(identity);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn id(name: &str) -> SpiffeId {
        SpiffeId::workload(&"mesh.example".parse().unwrap(), "shop", name).unwrap()
    }

    fn audience(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_token_is_fresh_for_half_of_its_life_and_only_for_its_audience_set() {
        let (now, life) = (SystemTime::UNIX_EPOCH, Duration::from_secs(100));
        let mut cache = Cache::default();
        cache.keep(&id("web"), audience(&["b", "a"]), "t".to_owned(), now, now + life);
        let find = |names: &[&str], after| cache.find(&id("web"), &audience(names), now + Duration::from_secs(after));
        assert_eq!(find(&["a", "b"], 49), Found::Fresh("t".to_owned()));
        assert_eq!(find(&["a", "b"], 50), Found::Stale("t".to_owned()));
        assert_eq!(find(&["a", "b"], 100), Found::Nothing);
        assert_eq!(find(&["a"], 0), Found::Nothing);
        assert_eq!(cache.find(&id("db"), &audience(&["a", "b"]), now), Found::Nothing);
    }

    #[test]
    fn ever_new_audiences_displace_the_oldest_of_the_same_identity_only() {
        let (now, end) = (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + Duration::from_secs(100));
        let mut cache = Cache::default();
        cache.keep(&id("db"), audience(&["a"]), "other".to_owned(), now, end);
        for number in 0..=PER_IDENTITY {
            cache.keep(&id("web"), audience(&[&number.to_string()]), "t".to_owned(), now, end);
        }
        assert_eq!(cache.find(&id("web"), &audience(&["0"]), now), Found::Nothing);
        assert_eq!(cache.find(&id("web"), &audience(&["1"]), now), Found::Fresh("t".to_owned()));
        assert_eq!(cache.find(&id("db"), &audience(&["a"]), now), Found::Fresh("other".to_owned()));
        cache.keep(&id("web"), audience(&["x"]), "t".to_owned(), end, end + Duration::from_secs(1));
        assert_eq!(cache.0.len(), 1, "what has ended is forgotten");
    }
}
