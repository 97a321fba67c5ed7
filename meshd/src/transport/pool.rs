//! Connections to peers, shared by the streams of one worker. The key holds the source identity,
//! because a connection proves one: streams of two workloads never share it.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use h2::client::SendRequest;
use meshd_identity::denial::Marks;
use tokio::task::AbortHandle;

use super::denied::Denied;
use super::dial::{Dialer, Opened, PoolKey};
use super::generations::Generation;
use super::tls::TlsState;
use super::wire::STREAMS;
use crate::fault::Fault;

/// Connections without streams are kept this long (as ztunnel does).
const IDLE_MAX: Duration = Duration::from_secs(300);
/// A connection heard within this time is trusted with bytes before the peer has answered for the
/// stream: long against round trips, short against the time a dead peer goes unnoticed.
const LIVELY: Duration = Duration::from_secs(1);

/// One worker's connections.
#[derive(Default)]
pub struct Pool {
    links: RefCell<HashMap<PoolKey, Vec<Rc<Link>>>>,
    /// One dial at a time per key; what the last one failed with answers everybody who waited for it.
    gates: RefCell<HashMap<PoolKey, Rc<Gate>>>,
}

type Gate = tokio::sync::Mutex<Option<(Instant, Fault)>>;

/// One connection.
pub struct Link {
    send: SendRequest<Bytes>,
    streams: Cell<u32>,
    retired: Cell<bool>,
    /// The connection is over, not merely closed to new streams.
    ended: Cell<bool>,
    /// The peer said goodbye, and was done with every stream it had looked at.
    in_order: Cell<bool>,
    generation: Generation,
    expires: SystemTime,
    heard: Rc<Cell<Instant>>,
    used: Cell<Instant>,
    peer: Marks,
    driver: OnceCell<AbortHandle>,
    /// Why it was cut, if it was.
    cut: Cell<Option<Fault>>,
    /// Set when the peer let a stream time out: no new streams until it is heard again.
    suspected: Cell<Option<Instant>>,
}

/// The right to one stream on a connection; gives it back when dropped.
pub struct Slot(Rc<Link>);

impl Slot {
    fn take(link: &Rc<Link>) -> Slot {
        link.streams.set(link.streams.get() + 1);
        Slot(link.clone())
    }

    pub fn request(&self) -> SendRequest<Bytes> {
        self.0.send.clone()
    }

    /// Whether bytes may be sent before the peer has answered.
    pub fn lively(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.0.heard.get()) < LIVELY
    }

    /// The connection takes no more streams: the peer said so, or broke it.
    pub fn retire(&self) {
        self.0.retired.set(true);
    }

    pub fn ended(&self) -> bool {
        self.0.ended.get()
    }

    /// Whether it ended in the middle of what was going on.
    pub fn broke(&self) -> bool {
        self.0.ended.get() && !self.0.in_order.get()
    }

    /// Why the connection was cut: the peer is one no longer to be talked to.
    pub fn cut(&self) -> Option<Fault> {
        self.0.cut.get()
    }

    /// The peer let a stream time out.
    pub fn suspect(&self, now: Instant) {
        self.0.suspected.set(Some(now));
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.used.set(Instant::now());
    }
}

impl Link {
    fn usable(&self, tls: &TlsState) -> bool {
        !self.retired.get()
            && !self.is_old(tls)
            && self.streams.get() < STREAMS.min(self.send.current_max_send_streams() as u32)
            && self.suspected.get().is_none_or(|since| self.heard.get() > since)
            && self.expires > SystemTime::now()
    }

    /// Whether a handshake would show or believe something else now.
    fn is_old(&self, tls: &TlsState) -> bool {
        self.generation != tls.generation(self.peer.id.trust_domain())
    }

    /// Ends the connection with everything on it.
    fn cut(&self, why: Fault) {
        self.cut.set(Some(why));
        self.retired.set(true);
        self.ended.set(true);
        if let Some(driver) = self.driver.get() {
            driver.abort();
        }
    }

    /// Nothing will ever use it again.
    fn finished(&self, tls: &TlsState, now: Instant) -> bool {
        let stale = self.retired.get() || self.is_old(tls);
        let idle = now.saturating_duration_since(self.used.get()) >= IDLE_MAX;
        self.streams.get() == 0 && (stale || idle)
    }
}

