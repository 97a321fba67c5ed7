//! One connection's calls: who makes them, what they may have now, and when that changes.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use meshd_identity::SpiffeId;
use meshd_pki_client::{Credentials, Svid};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::Sources;
use super::attest::{Caller, Unattested};
use super::limits::{Admission, Complaints, StreamSlot};
use super::refused::Refused;
use super::x509;

/// After an answer that could not be had yet: that passes without any change being told.
pub(super) const ASK_AGAIN: Duration = Duration::from_secs(5);

/// Answers on their way to one stream: the next is made when the last was taken.
pub(super) type Answers<T> = ReceiverStream<Result<T, Status>>;

pub(super) struct Session {
    pub(super) sources: Arc<Sources>,
    pub(super) caller: Caller,
    pub(super) admission: Arc<Admission>,
    pub(super) complaints: Arc<Complaints>,
}

/// What an attested caller may have at one moment.
pub(super) struct Holding {
    pub(super) svid: Arc<Svid>,
    pub(super) credentials: Arc<Credentials>,
}

impl Session {
    /// Asks kernel, enrolment and credentials anew.
    pub(super) fn holding(&self) -> Result<Holding, Refused> {
        let identity = self.identity()?;
        let credentials = self.sources.credentials.borrow().clone();
        let svid = x509::svid(&credentials, &identity, SystemTime::now()).inspect_err(|refused| {
            if let (Refused::NoIdentity, Some(words)) = (refused, credentials.refused.get(&identity)) {
                self.refused_by_pki(&identity, words);
            }
        });
        Ok(Holding { svid: svid?.clone(), credentials })
    }

    /// The identity the caller is enrolled as, with a certificate or not.
    pub(super) fn identity(&self) -> Result<SpiffeId, Refused> {
        let shared = &self.sources.shared;
        let found = self.caller.workload(&shared.enrolment.load(), &shared.ports, Instant::now());
        found.map(|workload| workload.identity.clone()).map_err(|why| {
            self.explain(&why);
            match why {
                Unattested::Unread => {
                    Refused::NotYet("the caller's program could not be looked at yet; ask again".to_owned())
                }
                _ => Refused::NoIdentity,
            }
        })
    }

    /// Looks at the caller's program, where its identity depends on that. Before every answer: what is read of its content
    /// is remembered.
    pub(super) async fn look(&self) {
        let shared = &self.sources.shared;
        self.caller.look(&shared.enrolment, &shared.ports).await;
    }

    pub(super) fn stream(&self) -> Result<StreamSlot, Refused> {
        self.admission.stream().ok_or(Refused::Busy)
    }

    /// What tells that an answer may have become another one.
    pub(super) fn changes(&self) -> Changes {
        let mut changes =
            Changes { credentials: self.sources.credentials.clone(), enrolled: self.sources.enrolled.clone() };
        changes.credentials.mark_unchanged();
        changes.enrolled.mark_unchanged();
        changes
    }

    /// An answer now, and another one whenever it comes out differently, for as long as the caller may have one.
    pub(super) async fn answers<T, F>(self: &Arc<Session>, answer: F) -> Result<Answers<T>, Refused>
    where
        T: Clone + PartialEq + Send + 'static,
        F: Fn(&Session) -> Result<T, Refused> + Send + 'static,
    {
        let slot = self.stream()?;
        // Before the first answer: what changes meanwhile is not missed.
        let changes = self.changes();
        self.look().await;
        let first = answer(self)?;
        let (out, answers) = mpsc::channel(1);
        tokio::spawn(follow(self.clone(), changes, first, answer, out, slot));
        Ok(ReceiverStream::new(answers))
    }

    pub(super) fn refused_by_pki(&self, identity: &SpiffeId, words: &str) {
        self.complain(identity.as_str(), || {
            tracing::warn!(%identity, "the PKI refuses an identity asked for at the Workload API: {words}");
        });
    }

    fn complain(&self, about: &str, complain: impl FnOnce()) {
        if self.complaints.is_due(about, Instant::now()) {
            complain();
        }
    }

    fn explain(&self, why: &Unattested) {
        match why {
            Unattested::Unenrolled(facts) => {
                let selector = facts.selector();
                self.complain(&selector, || {
                    tracing::warn!(
                        "an unenrolled caller asked for an identity at the Workload API; to enrol it: meshd enrol \
                         {selector} --as ns/<namespace>/sa/<name>"
                    );
                });
            }
            Unattested::Changed => self.complain("changed", || {
                tracing::warn!(
                    "a caller of the Workload API is another user or program now than when it connected; refused"
                );
            }),
            Unattested::Unmet(owner, unmet) => {
                let selector = owner.selector();
                self.complain(&format!("{selector} {unmet}"), || {
                    tracing::warn!(
                        caller = selector,
                        "a caller of the Workload API is not {unmet}, which the PKI's entry for its identity asks for"
                    );
                });
            }
            // Nobody is left to be told, or not for long.
            Unattested::Gone | Unattested::Unread => {}
        }
    }
}

async fn follow<T: Clone + PartialEq>(
    session: Arc<Session>,
    mut changes: Changes,
    first: T,
    answer: impl Fn(&Session) -> Result<T, Refused>,
    out: mpsc::Sender<Result<T, Status>>,
    _slot: StreamSlot,
) {
    let mut last = first.clone();
    let mut is_owed = false;
    if out.send(Ok(first)).await.is_err() {
        return;
    }
    loop {
        tokio::select! {
            () = changes.next() => {}
            () = sleep(ASK_AGAIN), if is_owed => {}
            () = out.closed() => return,
        }
        session.look().await;
        is_owed = false;
        let next = match answer(&session) {
            Ok(next) if next == last => continue,
            Ok(next) => next,
            // What it has is still the best there is.
            Err(refused) if refused.may_pass() => {
                is_owed = true;
                continue;
            }
            Err(refused) => {
                // If it fails, nobody is there to be refused.
                let _ = out.send(Err(refused.into())).await;
                return;
            }
        };
        last.clone_from(&next);
        if out.send(Ok(next)).await.is_err() {
            return;
        }
    }
}

pub(super) struct Changes {
    credentials: watch::Receiver<Arc<Credentials>>,
    enrolled: watch::Receiver<std::collections::BTreeSet<SpiffeId>>,
}

impl Changes {
    /// For ever, if nothing will change any more.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            Ok(()) = self.credentials.changed() => {}
            Ok(()) = self.enrolled.changed() => {}
            else => std::future::pending().await,
        }
    }
}
