//! `meshd_workload_api_*`: what programs of this host ask for their identity.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tonic::Code;

use super::Exposition;

#[derive(Debug, Default)]
pub struct WorkloadApiCounters {
    open: Arc<AtomicU64>,
    turned_away: AtomicU64,
    answered: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
}

/// Counted as open until dropped.
#[derive(Debug)]
pub struct OpenConnection(Arc<AtomicU64>);

impl WorkloadApiCounters {
    pub fn connection(&self) -> OpenConnection {
        self.open.fetch_add(1, Ordering::Relaxed);
        OpenConnection(self.open.clone())
    }

    /// A connection was closed before anything was asked.
    pub fn turned_away(&self) {
        self.turned_away.fetch_add(1, Ordering::Relaxed);
    }

    pub fn answered(&self, method: &'static str, code: Code) {
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner).entry((method, name(code))).or_default() += 1;
    }

    pub(super) fn metrics(&self) -> Vec<Exposition> {
        let single = |value: &AtomicU64| vec![(Vec::new(), value.load(Ordering::Relaxed) as f64)];
        let answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        let answered = answered.iter().map(|((method, code), count)| {
            (vec![("method", (*method).into()), ("code", (*code).into())], *count as f64)
        });
        vec![
            Exposition::gauge(
                "meshd_workload_api_connections",
                "Connections to the Workload API open now",
                single(&self.open),
            ),
            Exposition::counter(
                "meshd_workload_api_turned_away",
                "Connections to the Workload API closed at once: their user has too many, or had ended",
                single(&self.turned_away),
            ),
            Exposition::counter(
                "meshd_workload_api_requests",
                "Calls of the Workload API and of secret discovery, by how they were answered first",
                answered.collect(),
            ),
        ]
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The codes we answer with.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::InvalidArgument => "invalid_argument",
        Code::PermissionDenied => "permission_denied",
        Code::Unavailable => "unavailable",
        Code::Unimplemented => "unimplemented",
        _ => "other",
    }
}
