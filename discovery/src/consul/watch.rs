//! One query, followed for good: the rules of Consul's blocking queries.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep_until};

use super::remote::{Answer, Error, Query, Remote};
use crate::backoff::{Backoff, jittered};

/// A lost wake-up is made good for after so long, and NATs forget idle connections after minutes.
const WAIT: Duration = Duration::from_secs(55);
/// While others wait for their turn.
const SHORT_WAIT: Duration = Duration::from_secs(5);
/// By how much the clocks of an agent and of this host may differ over one wait.
const EARLY: Duration = Duration::from_secs(1);
/// An index that changes in a storm, as every heartbeat of a check can do, is followed ten times a second.
const PACE: Duration = Duration::from_millis(100);
/// Services and namespaces that are followed at once, with a connection each: Consul's agents allow 200 for each address, and this host
/// may have other users of its agent.
pub(super) const TURNS: usize = 128;

/// Of those, beside them, that ask what there is now: they do not wait behind others that wait for changes.
const FIRST_TURNS: usize = 32;

/// Who may ask now, and the connections that are free for it.
#[derive(Debug)]
pub(super) struct Turns<R> {
    semaphore: Semaphore,
    first: Semaphore,
    /// How many want to.
    watches: AtomicUsize,
    free: Mutex<Free<R>>,
}

#[derive(Debug)]
struct Free<R> {
    first: R,
    kept: Vec<R>,
}

impl<R: Remote> Turns<R> {
    pub(super) fn new(first: R) -> Turns<R> {
        let free = Mutex::new(Free { first, kept: Vec::new() });
        Turns {
            semaphore: Semaphore::new(TURNS),
            first: Semaphore::new(FIRST_TURNS),
            watches: AtomicUsize::new(0),
            free,
        }
    }

    pub(super) fn are_for(&self, watches: usize) {
        self.watches.store(watches, Ordering::Relaxed);
    }

    fn are_scarce(&self) -> bool {
        self.watches.load(Ordering::Relaxed) > TURNS
    }

    fn free(&self) -> MutexGuard<'_, Free<R>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_connection(&self) -> R {
        let mut free = self.free();
        free.kept.pop().unwrap_or_else(|| free.first.another())
    }

    fn give_back(&self, connection: R) {
        self.free().kept.push(connection);
    }
}

/// An answer of a watch, or of a question asked beside it.
#[derive(Debug)]
pub(super) struct News {
    pub(super) query: Query,
    pub(super) answer: Result<Answer, Error>,
    /// The store was put back, or emptied.
    pub(super) went_back: bool,
    /// The index that was known before, if it is lower now.
    pub(super) fell_from: Option<u64>,
}

impl News {
    /// `known`: the index that was known when it was asked.
    fn new(query: Query, answer: Result<Answer, Error>, known: u64) -> News {
        let fell = answer.as_ref().is_ok_and(|answer| answer.index < known);
        // That of the store falls by itself: a quarter of an hour after a delete, Consul forgets the delete.
        let went_back = fell && !matches!(query, Query::Documents(_) | Query::Resources(_));
        News { query, answer, went_back, fell_from: fell.then_some(known) }
    }
}

/// Until nobody hears it. `known` is the index that was read in the time before.
pub(super) async fn watch<R: Remote>(query: Query, known: u64, turns: Arc<Turns<R>>, news: mpsc::Sender<News>) {
    let (mut index, mut before) = (0, known);
    let mut backoff = Backoff::default();
    loop {
        let (answer, started, wait) = ask(&query, index, &turns).await;
        let mut next = started + PACE;
        let mut said = News::new(query.clone(), answer, before);
        match &said.answer {
            Ok(answer) => {
                backoff = Backoff::default();
                // A query answers before its time with what was known already only when a snapshot was restored.
                said.went_back |= index > 0 && answer.index == index && started.elapsed() + EARLY < wait;
                // From 0 on the next question does not block: what there is now is read before it is waited for.
                index = if said.went_back || said.fell_from.is_some() { 0 } else { answer.index };
                before = answer.index;
            }
            Err(_) => {
                // One that blocks would tell only when something changes that all is well again.
                index = 0;
                next = Instant::now() + backoff.pause(started.elapsed(), fastrand::f64());
            }
        }
        if news.send(said).await.is_err() {
            return;
        }
        sleep_until(next).await;
    }
}

/// Of what there may be many.
pub(super) fn takes_turns(query: &Query) -> bool {
    matches!(query, Query::Instances(_) | Query::Documents(Some(_)))
}

async fn ask<R: Remote>(query: &Query, index: u64, turns: &Turns<R>) -> (Result<Answer, Error>, Instant, Duration) {
    let takes_turns = takes_turns(query);
    let queue = if index == 0 { &turns.first } else { &turns.semaphore };
    // They are never closed, so there is always a turn.
    let _turn = if takes_turns { queue.acquire().await.ok() } else { None };
    let wait = if takes_turns && turns.are_scarce() { SHORT_WAIT } else { WAIT };
    let wait = jittered(wait, fastrand::f64() / 2.0);
    let started = Instant::now();
    let mut connection = turns.take_connection();
    let answer = connection.ask(query, index, wait).await;
    if answer.is_ok() {
        turns.give_back(connection);
    }
    (answer, started, wait)
}

/// How many questions got no answer.
pub(super) struct Failures(pub(super) usize);

/// Asks each query once, beside its watch; with the index that is known of it. One that fails does not keep the others.
pub(super) async fn ask_once<R: Remote>(
    mut remote: R,
    queries: impl IntoIterator<Item = (Query, u64)>,
    news: mpsc::Sender<News>,
) -> Failures {
    let mut failures = Failures(0);
    for (query, known) in queries {
        match remote.ask(&query, 0, Duration::ZERO).await {
            Ok(answer) => {
                if news.send(News::new(query, Ok(answer), known)).await.is_err() {
                    break;
                }
            }
            Err(_) => failures.0 += 1,
        }
    }
    failures
}
