use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use meshd_identity::TrustDomain;
use meshd_pki_api::v1;

use crate::{Federation, Freshness};

/// How renewal fares. Written by the agent, read by whoever exports metrics.
#[derive(Debug, Default)]
pub struct RenewalMetrics {
    refreshes_ok: AtomicU64,
    refreshes_failed: AtomicU64,
    store_failures: AtomicU64,
    readmissions: AtomicU64,
    last_success_unix: AtomicI64,
    clock_offset_ms: AtomicI64,
    last_heard_unix: AtomicI64,
    is_connected: AtomicBool,
    last_error: Mutex<Option<String>>,
    pub(crate) federation: FederationMetrics,
}

/// How the bundles of other trust domains come here.
#[derive(Debug, Default)]
pub(crate) struct FederationMetrics {
    refused: AtomicU64,
    freshness: Mutex<BTreeMap<TrustDomain, Freshness>>,
}

impl RenewalMetrics {
    /// Batches the PKI answered and that were installed.
    pub fn refreshes_ok(&self) -> u64 {
        self.refreshes_ok.load(Relaxed)
    }

    /// Attempts that changed nothing.
    pub fn refreshes_failed(&self) -> u64 {
        self.refreshes_failed.load(Relaxed)
    }

    /// Times new credentials are in use but could not be written to disk.
    pub fn store_failures(&self) -> u64 {
        self.store_failures.load(Relaxed)
    }

    /// Times this host came back by the key it enrolled with.
    pub fn readmissions(&self) -> u64 {
        self.readmissions.load(Relaxed)
    }

    /// Seconds since 1970 of the last success; `None` before the first of this process.
    pub fn last_success_unix(&self) -> Option<i64> {
        Some(self.last_success_unix.load(Relaxed)).filter(|seconds| *seconds != 0)
    }

    /// This host's clock minus the PKI's, in milliseconds, when it last answered.
    pub fn clock_offset_ms(&self) -> i64 {
        self.clock_offset_ms.load(Relaxed)
    }

    /// Seconds since 1970 of the PKI's last word in the conversation: until then this host had everything that was new.
    /// `None` before the first of this process.
    pub fn last_heard_unix(&self) -> Option<i64> {
        Some(self.last_heard_unix.load(Relaxed)).filter(|seconds| *seconds != 0)
    }

    /// Whether the conversation is held now.
    pub fn is_connected(&self) -> bool {
        self.is_connected.load(Relaxed)
    }

    /// Why the last attempt failed; `None` after a success.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bundles of other trust domains that were not taken over.
    pub fn federation_refused(&self) -> u64 {
        self.federation.refused.load(Relaxed)
    }

    /// How the PKI fares in following each trust domain, as it said last; empty before that.
    pub fn federation_freshness(&self) -> BTreeMap<TrustDomain, Freshness> {
        self.federation.freshness.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn succeeded(&self, host_ms: u64, pki_ms: u64) {
        self.refreshes_ok.fetch_add(1, Relaxed);
        self.last_success_unix.store(self.compare(host_ms, pki_ms), Relaxed);
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) fn heard(&self, host_ms: u64, pki_ms: u64) {
        self.last_heard_unix.store(self.compare(host_ms, pki_ms), Relaxed);
        self.is_connected.store(true, Relaxed);
    }

    pub(crate) fn lost(&self) {
        self.is_connected.store(false, Relaxed);
    }

    /// Notes the offset of the clocks; this host's in seconds.
    fn compare(&self, host_ms: u64, pki_ms: u64) -> i64 {
        let host_ms = i64::try_from(host_ms).unwrap_or(i64::MAX);
        let pki_ms = i64::try_from(pki_ms).unwrap_or(i64::MAX);
        self.clock_offset_ms.store(host_ms - pki_ms, Relaxed);
        host_ms / 1000
    }

    pub(crate) fn failed(&self, error: &str) {
        self.refreshes_failed.fetch_add(1, Relaxed);
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_owned());
    }

    pub(crate) fn readmitted(&self) {
        self.readmissions.fetch_add(1, Relaxed);
    }

    pub(crate) fn store_failed(&self) {
        self.store_failures.fetch_add(1, Relaxed);
    }
}

impl FederationMetrics {
    /// Takes over what was told, if anything was; whether that changed anything.
    pub(crate) fn hear(
        &self,
        held: &mut Federation,
        told: Option<v1::Federation>,
        own: &TrustDomain,
        now: SystemTime,
    ) -> bool {
        let Some(told) = told else { return false };
        let next = held.replaced_by(told, own, now);
        self.refused.fetch_add(next.refused.len() as u64, Relaxed);
        let changed = next != *held;
        *held = next;
        changed
    }

    pub(crate) fn refreshed(&self, told: &[v1::FederationFreshness]) {
        let read = |one: &v1::FederationFreshness| {
            let fresh = Freshness { last_good_unix: one.last_good_unix, next_unix: one.next_unix };
            Some((one.trust_domain.parse().ok()?, fresh))
        };
        *self.freshness.lock().unwrap_or_else(PoisonError::into_inner) = told.iter().filter_map(read).collect();
    }
}
