//! Parts of the daemon that ended by a defect.

use serde::{Deserialize, Serialize};

use crate::telemetry::Tasks;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskView {
    pub task: String,
    pub is_running: bool,
    /// Times it ended since meshd was started.
    pub failures: u64,
    /// Why it ended last.
    pub why: String,
}

impl TaskView {
    /// Those that ever ended.
    pub(super) fn all(tasks: &Tasks) -> Vec<TaskView> {
        let view = |(task, record): (&'static str, crate::telemetry::TaskRecord)| TaskView {
            task: task.to_owned(),
            is_running: record.is_running,
            failures: record.failures,
            why: record.why.unwrap_or_default(),
        };
        tasks.records().into_iter().filter(|(_, record)| record.failures > 0).map(view).collect()
    }

    pub fn said(&self) -> String {
        let TaskView { task, failures, why, .. } = self;
        let now = if self.is_running { "it runs again" } else { "it does NOT RUN now" };
        format!("`{task}` of the daemon ended by a defect, {failures} times so far, and {now}; last because {why}")
    }
}

/// As lines of `meshd status`.
pub(super) fn show(tasks: &[TaskView]) -> String {
    tasks.iter().map(|task| format!("  ‼ {}\n", task.said())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ended_is_shown_and_whether_it_is_back() {
        let tasks = Tasks::default();
        for task in ["renewal", "dns", "metrics"] {
            tasks.started(task);
        }
        tasks.ended("renewal", "it panicked: no more");
        tasks.ended("dns", "it returned");
        tasks.started("dns");
        let page = show(&TaskView::all(&tasks));
        assert_eq!(page.lines().count(), 2, "{page}");
        assert!(
            page.contains("`renewal`") && page.contains("NOT RUN now; last because it panicked: no more"),
            "{page}"
        );
        assert!(page.contains("`dns`") && page.contains("it runs again"), "{page}");
    }
}
