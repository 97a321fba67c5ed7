//! The running PKI, independent of how requests reach it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use meshd_identity::TrustDomain;
use meshd_pki_api::v1;
use tokio::sync::watch;

use crate::attest::Nonces;
use crate::attestors::Attestors;
use crate::audit::{Allowance, Event};
use crate::clock::{ClockGuard, Distrust};
use crate::deny::{Floor, SignedDeny};
use crate::failpoint;
use crate::federation::share::Followed;
use crate::federation::web::WebCertificate;
use crate::handshakes::Handshakes;
use crate::health::clocks::HEARD_LATELY_S;
use crate::instances::Instances;
use crate::keeping::keeper::{Keeper, Moment, heal_state};
use crate::keys::Kek;
use crate::lifetimes::Lifetimes;
use crate::metrics::Metrics;
use crate::refused::Refused;
use crate::replicas;
use crate::rotation::step::Rotator;
use crate::signer::{Signer, SignerError};
use crate::start::{Standing, Start};
use crate::state_dir::{DirLock, StateDir, StateError, lock};
use crate::store::{Records, bundles, hosts, intermediates, settings, tainted, tokens, trust};
use crate::sync::{Current, Had};
use crate::times::{Clock, seconds, unix, unix_ms};
use crate::upstream::watch::{UpstreamFiles, look_ahead};

/// A start after a long time off takes a few steps in a row; a loop without an end would be a defect.
const MOST_STEPS: u32 = 16;

pub struct Options {
    pub lifetimes: Lifetimes,
    /// `HOST:PORT` hosts are told to use; empty leaves them with those of their token.
    pub advertise: Vec<String>,
    /// File that says by what else than tokens hosts come in.
    pub attestors: Option<PathBuf>,
    /// The intermediate from outside that others replace.
    pub upstream: Option<UpstreamFiles>,
    pub clock: Clock,
    /// Time since boot, sleep included: what the wall clock is compared with.
    pub boot_time: BootTime,
    /// The operator vouches for the clock, whatever the PKI has on record.
    pub clock_is_right: bool,
}

const UNCONFIRMED: &str = "the PKI was off for long, or its clock is wrong: hosts confirm it with their reports, or \
                           start meshd-pki with `--clock-is-right` if the clock is right now";

pub type BootTime = Arc<dyn Fn() -> Duration + Send + Sync>;

impl Default for Options {
    fn default() -> Options {
        Options {
            lifetimes: Lifetimes::default(),
            advertise: Vec::new(),
            attestors: None,
            upstream: None,
            clock: Arc::new(SystemTime::now),
            boot_time: Arc::new(boot_time),
            clock_is_right: false,
        }
    }
}

impl Options {
    /// Both clocks from one that tests turn.
    pub fn with_clock(lifetimes: Lifetimes, clock: Clock) -> Options {
        let wall = clock.clone();
        let boot_time = move || wall().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Options { lifetimes, clock, boot_time: Arc::new(boot_time), ..Options::default() }
    }
}

fn boot_time() -> Duration {
    // Fails only for clocks the kernel does not know; this one it has since 2.6.39.
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    time.map_or(Duration::ZERO, Duration::from)
}

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("{0}")]
    Lifetimes(String),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Signer(#[from] SignerError),
}

pub struct Pki {
    pub trust_domain: TrustDomain,
    pub metrics: Metrics,
    pub(crate) lifetimes: Lifetimes,
    pub(crate) advertise: Vec<String>,
    /// Of all replicas.
    addresses: RwLock<Arc<Vec<String>>>,
    clock: Clock,
    boot_time: BootTime,
    clock_guard: Mutex<ClockGuard>,
    start: Mutex<Start>,
    distrust: RwLock<Option<Distrust>>,
    instances: Mutex<Instances>,
    pub(crate) handshakes: Handshakes,
    pub(crate) nonces: Nonces,
    pub(crate) attestors: Attestors,
    deny: RwLock<Arc<SignedDeny>>,
    /// Wakes whoever waits for news.
    current: watch::Sender<Current>,
    /// The server is told to stop.
    stopping: watch::Sender<bool>,
    pub(crate) kek: Kek,
    pub(crate) state: StateDir,
    signer: RwLock<Arc<Signer>>,
    refusals: Mutex<Allowance>,
    pub(crate) keeper: Keeper,
    pub(crate) followed: Followed,
    /// Of the https_web endpoint, where this process serves one.
    web_certificate: RwLock<Option<Arc<WebCertificate>>>,
    /// When health was last looked at.
    pub(crate) health_seen: Mutex<Option<i64>>,
    _running: DirLock,
}

