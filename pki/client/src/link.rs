//! The conversation with the PKI, open for as long as the host runs: it reports, and hears at once what changes. What a
//! lost push loses is in the answer to the next report.

use std::sync::Arc;
use std::time::Duration;

use meshd_pki_api::v1;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::error::RenewError;
use crate::inventory::inventory;
use crate::line::{Caller, Line, Open};
use crate::schedule::retry_delay;
use crate::state::{from_unix_ms, unix_ms};
use crate::surroundings::Surroundings;
use crate::{Credentials, refusal_text};

/// A report that is not answered within this time means that the stream is dead.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// Opening needs no turn at the PKI.
const OPENED_WITHIN: Duration = Duration::from_secs(5);
/// A PKI that stops ends all conversations at once; hosts come back one after the other.
const COME_BACK_WITHIN: Duration = Duration::from_secs(3);
const UNSENT_REPORTS: usize = 4;

/// What there is to report.
#[derive(Clone)]
pub(crate) struct Facts {
    pub(crate) credentials: Arc<Credentials>,
    pub(crate) pki_time_ms: u64,
    pub(crate) deny_sequence: u64,
    /// The deny set itself, when the PKI wants it.
    pub(crate) deny_set: String,
}

pub(crate) enum Heard {
    Reply(Box<v1::SyncReply>),
    /// There is no conversation now; another is tried by itself.
    Lost(RenewError),
}

pub(crate) struct Link {
    pub(crate) surroundings: Surroundings,
    pub(crate) line: Line,
    pub(crate) facts: watch::Receiver<Facts>,
    pub(crate) heard: mpsc::Sender<Heard>,
    /// Drawn when the process started: two that alternate under one key are a cloned host.
    instance: String,
    /// Conversations in a row that the server ended before its first answer.
    cut: u32,
}

/// Why a conversation ended.
enum End {
    /// It goes on with a new certificate.
    Renewed,
    /// The agent is gone.
    Over,
    Lost(RenewError),
}

impl Link {
    pub(crate) fn new(
        surroundings: Surroundings,
        line: Line,
        facts: watch::Receiver<Facts>,
        heard: mpsc::Sender<Heard>,
    ) -> Link {
        Link { surroundings, line, facts, heard, instance: format!("{:032x}", fastrand::u128(..)), cut: 0 }
    }

    pub(crate) async fn hold(mut self) {
        let mut delay = Duration::ZERO;
        loop {
            let serial = self.facts.borrow_and_update().credentials.host.serial.clone();
            let mut answered = false;
            match self.converse(&mut answered).await {
                End::Over => return,
                End::Renewed => continue,
                End::Lost(error) => {
                    tracing::debug!(%error, "no conversation with the PKI");
                    if self.heard.send(Heard::Lost(error)).await.is_err() {
                        return;
                    }
                }
            }
            delay = match answered {
                true => COME_BACK_WITHIN.mul_f64(fastrand::f64()),
                false => retry_delay(delay, None, fastrand::f64()),
            };
            // A new certificate may be what was missing.
            let renewed = self.facts.wait_for(|facts| facts.credentials.host.serial != serial);
            tokio::select! {
                () = sleep(delay) => {}
                facts = renewed => if facts.is_err() { return },
            }
        }
    }

    async fn converse(&mut self, answered: &mut bool) -> End {
        let facts = self.facts.borrow().clone();
        let (open, mut replies, reports) = match self.open(&facts).await {
            Ok(opened) => opened,
            Err(error) => return End::Lost(error),
        };
        let end = self.report_and_hear(&facts, &mut replies, &reports, answered).await;
        if let End::Lost(_) = end {
            self.line.leave(&open).await;
        }
        end
    }

