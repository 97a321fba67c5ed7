//! Keeps what is known of Consul current: see the picture in `mod.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

use super::known::Known;
use super::probe::{Probe, Sign};
use super::read::Reading;
use super::remote::{Error, Query, Remote};
use super::watch::{Failures, News, Turns, ask_once, takes_turns, watch};
use crate::backoff::Backoff;
use crate::resync::Resync;
use crate::{Sink, SourceEvent, Wanted};

/// What a resync could not read is asked again after this.
const REREAD_AGAIN: Duration = Duration::from_secs(10);
/// Answers that wait to be told.
const INBOX: usize = 64;
/// Troubles named at once.
const MOST_TROUBLES: usize = 3;

pub(super) async fn run<R: Remote>(mut remote: R, reading: Reading, mut wanted: watch::Receiver<Wanted>, sink: Sink) {
    let mut known = Known::new(reading);
    // What an earlier life of this daemon knew beyond that is wanted no more.
    let begun_with = wanted.borrow().clone();
    sink.send(SourceEvent::Narrowed(begun_with)).await;
    let (mut backoff, mut resync) = (Backoff::default(), Resync::default());
    loop {
        let started = Instant::now();
        if let Err(error) = follow(&mut remote, &mut known, &mut wanted, &mut resync, &sink).await {
            sink.send(SourceEvent::Unavailable { error: error.to_string() }).await;
            remote = remote.another();
        }
        backoff.rest(started).await;
    }
}

/// Until Consul cannot be reached, or until what is known is to be read anew.
async fn follow<R: Remote>(
    remote: &mut R,
    known: &mut Known,
    wanted: &mut watch::Receiver<Wanted>,
    resync: &mut Resync,
    sink: &Sink,
) -> Result<(), Error> {
    known.meets(remote.cluster().await?.as_ref(), Instant::now());
    let asked = wanted.borrow_and_update().clone();
    adjust(known, resync, &asked, sink).await;
    let (send, mut inbox) = mpsc::channel(INBOX);
    let mut watches = Watches::new(remote.another(), send.clone());
    watches.adjust(known);
    let mut rereads = Rereads::new(send);
    let mut troubles = Troubles::default();
    if known.is_whole() {
        sink.send(SourceEvent::InSync).await;
    }
    let answering = remote.another();
    let mut probe = Probe::new(std::mem::replace(remote, answering));
    loop {
        let resync_at = resync.at();
        tokio::select! {
            // Senders are held above, so the inbox never ends.
            Some(news) = inbox.recv() => {
                if news.went_back {
                    known.went_back(Instant::now());
                    return Ok(());
                }
                let of_names = news.query == Query::Names;
                take(news, known, &mut troubles, sink).await;
                if of_names {
                    watches.adjust(known);
                    troubles.of.retain(|query, _| watches.handles.contains_key(query));
                }
            }
            sign = probe.sign() => {
                let trouble = match sign {
                    Sign::Well(cluster) if !known.meets(cluster.as_ref(), Instant::now()) => return Ok(()),
                    Sign::Well(_) => None,
                    Sign::Trouble(error) => Some(error.to_string()),
                    Sign::Lost(error) => return Err(error),
                };
                troubles.probed(trouble, known.is_whole(), sink).await;
            }
            Ok(()) = wanted.changed() => {
                let asked = wanted.borrow_and_update().clone();
                adjust(known, resync, &asked, sink).await;
                watches.adjust(known);
                troubles.of.retain(|query, _| watches.handles.contains_key(query));
                rereads.begin(remote, known);
            }
            () = sleep_until(resync_at) => {
                known.resync(Instant::now());
                resync.begins();
                rereads.begin(remote, known);
            }
            // Not before what was answered is taken.
            () = sleep_until(rereads.again_at.unwrap_or(resync_at)), if rereads.again_at.is_some() && inbox.is_empty() => {
                rereads.begin(remote, known);
            }
            Some(ended) = rereads.tasks.join_next() => match ended {
                // What came meanwhile may ask for more.
                Ok(Failures(0)) => {
                    rereads.backoff = Backoff::default();
                    rereads.again_at = Some(Instant::now());
                }
                // Watches and probes say what is wrong. What failed is asked again, ever less often.
                _ => rereads.rest(),
            },
            Some(Err(error)) = watches.tasks.join_next() => {
                if error.is_panic() {
                    return Err(Error::Inside);
                }
            }
        }
    }
}

async fn adjust(known: &mut Known, resync: &mut Resync, wanted: &Wanted, sink: &Sink) {
    for suspect in resync.heed(wanted) {
        known.suspect(&suspect, Instant::now());
    }
    if known.adjust(wanted, Instant::now()) {
        sink.send(SourceEvent::Narrowed(wanted.clone())).await;
    }
}

