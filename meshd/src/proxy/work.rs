//! What is under way, so that a drain knows when it is done.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Streams and connections under way, so that a drain knows when it is done.
#[derive(Default)]
pub struct Work(AtomicU64);

pub(super) struct Working(Arc<Work>);

impl Work {
    pub(super) fn begin(self: &Arc<Work>) -> Working {
        self.0.fetch_add(1, Ordering::Relaxed);
        Working(self.clone())
    }

    pub fn under_way(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}