    async fn report_and_hear(
        &mut self,
        facts: &Facts,
        replies: &mut tonic::Streaming<v1::SyncReply>,
        reports: &mpsc::Sender<v1::SyncRequest>,
        answered: &mut bool,
    ) -> End {
        let mut ticks = interval(self.surroundings.report_every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Not before the first report, which the first tick is.
        let mut unanswered: Option<Instant> = None;
        loop {
            let patience = ANSWER_WITHIN.min(self.surroundings.report_every);
            let deadline = unanswered.map_or_else(Instant::now, |since| since + patience);
            tokio::select! {
                reply = replies.message() => match reply {
                    Ok(Some(reply)) => {
                        (*answered, self.cut, unanswered) = (true, 0, None);
                        if self.heard.send(Heard::Reply(Box::new(reply))).await.is_err() {
                            return End::Over;
                        }
                        continue;
                    }
                    Ok(None) => return End::Lost(RenewError::Unreachable("the PKI ended the conversation".to_owned())),
                    Err(status) => return End::Lost(self.why(&status, *answered)),
                },
                _ = ticks.tick() => {}
                changed = self.facts.changed() => {
                    if changed.is_err() {
                        return End::Over;
                    }
                    if self.facts.borrow().credentials.host.serial != facts.credentials.host.serial {
                        return End::Renewed;
                    }
                }
                () = sleep_until(deadline), if unanswered.is_some() => {
                    return End::Lost(RenewError::Unreachable("the PKI does not answer reports any more".to_owned()));
                }
            }
            let report = self.report();
            unanswered = unanswered.or(Some(Instant::now()));
            // A connection that takes no reports is found out by the deadline above.
            if reports.try_send(report).is_err() && reports.is_closed() {
                return End::Lost(RenewError::Unreachable("the conversation with the PKI broke".to_owned()));
            }
        }
    }

    async fn open(&self, facts: &Facts) -> Result<Opened, RenewError> {
        let (held, pki_time) = (&facts.credentials, from_unix_ms(facts.pki_time_ms));
        let caller = Caller { held, pki_time, clock: &self.surroundings.clock };
        let open = self.line.open(&caller).await?;
        match begin(&open).await {
            Err(error) if open.is_old => {
                tracing::debug!(%error, "the connection that was there carries no conversation");
                self.line.leave(&open).await;
                let open = self.line.open(&caller).await?;
                begin(&open).await
            }
            opened => opened,
        }
    }

    fn report(&mut self) -> v1::SyncRequest {
        let facts = self.facts.borrow_and_update().clone();
        v1::SyncRequest {
            instance: self.instance.clone(),
            host_time_unix_ms: unix_ms((self.surroundings.clock)()),
            bundle_sequence: facts.credentials.bundle.sequence,
            deny_sequence: facts.deny_sequence,
            inventory: Some(inventory(&facts.credentials)),
            deny_set: facts.deny_set,
            federation_revision: facts.credentials.federation.revision,
        }
    }

    /// A server that does not accept our certificate cuts the connection in TLS 1.3 after we believe it made. Once, it
    /// may have been a restart; again and again it is our certificate.
    fn why(&mut self, status: &tonic::Status, answered: bool) -> RenewError {
        let text = refusal_text(status);
        match status.code() {
            Code::Unauthenticated => RenewError::Unknown(text),
            Code::Unknown if !answered => {
                self.cut += 1;
                if self.cut > 1 { RenewError::Unknown(text) } else { RenewError::Unreachable(text) }
            }
            Code::Unknown | Code::Unavailable | Code::Internal => RenewError::Unreachable(text),
            _ => RenewError::Refused(text),
        }
    }
}

type Opened = (Open, tonic::Streaming<v1::SyncReply>, mpsc::Sender<v1::SyncRequest>);

async fn begin(open: &Open) -> Result<Opened, RenewError> {
    let (reports, outgoing) = mpsc::channel(UNSENT_REPORTS);
    let mut pki = open.connection.pki();
    // One that was there already may have broken, and is left.
    let patience = if open.is_old { OPENED_WITHIN } else { ANSWER_WITHIN };
    let opening = timeout(patience, pki.sync(ReceiverStream::new(outgoing))).await;
    let opened = opening.map_err(|_| RenewError::Unreachable("the PKI opens no conversation".to_owned()))?;
    let replies = opened.map_err(|status| RenewError::Unreachable(refusal_text(&status)))?.into_inner();
    Ok((open.clone(), replies, reports))
}