async fn take(news: News, known: &mut Known, troubles: &mut Troubles, sink: &Sink) {
    let News { query, answer, fell_from, .. } = news;
    let events = answer.and_then(|answer| {
        if let Some(index) = fell_from {
            known.falls(&query, index);
        }
        known.take(&query, answer, Instant::now())
    });
    match &events {
        Ok(_) => drop(troubles.of.remove(&query)),
        Err(error) => drop(troubles.of.insert(query, error.to_string())),
    }
    let events = events.unwrap_or_default();
    let told = !events.is_empty();
    for event in events {
        sink.send(event).await;
    }
    troubles.tell(told, known.is_whole(), sink).await;
}

/// Why queries fail now.
#[derive(Default)]
struct Troubles {
    of: BTreeMap<Query, String>,
    of_probe: Option<String>,
    said: Option<String>,
}

impl Troubles {
    /// What is told of some services is not to pass for a sign that all are well.
    async fn tell(&mut self, told: bool, is_whole: bool, sink: &Sink) {
        let now = self.named();
        if now == self.said && !(told && now.is_some()) {
            return;
        }
        self.said.clone_from(&now);
        match now {
            Some(error) if self.of_probe.is_some() => sink.send(SourceEvent::Unavailable { error }).await,
            // Whoever answers the others is there.
            Some(error) => sink.send(SourceEvent::Troubled { error }).await,
            None if is_whole => sink.send(SourceEvent::InSync).await,
            // The list that is still to come says so.
            None => {}
        }
    }

    /// A sign of life is told each time, as long as nothing is wrong.
    async fn probed(&mut self, trouble: Option<String>, is_whole: bool, sink: &Sink) {
        self.of_probe = trouble;
        let was_well = self.said.is_none();
        self.tell(false, is_whole, sink).await;
        if was_well && self.said.is_none() && is_whole {
            sink.send(SourceEvent::InSync).await;
        }
    }

    /// Most fail for the same reason.
    fn named(&self) -> Option<String> {
        let different: BTreeSet<&str> = self.of.values().chain(&self.of_probe).map(String::as_str).collect();
        let some: Vec<&str> = different.into_iter().take(MOST_TROUBLES).collect();
        (!some.is_empty()).then(|| some.join("; "))
    }
}

/// A task for each query that is followed. All end with this.
struct Watches<R> {
    tasks: JoinSet<()>,
    handles: BTreeMap<Query, AbortHandle>,
    turns: Arc<Turns<R>>,
    news: mpsc::Sender<News>,
}

impl<R: Remote> Watches<R> {
    fn new(remote: R, news: mpsc::Sender<News>) -> Watches<R> {
        Watches { tasks: JoinSet::new(), handles: BTreeMap::new(), turns: Arc::new(Turns::new(remote)), news }
    }

    fn adjust(&mut self, known: &Known) {
        let queries = known.queries();
        self.handles.retain(|query, task| {
            let stays = queries.contains(query);
            if !stays {
                task.abort();
            }
            stays
        });
        self.turns.are_for(queries.iter().filter(|query| takes_turns(query)).count());
        for query in queries {
            if !self.handles.contains_key(&query) {
                let index = known.index(&query);
                let task = watch(query.clone(), index, self.turns.clone(), self.news.clone());
                self.handles.insert(query, self.tasks.spawn(task));
            }
        }
    }
}

/// Questions asked beside the watches, which go on.
struct Rereads {
    tasks: JoinSet<Failures>,
    news: mpsc::Sender<News>,
    /// When those that failed are asked again.
    again_at: Option<Instant>,
    backoff: Backoff,
}

impl Rereads {
    fn new(news: mpsc::Sender<News>) -> Rereads {
        Rereads { tasks: JoinSet::new(), news, again_at: None, backoff: Backoff::default() }
    }

    /// Unless it is under way.
    fn begin<R: Remote>(&mut self, remote: &R, known: &Known) {
        self.again_at = None;
        let overdue = known.overdue();
        if self.tasks.is_empty() && !overdue.is_empty() {
            let overdue = overdue.into_iter().map(|query| (query.clone(), known.index(&query)));
            let overdue: Vec<_> = overdue.collect();
            self.tasks.spawn(ask_once(remote.another(), overdue, self.news.clone()));
        }
    }

    fn rest(&mut self) {
        let pause = REREAD_AGAIN + self.backoff.pause(Duration::ZERO, fastrand::f64());
        self.again_at = Some(Instant::now() + pause);
    }
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