impl Pki {
    pub fn open(dir: &Path, options: Options) -> Result<Pki, PkiError> {
        options.lifetimes.check().map_err(PkiError::Lifetimes)?;
        let now = (options.clock)();
        let running = lock(dir)?;
        let healed = heal_state(dir, now)?;
        let state = StateDir::open_to_serve(dir)?;
        state.check()?;
        state.database.engine().join_replicas();
        if let Some(event) = healed {
            state.record(now, &[event])?;
        }
        let kek = state.kek()?;
        replicas::register(&state, &options.advertise, now)?;
        let lifetimes = &options.lifetimes;
        let domain = &state.trust_domain;
        let deny_floor = Floor::new(&state).get();
        let rotator = Rotator { domain, kek: &kek, lifetimes, clock_is_good: true, deny_floor, now };
        let keeper = Keeper::open(&state, &rotator)?;
        if let Some(files) = &options.upstream {
            look_ahead(&state, files, &options.lifetimes, now);
        }
        let start = begin(&state, &kek, &options, now)?;
        let signer =
            Signer::load(&state, &kek, &options.lifetimes, start.not_before_last(now))?.judging_by(&options.clock);
        let pki = Pki {
            trust_domain: state.trust_domain.clone(),
            metrics: Metrics::new(),
            lifetimes: options.lifetimes,
            advertise: options.advertise,
            addresses: RwLock::default(),
            clock: options.clock,
            boot_time: options.boot_time,
            clock_guard: Mutex::default(),
            start: Mutex::new(start),
            distrust: RwLock::default(),
            instances: Mutex::default(),
            handshakes: Handshakes::new(),
            nonces: Nonces::new(&kek.derived("attestation nonces")),
            attestors: Attestors::new(options.attestors),
            deny: RwLock::default(),
            current: watch::Sender::default(),
            stopping: watch::Sender::default(),
            kek,
            state,
            signer: RwLock::new(Arc::new(signer)),
            refusals: Mutex::new(Allowance::new(unix(now))),
            keeper,
            followed: Followed::default(),
            web_certificate: RwLock::default(),
            health_seen: Mutex::default(),
            _running: running,
        };
        pki.look_at_clocks()?;
        pki.refresh_deny()?;
        pki.refresh_replicas()?;
        pki.show_health().map_err(StateError::from)?;
        pki.read_attestors()?;
        pki.refresh()?;
        pki.keeper.keep(&pki.state, &pki.rotator(), &pki.metrics, pki.moment());
        Ok(pki)
    }

    /// Takes the step that is due, replaces what is due, forgets what is long over. Called every few seconds; does
    /// nothing most times.
    pub fn maintain(&self) -> Result<(), PkiError> {
        let now = self.now();
        self.look_at_clocks()?;
        rotate(&self.state, &self.kek, &self.lifetimes, self.is_sure_of_clock(), now)?;
        self.refresh()?;
        self.keeper.keep(&self.state, &self.rotator(), &self.metrics, self.moment());
        if self.is_sure_of_clock() {
            self.record_good_time(now)?;
            self.forget_ended(now)?;
        }
        Ok(self.look_after_health().map_err(StateError::from)?)
    }

    fn moment(&self) -> Moment {
        Moment { now: self.now(), boot: (self.boot_time)(), clock_is_right: self.is_sure_of_clock() }
    }

    fn record_good_time(&self, now: SystemTime) -> Result<(), PkiError> {
        let due = self.start().record(unix(now));
        if let Some(time) = due {
            let record = |records: &mut dyn Records| settings::set_last_good(records, time).map_err(StateError::from);
            self.state.database.lead(record)?;
        }
        Ok(())
    }

