//! Tasks that are to run for as long as meshd does. One that panics or returns has a defect; it is started again, from
//! what it has left, so that this does not become an outage hours later, when certificates end.

use std::any::Any;
use std::future::poll_fn;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::telemetry::Telemetry;

/// Doubled with each failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Short against the hours that certificates have left when they are renewed.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// After it ran for so long, the next failure is a first one.
const STEADY: Duration = Duration::from_secs(600);

pub(super) type Running<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

#[derive(Clone)]
pub(super) struct Supervisor(pub(super) Arc<Telemetry>);

impl Supervisor {
    /// Runs a task until meshd ends. Whatever it has in `state` when it panics must be good to start from.
    pub(super) fn keep<S, R>(&self, task: &'static str, mut state: S, mut run: R) -> JoinHandle<()>
    where
        S: Send + 'static,
        R: for<'a> FnMut(&'a mut S) -> Running<'a> + Send + 'static,
    {
        let telemetry = self.0.clone();
        tokio::spawn(async move {
            let mut pause = FIRST_PAUSE;
            loop {
                telemetry.tasks.started(task);
                let began = Instant::now();
                let running = run(&mut state);
                let why = end_of(running).await;
                telemetry.tasks.ended(task, &why);
                if began.elapsed() >= STEADY {
                    pause = FIRST_PAUSE;
                }
                let again_in_s = pause.as_secs();
                tracing::error!(task, why, again_in_s, "a part of meshd has ended by a defect and is started again");
                sleep(pause).await;
                pause = LONGEST_PAUSE.min(pause * 2);
            }
        })
    }

    /// For a task that cannot be started again.
    pub(super) fn watch(&self, task: &'static str, run: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        let telemetry = self.0.clone();
        tokio::spawn(async move {
            telemetry.tasks.started(task);
            let why = end_of(Box::pin(run)).await;
            telemetry.tasks.ended(task, &why);
            tracing::error!(task, why, "a part of meshd has ended by a defect; restart meshd to have it back");
        })
    }
}

async fn end_of(mut running: Running<'_>) -> String {
    let polled = poll_fn(|context| {
        // What panicked is never polled again.
        match catch_unwind(AssertUnwindSafe(|| running.as_mut().poll(context))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(())) => Poll::Ready("it returned".to_owned()),
            Err(panic) => Poll::Ready(format!("it panicked: {}", words(&*panic))),
        }
    });
    polled.await
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no words)")
}

/// One more handle of a socket, for whoever serves it now: another may follow. None ends that task, which is told.
pub(super) fn another<T>(handle: io::Result<T>) -> Option<T> {
    handle.inspect_err(|error| tracing::error!(%error, "no descriptor for a socket that is open already")).ok()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use super::*;
    use crate::telemetry::{AccessLog, TaskRecord};

    fn supervisor() -> Supervisor {
        Supervisor(Telemetry::new(1, AccessLog::off()))
    }

    fn record(supervisor: &Supervisor) -> TaskRecord {
        supervisor.0.tasks.records()["renewal"].clone()
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_goes_on_from_what_it_had_and_waits_longer_each_time() {
        let supervisor = supervisor();
        let (began, turns) = (Instant::now(), Arc::new(AtomicU64::new(0)));
        let task = supervisor.keep("renewal", turns.clone(), |turns: &mut Arc<AtomicU64>| {
            Box::pin(async move {
                let turn = turns.fetch_add(1, Relaxed);
                assert!(turn >= 3, "turn {turn} fails");
                std::future::pending::<()>().await;
            })
        });
        while turns.load(Relaxed) < 4 {
            sleep(Duration::from_millis(100)).await;
        }
        // After 1, 2 and 4 seconds.
        assert_eq!(began.elapsed().as_secs(), 7);
        let record = record(&supervisor);
        assert!(record.is_running && record.failures == 3, "{record:?}");
        assert_eq!(record.why.as_deref(), Some("it panicked: turn 2 fails"));
        task.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_returns_is_started_again_and_never_waits_longer_than_a_minute() {
        let supervisor = supervisor();
        let turns = Arc::new(AtomicU64::new(0));
        let task = supervisor.keep("renewal", turns.clone(), |turns: &mut Arc<AtomicU64>| {
            Box::pin(async move { _ = turns.fetch_add(1, Relaxed) })
        });
        sleep(Duration::from_secs(3600)).await;
        let often = turns.load(Relaxed);
        assert!((60..70).contains(&often), "{often}");
        assert_eq!(record(&supervisor).why.as_deref(), Some("it returned"));
        task.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_defect_that_shows_once_a_day_is_a_first_one_each_time() {
        let supervisor = supervisor();
        let starts = Arc::new(std::sync::Mutex::new(Vec::new()));
        let task = supervisor.keep("renewal", starts.clone(), |starts: &mut Arc<std::sync::Mutex<Vec<Instant>>>| {
            Box::pin(async move {
                starts.lock().unwrap().push(Instant::now());
                sleep(Duration::from_secs(86_400)).await;
            })
        });
        sleep(Duration::from_secs(4 * 86_400)).await;
        let starts = starts.lock().unwrap().clone();
        assert!(starts.windows(2).all(|two| (two[1] - two[0]).as_secs() == 86_401), "{starts:?}");
        task.abort();
    }

    #[tokio::test]
    async fn what_cannot_be_started_again_stays_down_and_says_why() {
        let supervisor = supervisor();
        supervisor.watch("renewal", async { panic!("no more") }).await.unwrap();
        let why = Some("it panicked: no more".to_owned());
        assert_eq!(record(&supervisor), TaskRecord { is_running: false, failures: 1, why });
    }
}
