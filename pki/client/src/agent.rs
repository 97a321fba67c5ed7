//! Keeps the credentials of a host fresh.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use meshd_identity::SpiffeId;
use meshd_pki_api::{MAX_BATCH, v1};
use tokio::sync::watch;

use crate::connect::{ConnectError, PkiClient, call, connect, verified_tls};
use crate::inventory::inventory;
use crate::key::NewKey;
use crate::metrics::RenewalMetrics;
use crate::reply::{ReplyError, problem, read_bundle, read_svid};
use crate::schedule::{due, next_wake, refusal_delay, remaining, retry_delay};
use crate::state::{State, from_unix_ms, unix_ms};
use crate::store::{MACHINE_ID, Store, StoreError};
use crate::{Credentials, refusal_text};

type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// The longest back-off. A retry time further away means that the clock was set back.
const LONGEST_RETRY: Duration = Duration::from_secs(300);

/// The credentials of this host: at once from disk, then renewed in the background for as long as [`Agent::run`] runs.
pub struct Agent {
    store: Store,
    state: State,
    publish: watch::Sender<Arc<Credentials>>,
    metrics: Arc<RenewalMetrics>,
    clock: Clock,
    /// Identities the PKI refused, with the time to ask again.
    waiting: BTreeMap<SpiffeId, SystemTime>,
    retry: Retry,
    /// In use but not yet on disk.
    unsaved: bool,
}

/// What an [`Agent`] reads from its surroundings.
#[derive(Clone)]
pub struct Surroundings {
    pub clock: Clock,
    pub machine_id_file: PathBuf,
}

impl Default for Surroundings {
    fn default() -> Surroundings {
        Surroundings { clock: Arc::new(SystemTime::now), machine_id_file: MACHINE_ID.into() }
    }
}

#[derive(Default)]
struct Retry {
    not_before: Option<SystemTime>,
    delay: Duration,
}

