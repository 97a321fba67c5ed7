//! All registrations of this host, in every backend it registers in.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::life::{Aim, Phase};
use super::live::{Shown, Wish, live};
use super::{Key, Offer, Registrar};
use crate::Health;
use crate::unix_time::unix_seconds;

/// A commit takes milliseconds. A backend that does not answer must not keep a host from ending: the lease does it then.
const TELL_DEADLINE: Duration = Duration::from_secs(2);

/// One registration, for `meshd status` and `meshd check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistrationHealth {
    pub source: String,
    pub service: String,
    pub instance: String,
    pub phase: Phase,
    /// Of the program, as registered or about to be.
    pub health: Health,
    /// Why it is not healthy.
    #[serde(default)]
    pub unwell: Option<String>,
    pub epoch: u64,
    /// When the backend last said that it has it (Unix seconds).
    pub last_ok: Option<u64>,
    pub error: Option<String>,
}

pub struct Registrations {
    registrars: Vec<Arc<dyn Registrar>>,
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    lives: BTreeMap<(usize, Key), One>,
    /// Nothing is registered from then on.
    ends: bool,
}

struct One {
    wishes: watch::Sender<Wish>,
    shown: watch::Receiver<Shown>,
    task: AbortHandle,
}

impl Registrations {
    pub fn new(registrars: Vec<Arc<dyn Registrar>>) -> Registrations {
        Registrations { registrars, running: Mutex::default() }
    }

    /// Whether there is a backend to register in.
    pub fn is_wanted(&self) -> bool {
        !self.registrars.is_empty()
    }

    /// Registers these, and takes away what is not among them. Cheap when nothing changed; within a runtime.
    pub fn offer(&self, offers: &[Offer]) {
        let mut running = self.lock();
        if running.ends {
            return;
        }
        running.lives.retain(|_, one| !one.task.is_finished());
        for ((_, key), one) in &running.lives {
            if !offers.iter().any(|offer| offer.key == *key) {
                one.aim_at(Aim::Withdraw);
            }
        }
        for (index, registrar) in self.registrars.iter().enumerate() {
            for offer in offers {
                match running.lives.get(&(index, offer.key.clone())) {
                    Some(one) => one.say(offer),
                    None => {
                        running.lives.insert((index, offer.key.clone()), One::begin(registrar.clone(), offer.clone()));
                    }
                }
            }
        }
    }

    /// Has callers go elsewhere, before connections are ended: true once any backend has been told so.
    pub async fn drain(&self) -> bool {
        self.all_aim_at(Aim::Drain).await
    }

    /// Takes everything away.
    pub async fn withdraw(&self) {
        self.all_aim_at(Aim::Withdraw).await;
    }

    async fn all_aim_at(&self, aim: Aim) -> bool {
        let shown: Vec<watch::Receiver<Shown>> = {
            let mut running = self.lock();
            running.ends = true;
            running.lives.values().map(|one| one.aim_at(aim)).collect()
        };
        let done = |shown: &Shown| shown.phase == Phase::Gone || (aim == Aim::Drain && shown.drains());
        let mut told = false;
        let all = async {
            for mut one in shown {
                told |= one.wait_for(done).await.is_ok_and(|shown| shown.drains());
            }
        };
        if timeout(TELL_DEADLINE, all).await.is_err() {
            tracing::warn!(
                "a backend has not confirmed in time that this host leaves; its registrations end by their leases"
            );
        }
        told
    }

    pub fn rows(&self) -> Vec<RegistrationHealth> {
        let row = |((index, key), one): (&(usize, Key), &One)| {
            let shown = one.shown.borrow().clone();
            RegistrationHealth {
                source: self.registrars[*index].name().to_owned(),
                service: key.service.to_string(),
                instance: key.instance.clone(),
                phase: shown.phase,
                health: shown.health,
                unwell: shown.unwell,
                epoch: shown.epoch,
                last_ok: shown.last_ok.and_then(unix_seconds),
                error: shown.error,
            }
        };
        self.lock().lives.iter().map(row).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shown {
    fn drains(&self) -> bool {
        self.phase == Phase::Draining && self.is_current
    }
}

impl One {
    fn begin(registrar: Arc<dyn Registrar>, offer: Offer) -> One {
        let key = offer.key.clone();
        let (wishes, wished) = watch::channel(Wish { offer, aim: Aim::Serve });
        let (show, shown) = watch::channel(Shown::default());
        let task = tokio::spawn(live(registrar, key, wished, show)).abort_handle();
        One { wishes, shown, task }
    }

    /// Of one that is being taken away, it is said once it is gone.
    fn say(&self, offer: &Offer) {
        self.wishes.send_if_modified(|wish| {
            let is_other = wish.aim == Aim::Serve && wish.offer != *offer;
            if is_other {
                wish.offer = offer.clone();
            }
            is_other
        });
    }

    fn aim_at(&self, aim: Aim) -> watch::Receiver<Shown> {
        self.wishes.send_if_modified(|wish| {
            let is_other = wish.aim < aim;
            wish.aim = wish.aim.max(aim);
            is_other
        });
        self.shown.clone()
    }
}

#[cfg(test)]
#[path = "all_tests.rs"]
mod tests;
