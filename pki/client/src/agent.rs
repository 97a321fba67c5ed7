//! Keeps the credentials of a host fresh.

use std::collections::BTreeSet;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use meshd_identity::SpiffeId;
use meshd_identity::statements::DenySet;
use meshd_pki_api::{MAX_BATCH, v1};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};

use crate::Credentials;
use crate::ban;
use crate::come_back::{Absent, refused};
use crate::connect::PkiClient;
use crate::deny::Denials;
use crate::error::RenewError;
use crate::inventory::{inventory, is_rooted};
use crate::key::NewKey;
use crate::line::{Caller, Failed, Line};
use crate::link::{Facts, Heard, Link};
use crate::metrics::RenewalMetrics;
use crate::recovery::{RecoveryError, leads_to};
use crate::reply::{newer_bundle, problem, read_bundle, read_svid};
use crate::schedule::{Circumstances, due, next_wake, patience, refusal_delay, remaining, retry_delay};
use crate::state::{State, from_unix_ms, unix_ms};
use crate::store::{Store, StoreError};
use crate::surroundings::{Surroundings, Timeline};

/// The longest back-off. A retry time further away means that the clock was set back.
const LONGEST_RETRY: Duration = Duration::from_secs(300);

/// The credentials of this host: at once from disk, then renewed in the background for as long as [`Agent::run`] runs.
pub struct Agent {
    store: Store,
    state: State,
    publish: watch::Sender<Arc<Credentials>>,
    metrics: Arc<RenewalMetrics>,
    surroundings: Surroundings,
    timeline: Timeline,
    told: Circumstances,
    denials: Arc<Mutex<Denials>>,
    line: Line,
    /// The PKI knows an older deny set than this host.
    lend_denials: bool,
    /// The conversation with the PKI failed for a reason that does not pass by itself.
    adrift: Option<Adrift>,
    retry: Retry,
    /// Generations on disk that have yet to be replaced by what is in use.
    unsaved: u8,
    /// What is held may not have been published: the last run ended wherever it was.
    is_broken: bool,
}

/// All there are.
const GENERATIONS: u8 = 2;

/// Reports that wait while the agent is busy renewing.
const HEARD_QUEUE: usize = 8;
/// Of what is heard during a step; more waits in the queue, and then at the PKI.
const MOST_MEANWHILE: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Adrift {
    /// What answers does not verify by the bundle held here.
    Distrusts,
    /// The PKI does not accept this host's certificate.
    Unknown,
}

#[derive(Default)]
struct Retry {
    not_before: Option<SystemTime>,
    delay: Duration,
}

impl Agent {
    /// Loads the last known good credentials. Never asks the PKI, so a host starts while the PKI is down.
    pub fn open(dir: &Path) -> Result<Agent, StoreError> {
        Agent::open_in(dir, Surroundings::default())
    }

    pub fn open_in(dir: &Path, surroundings: Surroundings) -> Result<Agent, StoreError> {
        let mut store = Store::new(dir, &surroundings.machine_id_file);
        let state = store.load()?;
        let denials = Denials::open(dir, &state.credentials.trust_domain);
        let heeded = ban::heed(&state, denials.name(&state.credentials.host.id));
        // Neither generation may keep the keys. Whoever only looks, as the command line does, writes nothing.
        let unsaved = if heeded.is_some() { GENERATIONS } else { 0 };
        let state = heeded.unwrap_or(state);
        let (publish, _) = watch::channel(Arc::new(state.credentials.clone()));
        Ok(Agent {
            store,
            state,
            publish,
            metrics: Arc::default(),
            timeline: Timeline::from(&surroundings),
            surroundings,
            told: Circumstances::default(),
            denials: Arc::new(Mutex::new(denials)),
            line: Line::default(),
            lend_denials: false,
            adrift: None,
            retry: Retry::default(),
            unsaved,
            is_broken: false,
        })
    }

    pub fn watch(&self) -> watch::Receiver<Arc<Credentials>> {
        self.publish.subscribe()
    }

    /// Whom to refuse although their certificates are valid.
    pub fn denied(&self) -> watch::Receiver<Arc<DenySet>> {
        lock(&self.denials).watch()
    }

