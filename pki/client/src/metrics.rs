use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

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
