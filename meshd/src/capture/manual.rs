//! What an operator does to the rules by hand, with or without a daemon: the state on disk is the truth that a
//! daemon follows, the kernel is changed here and now.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use super::backend::BackendKind;
use super::nft;
use super::plan::resolve;
use super::state::{Applied, CaptureState, Held};
use super::state_file::{Locked, StateFile};
use super::timer::{BootClock, Timer};
use super::tool::CaptureError;
use super::wanted::{Facts, Wanted};
use crate::unix_time::unix_now;

/// The table of a daemon that was killed goes when its holder has noticed.
const LETTING_GO: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// From now on nobody puts rules in force or heals them, until an operator applies or the daemon starts anew.
pub fn forbid(state_dir: &Path, why: &str) -> Result<(), CaptureError> {
    let mut locked = StateFile::new(state_dir).lock_at_any_price();
    locked.state.forbid(why);
    locked.save()
}

/// Removes what is ours from the kernel.
///
/// `bare` is what to look for where there is no record of what was applied.
pub fn revert(state_dir: &Path, why: &str, bare: &Wanted) -> Result<(), CaptureError> {
    let mut locked = StateFile::new(state_dir).lock_at_any_price();
    // Again: what was written without the lock may have been written over.
    locked.state.forbid(why);
    remove(&mut locked.state, bare)?;
    locked.save()
}

/// Whether a revert has left something: raw addresses are captured by a table that only a running daemon can remove.
pub fn raw_is_held() -> bool {
    let patience = Instant::now() + LETTING_GO;
    while nft::raw_is_held() {
        if Instant::now() >= patience {
            return true;
        }
        std::thread::park_timeout(LOOK_AGAIN);
    }
    false
}

/// All rules and routes; the record of them only once they are gone.
fn remove(state: &mut CaptureState, bare: &Wanted) -> Result<(), CaptureError> {
    if let Some(Applied { backend, wanted }) = &state.applied {
        backend.open().revert(wanted)?;
        state.applied = None;
        return Ok(());
    }
    // No record: whatever some backend may have left under this configuration, each of them tried.
    let mut failed = Ok(());
    for backend in BackendKind::ALL {
        match backend.open().revert(bare) {
            // Rules that a tool makes are not there where the tool is not.
            Ok(()) | Err(CaptureError::Missing { .. }) => {}
            Err(error) => failed = failed.and(Err(error)),
        }
    }
    failed
}

/// Makes the kernel equal to what the state says, if anything of ours is there at all.
fn settle(locked: &mut Locked) -> Result<(), CaptureError> {
    let (Some(applied), Some(intent)) = (locked.state.applied.clone(), &locked.state.intent) else { return Ok(()) };
    let Applied { backend, wanted } = &applied;
    match resolve(intent, &locked.state) {
        Some(target) if target == *wanted => Ok(()),
        Some(target) => {
            if !applied.is_replaced_by(*backend, &target) {
                backend.open().revert(wanted)?;
            }
            // Raw addresses are captured only while a daemon runs, and it does that itself.
            let ours = Wanted { raw_callers: BTreeSet::new(), ..target.clone() };
            backend.open().apply(&ours, &Facts::find(&ours, locked.port_memory()))?;
            locked.state.applied = Some(Applied { backend: *backend, wanted: target });
            Ok(())
        }
        None => remove(&mut locked.state, wanted),
    }
}

/// How a plan was confirmed.
#[derive(Debug, PartialEq, Eq)]
pub struct Confirmed {
    pub hash: String,
    /// A revert timer was running.
    pub disarmed: bool,
}

/// The plan in force locks nobody out: it stays.
pub fn confirm(state_dir: &Path) -> Result<Confirmed, CaptureError> {
    let mut locked = StateFile::new(state_dir).lock()?;
    let state = &mut locked.state;
    let plan = state.intent.clone().filter(|_| state.applied.is_some());
    let Some(plan) = plan else {
        return Err(CaptureError::NotConfirmable("no plan is in force; run `meshd intercept apply` first".into()));
    };
    let hash = plan.hash();
    if let Some(Held { why, .. }) = state.held_as(&hash) {
        return Err(CaptureError::NotConfirmable(format!(
            "plan {hash} is not in force any more ({why}); run `meshd intercept apply` again"
        )));
    }
    let disarmed = state.timer.is_some();
    state.confirm(plan);
    locked.save()?;
    Ok(Confirmed { hash, disarmed })
}

/// Whether a revert timer has still something to wait for.
pub enum Pending {
    /// The plan was confirmed or reverted.
    Settled,
    Wait(Duration),
    TimeIsUp,
}

/// What the timer's process looks at while it waits. A record that cannot be read is no confirmation.
pub fn pending(state_dir: &Path) -> Pending {
    match StateFile::new(state_dir).read().map(|state| state.timer) {
        Ok(None) => Pending::Settled,
        Ok(Some(timer)) => timer.left(&BootClock::now()).map_or(Pending::TimeIsUp, Pending::Wait),
        Err(_) => Pending::TimeIsUp,
    }
}

/// Time is up: back to the last confirmed plan, or to no rules at all, unless it was confirmed at the last moment.
///
/// `hash` is what was applied, for when there is no record of it.
pub fn expire(state_dir: &Path, hash: &str, bare: &Wanted) -> Result<(), CaptureError> {
    let file = StateFile::new(state_dir);
    let readable = file.read().is_ok();
    let mut locked = file.lock_at_any_price();
    if readable && !locked.state.give_up_unconfirmed(&BootClock::now()) {
        return Ok(());
    }
    if !readable {
        locked.state.hold(hash.to_owned(), unix_now());
    }
    let told = locked.save();
    // Whatever cannot be put back in force must not stay as it is either.
    if settle(&mut locked).is_err() || !readable {
        remove(&mut locked.state, bare)?;
    }
    told.and_then(|()| locked.save())
}

/// Gets meshd out of the way of everybody or of one unit, or back into it.
pub fn switch_bypass(state_dir: &Path, unit: Option<&str>, on: bool) -> Result<(), CaptureError> {
    let mut locked = StateFile::new(state_dir).lock()?;
    locked.state.bypass.switch(unit, on, unix_now());
    locked.save()
}

/// The timer before, for putting it back when applying fails.
pub struct Armed(Option<Timer>);

/// From now on `hash` is taken back after `after` unless confirmed. The process that does it is to be started next.
pub fn arm(state_dir: &Path, hash: &str, after: Duration) -> Result<Armed, CaptureError> {
    let mut locked = StateFile::new(state_dir).lock()?;
    let timer = Timer::armed(hash.to_owned(), after, &BootClock::now());
    let before = locked.state.timer.replace(timer);
    locked.save()?;
    Ok(Armed(before))
}

/// It was not applied after all.
pub fn disarm(state_dir: &Path, armed: Armed) -> Result<(), CaptureError> {
    let mut locked = StateFile::new(state_dir).lock()?;
    locked.state.timer = armed.0;
    locked.save()
}

/// For when no daemon is there to follow the state.
pub fn settle_without_daemon(state_dir: &Path) -> Result<(), CaptureError> {
    let mut locked = StateFile::new(state_dir).lock()?;
    settle(&mut locked)?;
    locked.save()
}