    /// What has ended by a wrong clock has not ended: only a good one may say so.
    fn forget_ended(&self, now: SystemTime) -> Result<(), PkiError> {
        self.prune_deny()?;
        // Tokens and intermediates stay on record as long as roots do.
        let before = unix(now) - seconds(self.lifetimes.hold);
        // Each is as large as a transaction of etcd may be.
        self.state.database.lead(|records| tokens::prune(records, before)).map_err(StateError::from)?;
        self.state.database.lead(|records| intermediates::prune(records, before)).map_err(StateError::from)?;
        self.state.database.lead(|records| tainted::prune(records, unix(now))).map_err(StateError::from)?;
        Ok(())
    }

    /// Takes over what was changed, by [`Pki::maintain`], the command line or another replica, and wakes whoever
    /// waits for it. Called every second.
    pub fn refresh(&self) -> Result<(), PkiError> {
        let now = self.start().not_before_last(self.now());
        let signer = self.signer();
        let (trust, stored, bridge) = self.state.database.read(|view| -> Result<_, StateError> {
            let trust = trust::trust(view)?;
            let bridge = trust.carried_to(&signer.under, view, &self.lifetimes)?.cloned();
            Ok((trust, intermediates::active(view, &self.state.replica)?, bridge))
        })?;
        // It is not the stored one any more when an operator has tainted it.
        let is_stored = stored.is_some_and(|stored| stored.id == signer.intermediate.id);
        let names = self.attestors.istio().map(|grants| grants.names.clone()).unwrap_or_default();
        if !is_stored || signer.names != names || !signer.is_fresh(&trust, bridge.as_ref(), now) {
            let signer = Signer::load(&self.state, &self.kek, &self.lifetimes, now)?;
            let signer = signer.named(names, &self.lifetimes, now)?.judging_by(&self.clock);
            *self.signer.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(signer);
            self.show_health().map_err(StateError::from)?;
        }
        self.refresh_deny()?;
        self.refresh_replicas()?;
        self.tell();
        Ok(())
    }

