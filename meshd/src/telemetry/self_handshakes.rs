//! How the handshakes of this host with itself went.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use meshd_identity::SpiffeId;

use super::Exposition;

#[derive(Debug, Default)]
pub struct SelfHandshakes {
    ok: AtomicU64,
    failed: AtomicU64,
    failing: Mutex<BTreeMap<SpiffeId, String>>,
}

impl SelfHandshakes {
    pub fn note(&self, id: &SpiffeId, result: Result<(), String>) {
        let counter = if result.is_ok() { &self.ok } else { &self.failed };
        counter.fetch_add(1, Relaxed);
        match result {
            Ok(()) => _ = self.lock().remove(id),
            Err(error) => _ = self.lock().insert(id.clone(), error),
        }
    }

    /// Forgets identities that are not served any more.
    pub fn keep(&self, ids: &[SpiffeId]) {
        self.lock().retain(|id, _| ids.contains(id));
    }

    /// Identities whose last handshake failed, and why.
    pub fn failing(&self) -> BTreeMap<SpiffeId, String> {
        self.lock().clone()
    }

    pub(super) fn metrics(&self) -> [Exposition; 2] {
        let result =
            |result: &'static str, count: &AtomicU64| (vec![("result", result.into())], count.load(Relaxed) as f64);
        let failing = self.failing().into_keys().map(|id| (vec![("id", id.to_string().into())], 1.0)).collect();
        [
            Exposition::counter(
                "meshd_self_handshakes",
                "Handshakes of this host with itself, one a minute for each identity it serves",
                vec![result("ok", &self.ok), result("failed", &self.failed)],
            ),
            Exposition::gauge(
                "meshd_self_handshake_failing",
                "Identities whose last handshake with this host itself failed; peers refuse them, too",
                failing,
            ),
        ]
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SpiffeId, String>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_failing_until_it_succeeds_or_is_gone() {
        let [one, two]: [SpiffeId; 2] =
            ["a", "b"].map(|name| format!("spiffe://prod.example.org/ns/shop/sa/{name}").parse().unwrap());
        let told = SelfHandshakes::default();
        told.note(&one, Err("expired".to_owned()));
        told.note(&two, Err("expired".to_owned()));
        assert_eq!(told.failing().len(), 2);
        told.note(&one, Ok(()));
        assert_eq!(told.failing().into_keys().collect::<Vec<_>>(), [two]);
        told.keep(&[one]);
        assert!(told.failing().is_empty());
    }
}
