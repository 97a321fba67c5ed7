//! Takes the steps of one registration's life.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::life::{Aim, Life, Next, Phase, Step};
use super::{Key, Offer, Registrar, RegistrarError};
use crate::Health;

#[derive(Debug, Clone)]
pub(super) struct Wish {
    pub(super) offer: Offer,
    pub(super) aim: Aim,
}

/// How it goes, for whoever asks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) phase: Phase,
    /// What is there says what is wanted.
    pub(super) is_current: bool,
    pub(super) health: Health,
    pub(super) unwell: Option<String>,
    pub(super) epoch: u64,
    /// When the backend last said that it is there.
    pub(super) last_ok: Option<SystemTime>,
    pub(super) error: Option<String>,
}

/// Until it is withdrawn, or nobody wishes anything any more: then its lease ends by itself.
pub(super) async fn live(
    registrar: Arc<dyn Registrar>,
    key: Key,
    mut wishes: watch::Receiver<Wish>,
    shown: watch::Sender<Shown>,
) {
    let mut life = Life::new(registrar.ttl(), Instant::now());
    let told = Told { shown, source: registrar.name().to_owned(), key: key.clone() };
    loop {
        let wish = wishes.borrow_and_update().clone();
        match life.next(&wish.offer, wish.aim, Instant::now()) {
            Next::Over => return show(&told, &life, &wish, false),
            Next::Wait(until) => {
                show(&told, &life, &wish, false);
                tokio::select! {
                    () = sleep_until(until) => {}
                    changed = wishes.changed() => if changed.is_err() { return },
                }
            }
            Next::Do(step) => {
                let done = take(step, &*registrar, &key, &mut life, &wish).await;
                if let Err(error) = &done {
                    life.failed(error.to_string(), (Instant::now(), fastrand::f64()));
                }
                show(&told, &life, &wish, done.is_ok());
                if life.phase() == Phase::Gone {
                    return;
                }
            }
        }
    }
}

async fn take(
    step: Step,
    registrar: &dyn Registrar,
    key: &Key,
    life: &mut Life,
    Wish { offer, aim }: &Wish,
) -> Result<(), RegistrarError> {
    let began = Instant::now();
    match (step, life.hold()) {
        (Step::Write, hold) => {
            if offer.address.is_none() {
                life.found_address(registrar.address_here().await?);
            }
            let write = match hold {
                Some(_) => life.update(offer, *aim),
                None => {
                    let found = registrar.find(key).await?;
                    life.claim(offer, found.as_ref(), unix_ms(), (Instant::now(), fastrand::f64()))
                }
            };
            let Some((said, over)) = write else { return Ok(()) };
            match registrar.write(key, &said, over).await? {
                Some(hold) => life.written(said, hold, *aim, (began, fastrand::f64())),
                None => life.lost((Instant::now(), fastrand::f64())),
            }
        }
        (Step::Keep, Some(hold)) => {
            if registrar.keep(key, hold).await? {
                life.kept((began, fastrand::f64()));
            } else {
                life.lost((Instant::now(), fastrand::f64()));
            }
            // The host may have another one by now.
            if offer.address.is_none()
                && let Ok(address) = registrar.address_here().await
            {
                life.found_address(address);
            }
        }
        (Step::Withdraw, Some(hold)) => {
            registrar.withdraw(key, hold).await?;
            life.withdrawn();
        }
        (Step::Keep | Step::Withdraw, None) => {}
    }
    Ok(())
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

struct Told {
    shown: watch::Sender<Shown>,
    source: String,
    key: Key,
}

fn show(told: &Told, life: &Life, wish: &Wish, heard: bool) {
    let last_ok = (heard && life.hold().is_some()).then(SystemTime::now);
    told.shown.send_if_modified(|before| {
        let now = Shown {
            phase: life.phase(),
            is_current: life.says(&wish.offer, wish.aim),
            health: wish.offer.health,
            unwell: wish.offer.unwell.clone(),
            epoch: life.epoch(),
            last_ok: last_ok.or(before.last_ok),
            error: life.error().map(str::to_owned),
        };
        let is_other = now != *before;
        told.log_difference(before, &now);
        *before = now;
        is_other
    });
}

impl Told {
    fn log_difference(&self, before: &Shown, now: &Shown) {
        let Told { source, key, .. } = self;
        if before.phase != now.phase {
            tracing::info!(source, %key, phase = ?now.phase, health = ?now.health, "registration");
        }
        match &now.error {
            Some(error) if before.error.as_ref() != Some(error) => {
                tracing::warn!(source, %key, error, "registration is in trouble; traffic goes on");
            }
            _ => {}
        }
    }
}
