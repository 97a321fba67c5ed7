//! A backend in memory, for as many hosts as a test has.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::{Answer, Found, Hold, Key, Over, Registrar, RegistrarError};
use crate::Registration;

pub const TTL: Duration = Duration::from_secs(10);

/// What all hosts see.
#[derive(Clone, Default)]
pub struct Store(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    entries: BTreeMap<Key, Entry>,
    revision: u64,
    is_down: bool,
}

#[derive(Clone)]
struct Entry {
    said: Registration,
    version: u64,
    lease: i64,
    ends: Instant,
}

/// How one host reaches it. A host that stands still gets no answer until it goes on.
pub struct Client {
    store: Store,
    address: IpAddr,
    still: watch::Sender<bool>,
}

impl Store {
    pub fn client(&self, address: &str) -> Arc<Client> {
        let address = address.parse().expect("a test writes an address");
        Arc::new(Client { store: self.clone(), address, still: watch::Sender::new(false) })
    }

    pub fn set_down(&self, is_down: bool) {
        self.with(|kept| kept.is_down = is_down);
    }

    /// As a cluster that was restarted empty.
    pub fn empty(&self) {
        self.with(|kept| kept.entries.clear());
    }

    pub fn get(&self, key: &Key) -> Option<Registration> {
        self.with(|kept| kept.alive(key).map(|entry| entry.said.clone()))
    }

    fn with<T>(&self, work: impl FnOnce(&mut Kept) -> T) -> T {
        work(&mut self.0.lock().expect("no test panics with it"))
    }
}

impl Kept {
    fn alive(&mut self, key: &Key) -> Option<&mut Entry> {
        let now = Instant::now();
        self.entries.retain(|_, entry| entry.ends > now);
        self.entries.get_mut(key)
    }

    /// None: it is another's, or gone.
    fn own(&mut self, key: &Key, hold: Hold) -> Option<&mut Entry> {
        self.alive(key).filter(|entry| entry.version == hold.version)
    }

    fn write(&mut self, key: &Key, said: &Registration, over: Over) -> Option<Hold> {
        self.revision += 1;
        let version = self.revision;
        match over {
            Over::Own(hold) => {
                let entry = self.own(key, hold)?;
                (entry.said, entry.version) = (said.clone(), version);
                Some(Hold { version, ..hold })
            }
            Over::Version(expected) => {
                let there = self.alive(key).map_or(0, |entry| entry.version);
                let lease = i64::try_from(version).unwrap_or(i64::MAX);
                let entry = Entry { said: said.clone(), version, lease, ends: Instant::now() + TTL };
                (there == expected).then(|| {
                    self.entries.insert(key.clone(), entry);
                    Hold { lease, version }
                })
            }
        }
    }
}

impl Client {
    pub fn stand_still(&self, still: bool) {
        self.still.send_replace(still);
    }

    fn ask<'a, T: 'a>(&'a self, act: impl FnOnce(&mut Kept) -> T + Send + 'a) -> Answer<'a, T> {
        Box::pin(async move {
            let mut still = self.still.subscribe();
            // The sender is ours.
            let _ = still.wait_for(|still| !still).await;
            self.store.with(|kept| match kept.is_down {
                true => Err(RegistrarError("scripted: down".to_owned())),
                false => Ok(act(kept)),
            })
        })
    }
}

impl Registrar for Client {
    fn name(&self) -> &str {
        "fake"
    }

    fn ttl(&self) -> Duration {
        TTL
    }

    fn address_here(&self) -> Answer<'_, IpAddr> {
        Box::pin(std::future::ready(Ok(self.address)))
    }

    fn find<'a>(&'a self, key: &'a Key) -> Answer<'a, Option<Found>> {
        self.ask(|kept| {
            let found =
                |entry: &mut Entry| Found::only(entry.said.epoch, entry.version, entry.said.address.to_string());
            kept.alive(key).map(found)
        })
    }

    fn write<'a>(&'a self, key: &'a Key, said: &'a Registration, over: Over) -> Answer<'a, Option<Hold>> {
        self.ask(move |kept| kept.write(key, said, over))
    }

    fn keep<'a>(&'a self, key: &'a Key, hold: Hold) -> Answer<'a, bool> {
        self.ask(move |kept| match kept.own(key, hold) {
            Some(entry) if entry.lease == hold.lease => {
                entry.ends = Instant::now() + TTL;
                true
            }
            _ => false,
        })
    }

    fn withdraw<'a>(&'a self, key: &'a Key, hold: Hold) -> Answer<'a, ()> {
        self.ask(move |kept| {
            if kept.own(key, hold).is_some() {
                kept.entries.remove(key);
            }
        })
    }
}