    /// For whoever else asks the PKI in the name of this host.
    pub fn line(&self) -> Line {
        self.line.clone()
    }

    pub fn metrics(&self) -> Arc<RenewalMetrics> {
        self.metrics.clone()
    }

    /// Renews what is held and asks for what is newly wanted, for ever. A failure never takes anything away.
    pub async fn run(mut self, mut wanted: watch::Receiver<BTreeSet<SpiffeId>>) {
        self.work(&mut wanted).await;
    }

    /// The same, to be supervised: ends, or panics, by a defect only, and goes on from what is held when it is called again.
    pub async fn work(&mut self, wanted: &mut watch::Receiver<BTreeSet<SpiffeId>>) {
        self.metrics.lost();
        if std::mem::replace(&mut self.is_broken, true) {
            self.publish.send_replace(Arc::new(self.state.credentials.clone()));
        }
        let mut known = wanted.borrow_and_update().clone();
        let facts = watch::Sender::new(self.facts());
        let (say, mut heard) = mpsc::channel(HEARD_QUEUE);
        // Ends with the agent.
        let mut link = JoinSet::new();
        link.spawn(Link::new(self.surroundings.clone(), self.line.clone(), facts.subscribe(), say).hold());
        loop {
            for heard in self.step_and_listen(&known, &mut heard).await {
                self.take_in(heard);
            }
            self.tell(&facts);
            let wake = self.sleep_time(&known);
            tokio::select! {
                () = tokio::time::sleep(wake) => {}
                Some(ended) = link.join_next() => return bequeath(ended),
                Some(heard) = heard.recv() => {
                    self.take_in(heard);
                    self.tell(&facts);
                }
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

    /// A step lasts for as long as the PKI lets it wait. Whom to refuse is in force at once all the same; whatever else is
    /// heard meanwhile is returned.
    async fn step_and_listen(&mut self, wanted: &BTreeSet<SpiffeId>, heard: &mut mpsc::Receiver<Heard>) -> Vec<Heard> {
        let (denials, bundle) = (self.denials.clone(), self.state.credentials.bundle.clone());
        let (mut stepping, mut meanwhile) = (pin!(self.step(wanted)), Vec::new());
        loop {
            tokio::select! {
                () = &mut stepping => return meanwhile,
                Some(heard) = heard.recv(), if meanwhile.len() < MOST_MEANWHILE => {
                    // What a newer bundle has signed is taken over with that bundle, after the step.
                    if let Heard::Reply(reply) = &heard
                        && !reply.deny_set.is_empty()
                        && let Err(error) = lock(&denials).accept(&reply.deny_set, &bundle)
                    {
                        tracing::debug!(%error, "a deny set waits for the end of a renewal");
                    }
                    meanwhile.push(heard);
                }
            }
        }
    }

    fn take_in(&mut self, heard: Heard) {
        match heard {
            Heard::Reply(reply) => self.hear(*reply),
            Heard::Lost(error) => self.lost(&error),
        }
    }

    async fn step(&mut self, wanted: &BTreeSet<SpiffeId>) {
        if self.unsaved > 0 {
            self.write();
        }
        let now = self.now();
        let asked = due(&self.state.credentials, wanted, &self.told, now);
        if (asked.is_empty() && self.adrift.is_none()) || !self.retry.is_open(now) {
            return;
        }
        match self.renew(wanted).await {
            Ok(()) => self.retry = Retry::default(),
            Err(error) => self.failed(&error, &asked),
        }
    }

    async fn renew(&mut self, wanted: &BTreeSet<SpiffeId>) -> Result<(), RenewError> {
        let held = &self.state.credentials;
        if held.host.not_after <= self.now() || !is_rooted(&held.host, &held.bundle) {
            self.come_back(false).await?;
        } else if let Some(why) = self.adrift {
            self.come_back(why == Adrift::Unknown).await?;
        }
        match self.issue_due(wanted).await {
            // Roots were replaced, or our certificate is not good any more for a reason we cannot see.
            Err(RenewError::Distrusted(_)) => self.come_back(false).await?,
            Err(RenewError::Unknown(_)) => self.come_back(true).await?,
            other => return other,
        }
        self.issue_due(wanted).await
    }

    async fn issue_due(&mut self, wanted: &BTreeSet<SpiffeId>) -> Result<(), RenewError> {
        let mut asked = due(&self.state.credentials, wanted, &self.told, self.now());
        asked.truncate(MAX_BATCH);
        if asked.is_empty() {
            return Ok(());
        }
        self.issue(&asked).await?;
        // With clocks far apart a new certificate can look old on arrival; asking again at once would never end.
        let due = due(&self.state.credentials, wanted, &self.told, self.now());
        match due.iter().any(|id| asked.contains(id)) {
            true => Err(RenewError::Clock(self.metrics.clock_offset_ms() / 1000)),
            false => Ok(()),
        }
    }

    fn failed(&mut self, error: &RenewError, asked: &[SpiffeId]) {
        let now = self.now();
        let left = remaining(&self.state.credentials, asked, now);
        self.retry.failed(now, left, fastrand::f64());
        let again = self.retry.delay.as_secs();
        tracing::warn!(%error, identities = asked.len(), retry_in_s = again, "renewal failed; credentials in use stay");
        self.metrics.failed(&error.to_string());
    }

    fn sleep_time(&self, wanted: &BTreeSet<SpiffeId>) -> Duration {
        let now = self.now();
        let anything_due = !due(&self.state.credentials, wanted, &self.told, now).is_empty();
        let wake = next_wake(&self.state.credentials, wanted, &self.told, now);
        // A millisecond past the moment itself, so that it has come when we look.
        let wake = wake + Duration::from_millis(1);
        if anything_due { self.retry.wait(now).min(wake) } else { wake }
    }

    /// A host that was away catches up and proves who it is by the key it enrolled with.
    async fn come_back(&mut self, is_unknown: bool) -> Result<(), RenewError> {
        let (clock, now) = (&self.surroundings.clock, self.now());
        let next = Absent { state: &self.state, is_unknown, now, clock }.come_back().await?;
        self.adrift = None;
        if next.credentials.host.serial != self.state.credentials.host.serial {
            self.metrics.readmitted();
        }
        self.adopt(next);
        Ok(())
    }

    async fn issue(&mut self, asked: &[SpiffeId]) -> Result<(), RenewError> {
        let held = &self.state.credentials;
        let keys: Vec<NewKey> = asked.iter().map(|_| NewKey::generate()).collect::<Result<_, _>>()?;
        let mut items = Vec::new();
        for (id, key) in asked.iter().zip(&keys) {
            items.push(v1::IssueItem { spiffe_id: id.to_string(), csr: key.request()? });
        }
        let request = v1::IssueBatchRequest {
            items,
            host_time_unix_ms: unix_ms((self.surroundings.clock)()),
            bundle_sequence: held.bundle.sequence,
            inventory: Some(inventory(held)),
            federation_revision: held.federation.revision,
        };
        let caller = Caller { held, pki_time: self.state.pki_time, clock: &self.surroundings.clock };
        let patience = patience(remaining(held, asked, self.now()));
        let rpc = |mut pki: PkiClient| {
            let request = request.clone();
            async move { pki.issue_batch(request).await }
        };
        let reply = self.line.ask(&caller, patience, rpc).await.map_err(|failed| match failed {
            Failed::Unreachable(error) => error,
            Failed::Answered(status) => refused(&status),
            broken @ Failed::Broken { is_cut: true, .. } => RenewError::Unknown(broken.to_string()),
            broken @ Failed::Broken { .. } => RenewError::Unreachable(broken.to_string()),
        })?;
        self.install(reply, asked, &keys)
    }

    /// Takes over a whole reply or nothing of it.
    fn install(&mut self, reply: v1::IssueBatchReply, asked: &[SpiffeId], keys: &[NewKey]) -> Result<(), RenewError> {
        let now = self.now();
        let pki_time = from_unix_ms(reply.server_time_unix_ms);
        let mut next = self.state.clone();
        let held = &mut next.credentials;
        held.bundle = newer_bundle(reply.bundle, &held.bundle)?;
        if reply.results.len() != asked.len() {
            return Err(problem(format!("{} results for {} questions", reply.results.len(), asked.len())).into());
        }
        let mut waiting = self.told.waiting.clone();
        for ((id, key), result) in asked.iter().zip(keys).zip(reply.results) {
            waiting.remove(id);
            match result.outcome {
                Some(v1::issue_result::Outcome::Svid(svid)) => {
                    // With a certificate only: a refusal says nothing about who may use the one that is still good.
                    match result.selectors.is_empty() {
                        true => drop(held.selectors.remove(id)),
                        false => drop(held.selectors.insert(id.clone(), result.selectors)),
                    }
                    match result.hint.is_empty() {
                        true => drop(held.hints.remove(id)),
                        false => drop(held.hints.insert(id.clone(), result.hint)),
                    }
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
        self.metrics.federation.hear(&mut held.federation, reply.federation, &held.trust_domain, now);
        if !reply.pki_addresses.is_empty() {
            held.pki = reply.pki_addresses;
        }
        next.pki_time = pki_time;
        self.taint([reply.tainted_roots, reply.tainted_intermediates].concat(), now);
        self.told.waiting = waiting;
        self.adopt(next);
        self.metrics.succeeded(unix_ms((self.surroundings.clock)()), unix_ms(pki_time));
        Ok(())
    }

    /// The PKI answers a report, or tells what is new.
    fn hear(&mut self, reply: v1::SyncReply) {
        let (now, wall) = (self.now(), (self.surroundings.clock)());
        let pki_time = from_unix_ms(reply.server_time_unix_ms);
        self.metrics.heard(unix_ms(wall), unix_ms(pki_time));
        self.adrift = None;
        self.lend_denials = reply.want_deny_set;
        self.taint([reply.tainted_roots, reply.tainted_intermediates].concat(), now);
        let mut next = self.state.clone();
        next.pki_time = pki_time;
        let mut changed = false;
        if let Some(bundle) = reply.bundle {
            let held = &mut next.credentials;
            match read_bundle(Some(bundle), &held.trust_domain, held.bundle.sequence) {
                Ok(bundle) => {
                    changed |= bundle != held.bundle;
                    held.bundle = bundle;
                }
                Err(error) => tracing::error!(%error, "the PKI pushed a bundle that is not taken over"),
            }
        }
        let held = &mut next.credentials;
        changed |= self.metrics.federation.hear(&mut held.federation, reply.federation, &held.trust_domain, now);
        self.metrics.federation.refreshed(&reply.federation_freshness);
        if !reply.pki_addresses.is_empty() && reply.pki_addresses != next.credentials.pki {
            next.credentials.pki = reply.pki_addresses;
            changed = true;
        }
        match hear_recovery(&mut next, &reply.recovery, unix_ms(now)) {
            Ok(taken_over) => changed |= taken_over,
            Err(error) => tracing::warn!(%error, "a recovery statement is not taken over"),
        }
        if !reply.deny_set.is_empty()
            && let Err(error) = lock(&self.denials).accept(&reply.deny_set, &next.credentials.bundle)
        {
            tracing::error!(%error, "the PKI pushed a deny set that is not taken over");
        }
        match changed {
            true => self.adopt(next),
            false => self.state.pki_time = pki_time,
        }
        self.heed_denials();
    }

    fn heed_denials(&mut self) {
        let is_banned = lock(&self.denials).name(&self.state.credentials.host.id);
        let Some(next) = ban::heed(&self.state, is_banned) else { return };
        match is_banned {
            true => tracing::error!("{}", next.credentials.why_banned()),
            false => tracing::warn!("this host is no longer banned; asking for its identities again"),
        }
        self.told.waiting.clear();
        self.retry = Retry::default();
        self.adopt(next);
        // The generation before has the keys as well.
        self.save();
    }

    fn lost(&mut self, error: &RenewError) {
        self.metrics.lost();
        self.adrift = match error {
            RenewError::Distrusted(_) => Some(Adrift::Distrusts),
            RenewError::Unknown(_) => Some(Adrift::Unknown),
            _ => return,
        };
    }

    fn taint(&mut self, authorities: Vec<String>, now: SystemTime) {
        let since = |id: &String| self.told.tainted.get(id).copied().unwrap_or(now);
        self.told.tainted = authorities.into_iter().map(|id| (id.clone(), since(&id))).collect();
    }

    fn facts(&self) -> Facts {
        let denials = lock(&self.denials);
        Facts {
            credentials: self.publish.borrow().clone(),
            pki_time_ms: unix_ms(self.state.pki_time),
            deny_sequence: denials.sequence(),
            deny_set: if self.lend_denials { denials.jws().to_owned() } else { String::new() },
        }
    }

    /// Has the conversation report at once what is new here.
    fn tell(&self, facts: &watch::Sender<Facts>) {
        let new = self.facts();
        facts.send_if_modified(|known| {
            let same = Arc::ptr_eq(&known.credentials, &new.credentials)
                && (known.deny_sequence, &known.deny_set) == (new.deny_sequence, &new.deny_set);
            *known = new;
            !same
        });
    }

    /// Everything at once, on disk and for whoever uses it.
    fn adopt(&mut self, next: State) {
        self.state = next;
        self.timeline = Timeline::from(&self.surroundings);
        self.save();
        self.publish.send_replace(Arc::new(self.state.credentials.clone()));
    }

    fn now(&self) -> SystemTime {
        self.timeline.now(&self.surroundings)
    }

    /// A full disk must not stop renewal: the new credentials are used, and written as soon as that works.
    fn save(&mut self) {
        self.unsaved = GENERATIONS.min(self.unsaved + 1);
        self.write();
    }

    fn write(&mut self) {
        while self.unsaved > 0 {
            if let Err(error) = self.store.save(&self.state) {
                tracing::error!(%error, "new credentials are in use but not on disk");
                return self.metrics.store_failed();
            }
            self.unsaved -= 1;
        }
    }
}

/// Whole at all times, whoever panicked with it.
fn lock(denials: &Mutex<Denials>) -> MutexGuard<'_, Denials> {
    denials.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The conversation never ends by itself: whoever holds it has a defect, which is its starter's, too.
fn bequeath(ended: Result<(), JoinError>) {
    match ended {
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        _ => tracing::error!("the task that talks with the PKI has ended"),
    }
}

/// Takes over the newest statement of a recovery key, if it is new; whether it was. A bundle it leads to comes by
/// signatures when it is needed: who can talk to the PKI has it already.
fn hear_recovery(state: &mut State, jws: &str, now_ms: u64) -> Result<bool, RecoveryError> {
    let held = &state.credentials;
    if jws.is_empty() {
        return Ok(false);
    }
    let Some(statement) = state.recovery.read(jws, &held.trust_domain)? else { return Ok(false) };
    if leads_to(&statement, &held.bundle, now_ms).is_some() {
        return Ok(false);
    }
    state.recovery.hear(jws, &statement)?;
    Ok(true)
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
    use std::net::TcpListener;

    use super::*;
    use crate::deny::tests::{authority, set, sign};
    use crate::state::tests::sample;

    #[tokio::test]
    async fn a_deny_set_is_in_force_while_a_renewal_waits_for_a_server_that_stands_still() {
        let (dir, silent) = (tempfile::tempdir().unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let surroundings = Surroundings { machine_id_file: dir.path().join("none"), ..Surroundings::default() };
        let ((key, bundle), mut state) = (authority(), sample("web"));
        let held = &mut state.credentials;
        let roots = [held.bundle.roots.clone(), bundle.roots].concat();
        held.bundle = meshd_identity::Bundle::new(held.trust_domain.clone(), 2, 300, roots).unwrap();
        held.pki = vec![silent.local_addr().unwrap().to_string()];
        let wanted = BTreeSet::from([SpiffeId::workload(&held.trust_domain, "shop", "new").unwrap()]);
        Store::new(&dir.path().join("identity"), &surroundings.machine_id_file).save(&state).unwrap();
        let mut agent = Agent::open_in(&dir.path().join("identity"), surroundings).unwrap();

        let (say, mut heard) = mpsc::channel(HEARD_QUEUE);
        let reply = v1::SyncReply { deny_set: sign(&key, &set(7)), ..v1::SyncReply::default() };
        say.send(Heard::Reply(Box::new(reply))).await.ok().unwrap();
        let mut denied = agent.denied();
        tokio::select! {
            _ = agent.step_and_listen(&wanted, &mut heard) => panic!("the server answered"),
            known = denied.wait_for(|set| set.sequence == 7) => drop(known.unwrap()),
        }
    }

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