impl Pool {
    /// A stream slot on a connection of `key`, dialling one if none has room.
    pub async fn checkout(&self, dialer: &Dialer, tls: &TlsState, key: &PoolKey) -> Result<Slot, Fault> {
        if let Some(slot) = self.usable(tls, key) {
            return Ok(slot);
        }
        let asked = Instant::now();
        let gate = self.gates.borrow_mut().entry(key.clone()).or_default().clone();
        let mut last_failure = gate.lock().await;
        if let Some(slot) = self.usable(tls, key) {
            return Ok(slot);
        }
        if let Some((at, fault)) = *last_failure
            && at > asked
        {
            return Err(fault);
        }
        match dialer.mesh(tls, key).await {
            // Denied between its handshake and now.
            Ok(opened) if tls.denied().denies(&opened.peer.marks) => Err(Fault::Banned),
            Ok(opened) => Ok(self.adopt(key, opened, tls)),
            Err(fault) => {
                *last_failure = Some((Instant::now(), fault));
                Err(fault)
            }
        }
    }

    fn usable(&self, tls: &TlsState, key: &PoolKey) -> Option<Slot> {
        let links = self.links.borrow();
        links.get(key)?.iter().find(|link| link.usable(tls)).map(Slot::take)
    }

    fn adopt(&self, key: &PoolKey, opened: Opened, tls: &TlsState) -> Slot {
        let now = Instant::now();
        let link = Rc::new(Link {
            send: opened.send,
            streams: Cell::new(0),
            retired: Cell::new(false),
            ended: Cell::new(false),
            in_order: Cell::new(false),
            generation: tls.generation(opened.peer.marks.id.trust_domain()),
            expires: opened.expires,
            heard: opened.io.heard(),
            used: Cell::new(now),
            suspected: Cell::new(None),
            peer: opened.peer.marks,
            driver: OnceCell::new(),
            cut: Cell::new(None),
        });
        let slot = Slot::take(&link);
        self.links.borrow_mut().entry(key.clone()).or_default().push(link.clone());
        let (address, io) = (key.address, opened.io.clone());
        let driven = Rc::downgrade(&link);
        let driver = tokio::task::spawn_local(async move {
            let watched = driven.clone();
            let busy = move || watched.upgrade().is_some_and(|link| link.streams.get() > 0);
            let ended = opened.driver.run(busy).await;
            if let Err(error) = &ended {
                tracing::debug!(%address, %error, "connection to peer ended");
            }
            if let Some(link) = driven.upgrade() {
                link.retired.set(true);
                link.ended.set(true);
                link.in_order.set(ended.is_ok() && io.ended_in_order());
            }
        });
        _ = link.driver.set(driver.abort_handle());
        slot
    }

    /// Lets go of connections nobody needs: dropping the last handle closes them.
    pub fn sweep(&self, tls: &TlsState, now: Instant) {
        self.links.borrow_mut().retain(|_, links| {
            links.retain(|link| !link.finished(tls, now));
            !links.is_empty()
        });
        let links = self.links.borrow();
        self.gates.borrow_mut().retain(|key, gate| links.contains_key(key) || Rc::strong_count(gate) > 1);
    }

    /// Ends connections to peers that are denied now; how many.
    pub fn cut_denied(&self, denied: &Denied) -> u64 {
        self.cut(Fault::Banned, |_, peer| denied.denies(peer))
    }

    /// Ends connections to peers of trust domains that are not federated any more; how many.
    pub fn cut_unfederated(&self, tls: &TlsState) -> u64 {
        self.cut(Fault::Unfederated, |key, peer| !tls.deals(&key.source, peer.id.trust_domain()))
    }

    fn cut(&self, why: Fault, is_over: impl Fn(&PoolKey, &Marks) -> bool) -> u64 {
        let mut cut = 0;
        for (key, links) in self.links.borrow().iter() {
            for link in links.iter().filter(|link| link.cut.get().is_none() && is_over(key, &link.peer)) {
                link.cut(why);
                cut += 1;
            }
        }
        cut
    }

    /// Open connections and their streams.
    pub fn size(&self) -> (usize, u32) {
        let links = self.links.borrow();
        let all = links.values().flatten();
        all.fold((0, 0), |(count, streams), link| (count + 1, streams + link.streams.get()))
    }
}