#[derive(Debug, thiserror::Error)]
enum RenewError {
    #[error("no PKI server could be used: {0}")]
    Unreachable(String),
    #[error("the PKI refused: {0}")]
    Refused(String),
    #[error(transparent)]
    Reply(#[from] ReplyError),
    #[error(
        "this host's certificate has ended, the PKI will not know it; make a token with `meshd-pki token create \
         --host {0}` and run `meshd join` again"
    )]
    HostExpired(String),
    #[error(
        "new certificates are due for renewal on arrival: this clock is {0} s ahead of the PKI's; check NTP on both"
    )]
    Clock(i64),
    #[error("cannot make a key: {0}")]
    Key(#[from] rcgen::Error),
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

impl Agent {
    /// Loads the last known good credentials. Never asks the PKI, so a host starts while the PKI is down.
    pub fn open(dir: &Path) -> Result<Agent, StoreError> {
        Agent::open_in(dir, Surroundings::default())
    }

    pub fn open_in(dir: &Path, surroundings: Surroundings) -> Result<Agent, StoreError> {
        let mut store = Store::new(dir, &surroundings.machine_id_file);
        let state = store.load()?;
        let (publish, _) = watch::channel(Arc::new(state.credentials.clone()));
        Ok(Agent {
            store,
            state,
            publish,
            metrics: Arc::default(),
            clock: surroundings.clock,
            waiting: BTreeMap::new(),
            retry: Retry::default(),
            unsaved: false,
        })
    }

    pub fn watch(&self) -> watch::Receiver<Arc<Credentials>> {
        self.publish.subscribe()
    }

    pub fn metrics(&self) -> Arc<RenewalMetrics> {
        self.metrics.clone()
    }

    /// Renews what is held and asks for what is newly wanted, for ever. A failure never takes anything away.
    pub async fn run(mut self, mut wanted: watch::Receiver<BTreeSet<SpiffeId>>) {
        let mut known = wanted.borrow_and_update().clone();
        loop {
            self.step(&known).await;
            let wake = self.sleep_time(&known);
            tokio::select! {
                () = tokio::time::sleep(wake) => {}
                Ok(()) = wanted.changed() => {
                    let now_wanted = wanted.borrow_and_update().clone();
                    if !now_wanted.is_subset(&known) {
                        // Something new is waited for: the back-off of earlier failures is not its own.
                        self.retry = Retry::default();
                    }
                    known = now_wanted;
                }
            }
        }
    }

    async fn step(&mut self, wanted: &BTreeSet<SpiffeId>) {
        if self.unsaved {
            self.save();
        }
        let now = (self.clock)();
        let mut asked = due(&self.state.credentials, wanted, &self.waiting, now);
        asked.truncate(MAX_BATCH);
        if asked.is_empty() || !self.retry.is_open(now) {
            return;
        }
        let renewed = match self.renew(&asked, now).await {
            Ok(()) => self.still_due(&asked, wanted),
            Err(error) => Err(error),
        };
        match renewed {
            Ok(()) => self.retry = Retry::default(),
            Err(error) => self.failed(&error, &asked),
        }
    }

    /// With clocks far apart a new certificate can look old on arrival; asking again at once would never end.
    fn still_due(&self, asked: &[SpiffeId], wanted: &BTreeSet<SpiffeId>) -> Result<(), RenewError> {
        let due = due(&self.state.credentials, wanted, &self.waiting, (self.clock)());
        match due.iter().any(|id| asked.contains(id)) {
            true => Err(RenewError::Clock(self.metrics.clock_offset_ms() / 1000)),
            false => Ok(()),
        }
    }

    fn failed(&mut self, error: &RenewError, asked: &[SpiffeId]) {
        let now = (self.clock)();
        let left = remaining(&self.state.credentials, asked, now);
        self.retry.failed(now, left, fastrand::f64());
        let again = self.retry.delay.as_secs();
        tracing::warn!(%error, identities = asked.len(), retry_in_s = again, "renewal failed; credentials in use stay");
        self.metrics.failed(&error.to_string());
    }

    fn sleep_time(&self, wanted: &BTreeSet<SpiffeId>) -> Duration {
        let now = (self.clock)();
        let anything_due = !due(&self.state.credentials, wanted, &self.waiting, now).is_empty();
        let wake = next_wake(&self.state.credentials, wanted, &self.waiting, now);
        // A millisecond past the moment itself, so that it has come when we look.
        let wake = wake + Duration::from_millis(1);
        if anything_due { self.retry.wait(now).min(wake) } else { wake }
    }

    async fn renew(&mut self, asked: &[SpiffeId], now: SystemTime) -> Result<(), RenewError> {
        let held = &self.state.credentials;
        if held.host.not_after <= now {
            return Err(RenewError::HostExpired(held.host_id.clone()));
        }
        let keys: Vec<NewKey> = asked.iter().map(|_| NewKey::generate()).collect::<Result<_, _>>()?;
        let mut items = Vec::new();
        for (id, key) in asked.iter().zip(&keys) {
            items.push(v1::IssueItem { spiffe_id: id.to_string(), csr: key.request()? });
        }
        let request = v1::IssueBatchRequest {
            items,
            host_time_unix_ms: unix_ms(now),
            bundle_sequence: held.bundle.sequence,
            inventory: Some(inventory(held)),
        };
        let mut pki = self.connect_anywhere().await?;
        let reply =
            call(pki.issue_batch(request)).await.map_err(|status| RenewError::Refused(refusal_text(&status)))?;
        self.install(reply, asked, &keys)
    }

    async fn connect_anywhere(&self) -> Result<PkiClient, RenewError> {
        let held = &self.state.credentials;
        let tls = verified_tls(&held.bundle, Some(&held.host), self.state.pki_time)?;
        let mut addresses = held.pki.clone();
        fastrand::shuffle(&mut addresses);
        let mut reasons = Vec::new();
        for address in addresses {
            match connect(&address, tls.clone()).await {
                Ok(pki) => return Ok(pki),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        Err(RenewError::Unreachable(reasons.join("; ")))
    }

    /// Takes over a whole reply or nothing of it.
    fn install(&mut self, reply: v1::IssueBatchReply, asked: &[SpiffeId], keys: &[NewKey]) -> Result<(), RenewError> {
        let now = (self.clock)();
        let pki_time = from_unix_ms(reply.server_time_unix_ms);
        let mut next = self.state.clone();
        let held = &mut next.credentials;
        held.bundle = read_bundle(reply.bundle, &held.trust_domain, held.bundle.sequence)?;
        if reply.results.len() != asked.len() {
            return Err(problem(format!("{} results for {} questions", reply.results.len(), asked.len())).into());
        }
        let mut waiting = self.waiting.clone();
        for ((id, key), result) in asked.iter().zip(keys).zip(reply.results) {
            waiting.remove(id);
            match result.selectors.is_empty() {
                true => drop(held.selectors.remove(id)),
                false => drop(held.selectors.insert(id.clone(), result.selectors)),
            }
            match result.outcome {
                Some(v1::issue_result::Outcome::Svid(svid)) => {
                    let svid = Arc::new(read_svid(svid, id, key, &held.bundle, pki_time)?);
                    held.refused.remove(id);
                    if *id == held.host.id { held.host = svid } else { _ = held.workloads.insert(id.clone(), svid) }
                }
                Some(v1::issue_result::Outcome::Refusal(refusal)) => {
                    tracing::warn!(identity = %id, reason = %refusal.message, "the PKI refused an identity");
                    held.refused.insert(id.clone(), refusal.message);
                    waiting.insert(id.clone(), now + refusal_delay(fastrand::f64()));
                }
                None => return Err(problem(format!("no outcome for {id}")).into()),
            }
        }
        // What nobody wanted any more was not renewed; it goes when it has ended.
        held.workloads.retain(|_, svid| svid.not_after > now);
        if !reply.pki_addresses.is_empty() {
            held.pki = reply.pki_addresses;
        }
        next.pki_time = pki_time;
        self.state = next;
        self.waiting = waiting;
        self.save();
        self.publish.send_replace(Arc::new(self.state.credentials.clone()));
        self.metrics.succeeded(unix_ms(now), unix_ms(pki_time));
        Ok(())
    }

    /// A full disk must not stop renewal: the new credentials are used, and written as soon as that works.
    fn save(&mut self) {
        match self.store.save(&self.state) {
            Ok(()) => self.unsaved = false,
            Err(error) => {
                tracing::error!(%error, "new credentials are in use but not on disk");
                self.metrics.store_failed();
                self.unsaved = true;
            }
        }
    }
}

impl Retry {
    fn is_open(&self, now: SystemTime) -> bool {
        self.wait(now).is_zero()
    }

    fn wait(&self, now: SystemTime) -> Duration {
        let wait = self.not_before.and_then(|at| at.duration_since(now).ok()).unwrap_or_default();
        if wait > LONGEST_RETRY { Duration::ZERO } else { wait }
    }

    fn failed(&mut self, now: SystemTime, remaining: Option<Duration>, chance: f64) {
        self.delay = retry_delay(self.delay, remaining, chance);
        self.not_before = Some(now + self.delay);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retry_opens_when_its_delay_has_passed_or_the_clock_was_set_back() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let mut retry = Retry::default();
        assert!(retry.is_open(now));
        retry.failed(now, None, 1.0);
        assert!(!retry.is_open(now) && retry.delay >= Duration::from_secs(1));
        assert!(retry.is_open(now + retry.delay));
        assert!(retry.is_open(now - Duration::from_secs(3600)));
    }

    #[test]
    fn failures_grow_the_delay_and_the_largest_is_five_minutes() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let mut retry = Retry::default();
        let mut delays = Vec::new();
        for _ in 0..12 {
            retry.failed(now, Some(Duration::from_secs(48 * 3600)), 1.0);
            delays.push(retry.delay.as_secs());
        }
        assert_eq!(delays[..4], [1, 3, 9, 27]);
        assert_eq!(delays.last(), Some(&300));
    }
}