    pub(crate) fn rotator(&self) -> Rotator<'_> {
        Rotator {
            domain: &self.trust_domain,
            kek: &self.kek,
            lifetimes: &self.lifetimes,
            clock_is_good: self.is_sure_of_clock(),
            deny_floor: Floor::new(&self.state).get(),
            now: self.now(),
        }
    }

    fn tell(&self) {
        let signer = self.signer();
        let newest =
            Had { bundle: signer.bundle.sequence, deny: self.deny().sequence, federation: self.federation_revision() };
        let current = Current { newest, tainted: [&signer.tainted[..], &self.tainted_intermediates()].concat() };
        self.current.send_if_modified(|known| {
            let is_news = *known != current;
            *known = current;
            is_news
        });
    }

    /// Conversations would go on for as long as the hosts run, and what is done now and then for ever.
    pub(crate) fn begin_to_stop(&self) {
        self.stopping.send_replace(true);
    }

    pub(crate) fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    pub(crate) fn news(&self) -> watch::Receiver<Current> {
        self.current.subscribe()
    }

    fn look_at_clocks(&self) -> Result<(), PkiError> {
        // One right after the other: what lies between them looks like a jump.
        let (now, boot) = (self.now(), (self.boot_time)());
        let lately = unix(now) - HEARD_LATELY_S..=unix(now);
        let hosts = self.state.database.read(hosts::hosts).map_err(StateError::from)?;
        let offsets: Vec<i64> =
            hosts.iter().filter(|host| lately.contains(&host.last_seen)).map(|host| host.clock_offset_ms).collect();
        let was_sure = self.start().is_confirmed();
        let standing = self.start().judge(unix(now), boot, &hosts, &self.lifetimes);
        let mut guard = self.clock_guard.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(self.distrust(), Some(Distrust::Behind { .. })) {
            // The step that puts it right is no jump.
            guard.forget();
        }
        let jumped = guard.look(now, boot, &offsets, self.lifetimes.skew);
        drop(guard);
        let found = match standing {
            Standing::Behind { seconds } => Some(Distrust::Behind { seconds }),
            Standing::Unconfirmed | Standing::Confirmed => jumped,
        };
        if standing == Standing::Confirmed && !was_sure {
            tracing::info!("the clock is confirmed; rotation goes on");
        }
        let mut distrust = self.distrust.write().unwrap_or_else(PoisonError::into_inner);
        if *distrust != found {
            match &found {
                Some(why) => tracing::error!(%why, "nothing is issued or rotated until this is cleared up"),
                None => tracing::info!("the clock is believed again"),
            }
        }
        self.metrics.clock_distrusted.set(i64::from(found.is_some()));
        self.metrics.clock_unconfirmed.set(i64::from(standing != Standing::Confirmed));
        *distrust = found;
        Ok(())
    }

    /// Why the clock is not believed, if it is not.
    pub fn distrust(&self) -> Option<Distrust> {
        self.distrust.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Seconds pass between looks, and a certificate of a wrong time lasts for a day.
    fn jumped_just_now(&self) -> Option<Distrust> {
        let guard = self.clock_guard.lock().unwrap_or_else(PoisonError::into_inner);
        guard.jumped(self.now(), (self.boot_time)(), self.lifetimes.skew)
    }

    /// Hosts live on what they have: that is better than certificates of a wrong time.
    pub(crate) fn refuse_while_frozen(&self) -> Result<(), Refused> {
        match self.distrust().or_else(|| self.jumped_just_now()) {
            Some(why) => Err(Refused::Unavailable(format!("the PKI issues nothing now: {why}"))),
            None => Ok(()),
        }
    }

    fn start(&self) -> MutexGuard<'_, Start> {
        self.start.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why what cannot be undone is not done by this clock now, if it is not.
    pub(crate) fn clock_doubt(&self) -> Option<String> {
        let unconfirmed = || (!self.start().is_confirmed()).then(|| UNCONFIRMED.to_owned());
        self.distrust().map(|why| why.to_string()).or_else(unconfirmed)
    }

    /// Whether nobody has vouched for the clock since the start.
    pub(crate) fn is_clock_unconfirmed(&self) -> bool {
        !self.start().is_confirmed()
    }

    /// Whether what cannot be undone may be done by this clock.
    pub(crate) fn is_sure_of_clock(&self) -> bool {
        self.distrust().is_none() && self.start().is_confirmed()
    }

    pub(crate) fn instances(&self) -> MutexGuard<'_, Instances> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn deny(&self) -> Arc<SignedDeny> {
        self.deny.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_deny(&self, set: SignedDeny) {
        *self.deny.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(set);
    }

    /// What hosts are told to use.
    pub(crate) fn addresses(&self) -> Vec<String> {
        self.addresses.read().unwrap_or_else(PoisonError::into_inner).to_vec()
    }

    pub(crate) fn set_addresses(&self, addresses: Vec<String>) {
        *self.addresses.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(addresses);
    }

    /// The trust bundle with this digest, or the latest.
    pub fn bundle(&self, digest: &[u8]) -> Result<v1::TrustBundle, Refused> {
        let found = self.state.database.read(|view| match digest.len() {
            0 => {
                let sequence = trust::trust(view)?.sequence;
                Ok(bundles::bundle(view, sequence)?)
            }
            32 => Ok(bundles::by_digest(view, digest)?),
            length => Err(Refused::Invalid(format!("the bundle digest has {length} bytes; SHA-256 has 32"))),
        })?;
        let found = found.ok_or_else(|| {
            let domain = &self.trust_domain;
            let text = format!("the PKI of `{domain}` never had the bundle asked for; make a new join token from it");
            Refused::NotFound(text)
        })?;
        let trust_domain = self.trust_domain.to_string();
        Ok(v1::TrustBundle { trust_domain, sequence: found.sequence, jwks: found.jwks.into_bytes() })
    }

    pub fn set_web_certificate(&self, certificate: Arc<WebCertificate>) {
        *self.web_certificate.write().unwrap_or_else(PoisonError::into_inner) = Some(certificate);
    }

    pub(crate) fn web_certificate(&self) -> Option<Arc<WebCertificate>> {
        self.web_certificate.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn now(&self) -> SystemTime {
        (self.clock)()
    }

    pub(crate) fn now_ms(&self) -> u64 {
        unix_ms(self.now())
    }

    pub(crate) fn signer(&self) -> Arc<Signer> {
        self.signer.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes to the audit log; on failure to the ordinary log, with an alarm.
    pub(crate) fn record(&self, events: &[Event]) -> io::Result<()> {
        let written = self.state.audit.append(unix(self.now()), events);
        if let Err(error) = &written {
            self.metrics.audit_failures.inc();
            for event in events {
                let event = serde_json::to_string(event).unwrap_or_default();
                tracing::error!(%error, %event, "the audit log cannot be written");
            }
        }
        written
    }

    /// Writes that a call was refused as a whole, unless strangers have already written enough. The refusal stands
    /// either way, and the metrics count each.
    pub(crate) fn record_refusal(&self, event: Event) {
        let allowed = self.refusals.lock().unwrap_or_else(PoisonError::into_inner).take(unix(self.now()));
        if allowed {
            _ = self.record(&[event]);
        }
    }
}

/// The bundle that goes with what this signer signs.
pub(crate) fn trust_bundle(signer: &Signer) -> v1::TrustBundle {
    signer.wire.clone()
}

/// Judges the clock, and does what has to be before anything is signed: a PKI that was off for long may have no root
/// left that verifies.
fn begin(state: &StateDir, kek: &Kek, options: &Options, now: SystemTime) -> Result<Start, PkiError> {
    let (last_good, hosts) = state
        .database
        .read(|view| -> Result<_, StateError> { Ok((settings::last_good(view)?, hosts::hosts(view)?)) })?;
    let (boot, lifetimes) = ((options.boot_time)(), &options.lifetimes);
    let mut start = Start::new(last_good, boot, &hosts);
    if options.clock_is_right {
        start.confirm();
    }
    let standing = start.judge(unix(now), boot, &hosts, lifetimes);
    match standing {
        Standing::Behind { .. } => return Ok(start),
        Standing::Unconfirmed => tracing::warn!(
            "the PKI was off for long, or the clock is wrong: rotation waits until hosts confirm the clock, or for {} s",
            lifetimes.leaf.as_secs()
        ),
        Standing::Confirmed => rotate(state, kek, lifetimes, true, now)?,
    }
    if !is_to_provide(state) {
        return Ok(start);
    }
    let (domain, deny_floor) = (&state.trust_domain, Floor::new(state).get());
    let rotator = Rotator { domain, kek, lifetimes, clock_is_good: true, deny_floor, now };
    let done = state.database.transaction(|records| rotator.provide(records, start.is_latest()))?;
    if !done.is_empty() {
        state.record(now, &done)?;
    }
    Ok(start)
}

/// Whether this server sees to what all share, although nobody can lead yet: no other leads, and it can be written.
fn is_to_provide(state: &StateDir) -> bool {
    let engine = state.database.engine();
    engine.trouble().is_none() && engine.leader().is_none_or(|leader| leader == state.replica)
}

/// Takes every step that is due, one transaction each.
fn rotate(
    state: &StateDir,
    kek: &Kek,
    lifetimes: &Lifetimes,
    clock_is_good: bool,
    now: SystemTime,
) -> Result<(), PkiError> {
    if !state.database.engine().leads() {
        return Ok(());
    }
    let (domain, deny_floor) = (&state.trust_domain, Floor::new(state).get());
    let rotator = Rotator { domain, kek, lifetimes, clock_is_good, deny_floor, now };
    for _ in 0..MOST_STEPS {
        // Looked at without a lock first: most times nothing is due.
        let due = state.database.read(|view| rotator.is_due(view)).map_err(StateError::from)?;
        if !due {
            return Ok(());
        }
        let event = state.database.lead(|records| {
            let event = rotator.advance(records)?;
            failpoint::reach(event.as_ref().map_or("", |event| event.event), "uncommitted");
            Ok::<_, StateError>(event)
        })?;
        let Some(event) = event.flatten() else { return Ok(()) };
        let step = event.event;
        failpoint::reach(step, "committed");
        tracing::info!(step = event.event, authority = event.authority, detail = event.detail, "rotation");
        if let Err(error) = state.record(now, &[event]) {
            tracing::error!(%error, "a rotation step was taken but is not in the audit log");
        }
        failpoint::reach(step, "recorded");
    }
    Ok(())
}
