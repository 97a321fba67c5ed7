//! Keeps the cache current: list, watch from there, and list again when the past was compacted, the member went away
//! for long, or every now and then to be sure.

use std::sync::Arc;
use std::time::Duration;

use meshd_etcd::api::{Event, WatchResponse};
use meshd_etcd::{Client, Error, Prefix, Watching};
use tokio::time::{Instant, interval, sleep, timeout};

use super::cache::{Cache, Snapshot, State, TIP};

/// A watch that has not told a change after so long stands still.
const SILENCE: Duration = Duration::from_secs(6);
const ASK_EVERY: Duration = Duration::from_secs(2);
const COMPARE_EVERY: Duration = Duration::from_secs(300);
const BACK_OFF: Duration = Duration::from_millis(100);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(2);

const WIPED: &str = "etcd has lost this PKI's records: issuing goes on from memory, nothing can be changed; stop all \
                     replicas and run `meshd-pki restore` on one";

pub(super) struct Watcher {
    pub(super) client: Arc<Client>,
    pub(super) cache: Arc<Cache>,
    pub(super) base: String,
    pub(super) prefix: Prefix,
}

impl Watcher {
    pub(super) async fn run(self) {
        let mut back_off = BACK_OFF;
        loop {
            let started = Instant::now();
            let error = match self.follow().await {
                Ok(()) => continue,
                Err(error) => error,
            };
            if error.is_compacted() {
                self.cache.change(|state| state.loaded = false);
                continue;
            }
            tracing::warn!(%error, "etcd cannot be followed; what is known of it stays in use");
            self.cache.change(|state| {
                if state.trouble.as_deref() != Some(WIPED) {
                    state.trouble = Some(error.to_string());
                }
            });
            self.client.leave_member();
            back_off = if started.elapsed() > SILENCE { BACK_OFF } else { (back_off * 2).min(LONGEST_BACK_OFF) };
            sleep(back_off).await;
        }
    }

    /// Until an error, or a comparison is due.
    async fn follow(&self) -> Result<(), Error> {
        if !self.cache.lock().loaded {
            self.load().await?;
        }
        let from = self.cache.lock().snapshot.revision + 1;
        let mut watching = self.client.watch(&self.prefix, from).await?;
        let mut asks = interval(ASK_EVERY);
        let compare_at = Instant::now() + COMPARE_EVERY;
        let mut current = Instant::now();
        loop {
            tokio::select! {
                answer = watching.next() => self.take(answer?)?,
                _ = asks.tick() => {
                    if !self.cache.lock().loaded {
                        return Err(Error::gone("nothing was read of it yet"));
                    }
                    if self.is_current().await? {
                        current = Instant::now();
                    } else if current.elapsed() > SILENCE {
                        return Err(Error::gone("the watch stands still"));
                    }
                }
                () = tokio::time::sleep_until(compare_at) => return self.compare(&mut watching).await,
            }
        }
    }

    /// Asks the majority, not the watch: progress notifications fail in several ways in releases of etcd 3.4 and 3.5.
    async fn is_current(&self) -> Result<bool, Error> {
        let (header, tip) = self.client.modified(&format!("{}{TIP}", self.base)).await?;
        let is_another = |state: &State| {
            state.loaded && (header.cluster_id != state.snapshot.cluster || header.revision < state.snapshot.revision)
        };
        if is_another(&self.cache.lock()) {
            self.cache.change(|state| state.loaded = false);
            return Err(Error::gone("it is another etcd than before, or went back in time; reading all of it"));
        }
        let state = self.cache.lock();
        // An etcd without a tip is not what a backup was made of.
        let is_current = state.loaded && state.snapshot.revision >= tip;
        let in_trouble = state.trouble.is_some();
        drop(state);
        if is_current && in_trouble {
            tracing::info!("etcd is followed again");
            self.cache.change(|state| state.trouble = None);
        }
        Ok(is_current)
    }

