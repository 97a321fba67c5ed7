//! How the parts of the daemon fare that are to run for as long as it does.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Exposition;

#[derive(Debug, Default)]
pub struct Tasks(Mutex<BTreeMap<&'static str, TaskRecord>>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TaskRecord {
    pub is_running: bool,
    /// Times it ended, which it never should.
    pub failures: u64,
    /// Why it ended last.
    pub why: Option<String>,
}

impl Tasks {
    pub fn started(&self, task: &'static str) {
        self.lock().entry(task).or_default().is_running = true;
    }

    pub fn ended(&self, task: &'static str, why: &str) {
        let mut tasks = self.lock();
        let record = tasks.entry(task).or_default();
        *record = TaskRecord { is_running: false, failures: record.failures + 1, why: Some(why.to_owned()) };
    }

    pub fn records(&self) -> BTreeMap<&'static str, TaskRecord> {
        self.lock().clone()
    }

    pub(super) fn metrics(&self) -> [Exposition; 2] {
        let records = self.records();
        let per_task = |value: fn(&TaskRecord) -> f64| {
            records.iter().map(|(task, record)| (vec![("task", (*task).into())], value(record))).collect()
        };
        [
            Exposition::counter(
                "meshd_task_failures",
                "Times a part of meshd ended by a defect; the log has the reason, and it is started again if it can be",
                per_task(|record| record.failures as f64),
            ),
            Exposition::gauge(
                "meshd_task_running",
                "1 while that part of meshd runs",
                per_task(|record| f64::from(u8::from(record.is_running))),
            ),
        ]
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, TaskRecord>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