    fn take(&self, answer: WatchResponse) -> Result<(), Error> {
        if answer.compact_revision > 0 {
            tracing::info!(
                compacted = answer.compact_revision,
                "etcd has forgotten what was missed; reading all of it"
            );
            return Err(Error::compacted());
        }
        if answer.canceled {
            return Err(Error::gone(&answer.cancel_reason));
        }
        let mut wiped = false;
        self.cache.change(|state| {
            let mut next = state.snapshot.clone();
            for event in answer.events {
                next.apply(&self.base, event);
                if let Some(tip) = next.keys.get(TIP).filter(|tip| state.tips.back() != Some(&tip.bytes)) {
                    state.note_tip(&tip.bytes);
                }
            }
            wiped = state.snapshot.has_pki() && !next.has_pki();
            if wiped {
                state.loaded = false;
            } else {
                state.snapshot = next;
            }
        });
        if wiped { Err(Error::gone(WIPED)) } else { Ok(()) }
    }

    async fn load(&self) -> Result<(), Error> {
        let found = Snapshot::from_list(&self.base, self.client.list(&self.prefix).await?);
        self.cache.change(|state| replace(state, found));
        match self.cache.lock().trouble.clone() {
            Some(trouble) => Err(Error::gone(&trouble)),
            None => Ok(()),
        }
    }

    /// Whether the cache is what is stored: a lost event would otherwise stay lost.
    async fn compare(&self, watching: &mut Watching) -> Result<(), Error> {
        let found = Snapshot::from_list(&self.base, self.client.list(&self.prefix).await?);
        // What happened since the last event is on its way.
        while self.cache.lock().snapshot.content() != found.content() {
            let Ok(answer) = timeout(SILENCE, watching.next()).await else { return self.read_anew() };
            let (then, since) = split(answer?, found.revision);
            self.take(then)?;
            if since.events.is_empty() {
                continue;
            }
            // Changes come in order: what is not here by now will not come.
            if self.cache.lock().snapshot.content() != found.content() {
                return self.read_anew();
            }
            return self.take(since);
        }
        Ok(())
    }

    fn read_anew(&self) -> Result<(), Error> {
        self.cache.change(|state| state.loaded = false);
        Err(Error::gone("what was known of it was not what it holds; reading all of it again"))
    }
}

/// What a message tells of changes until a revision, and of those since.
fn split(answer: WatchResponse, revision: i64) -> (WatchResponse, WatchResponse) {
    let is_until = |event: &Event| event.kv.as_ref().is_none_or(|pair| pair.mod_revision <= revision);
    let (until, since) = answer.events.clone().into_iter().partition(is_until);
    (WatchResponse { events: until, ..answer }, WatchResponse { events: since, ..WatchResponse::default() })
}

/// An etcd that has nothing of a PKI that was there was wiped, or is another: then what is known counts.
fn replace(state: &mut State, found: Snapshot) {
    if state.snapshot.has_pki() && !found.has_pki() {
        if state.trouble.as_deref() != Some(WIPED) {
            tracing::error!(alarm = WIPED);
        }
        state.trouble = Some(WIPED.to_owned());
        return;
    }
    if let Some(tip) = found.keys.get(TIP) {
        state.note_tip(&tip.bytes);
    }
    state.snapshot = found;
    state.loaded = true;
    state.trouble = None;
}

#[cfg(test)]
mod tests {
    use meshd_etcd::api::KeyValue;

    use super::*;

    #[test]
    fn a_message_is_split_where_the_list_was_made_that_the_cache_is_compared_with() {
        let event =
            |mod_revision| Event { kv: Some(KeyValue { mod_revision, ..KeyValue::default() }), ..Event::default() };
        let events: Vec<Event> = [7, 8, 8, 9].map(event).to_vec();
        let (until, since) = split(WatchResponse { events, ..WatchResponse::default() }, 8);
        let revisions = |answer: &WatchResponse| {
            answer.events.iter().map(|event| event.kv.as_ref().unwrap().mod_revision).collect::<Vec<_>>()
        };
        assert_eq!((revisions(&until), revisions(&since)), (vec![7, 8, 8], vec![9]));
        let canceled = WatchResponse { canceled: true, ..WatchResponse::default() };
        assert!(split(canceled, 8).0.canceled, "what it says besides is not lost");
    }
}
