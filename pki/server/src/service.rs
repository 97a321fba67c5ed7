//! gRPC: from wire to [`Pki`] and back. Each call runs on a blocking thread: it signs and syncs.

use std::net::SocketAddr;
use std::sync::Arc;

use meshd_identity::denial::Marks;
use meshd_identity::{Bundle, inspect_svid};
use meshd_pki_api::v1;
use meshd_pki_api::v1::host_server::Host;
use rustls::pki_types::CertificateDer;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{Sender, channel};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, Streaming};

use crate::pki::Pki;
use crate::refused::Refused;
use crate::sync::Had;

/// Who is at the other end of a connection; put into every request by the listener.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// The leaf, when the peer presented one and TLS verified it.
    pub(crate) certificate: Option<CertificateDer<'static>>,
    /// What its whole chain can be denied by.
    pub(crate) marks: Option<Marks>,
    pub(crate) address: SocketAddr,
}

impl Peer {
    /// `chain` was verified with the roots of `bundle`.
    pub(crate) fn of(chain: &[CertificateDer<'static>], bundle: &Bundle, address: SocketAddr) -> Peer {
        let all: Vec<&[u8]> = chain.iter().map(AsRef::as_ref).collect();
        let marks = Marks::read(&all, bundle.roots.iter().map(Vec::as_slice));
        Peer { certificate: chain.first().cloned(), marks, address }
    }
}

/// Calls worked on at once: those that wait for the disk together share one sync of it. Each has a thread.
pub(crate) const AT_ONCE: usize = 16;
/// A host that does not read is told nothing more; what it missed is in the answer to its next report.
const UNREAD_REPLIES: usize = 4;

pub(crate) struct HostService {
    pki: Arc<Pki>,
    permits: Arc<Semaphore>,
}

#[tonic::async_trait]
impl Host for HostService {
    async fn bundle(&self, request: Request<v1::BundleRequest>) -> Result<Response<v1::BundleReply>, Status> {
        let digest = request.into_inner().sha256;
        self.answer("bundle", move |pki| {
            let bundle = pki.bundle(&digest)?;
            Ok(v1::BundleReply { bundle: Some(bundle) })
        })
        .await
    }

    async fn enroll(&self, request: Request<v1::EnrollRequest>) -> Result<Response<v1::EnrollReply>, Status> {
        let peer = peer(&request)?;
        let message = request.into_inner();
        self.answer("enroll", move |pki| pki.enrol(&message, &peer.address.to_string())).await
    }

    async fn issue_batch(
        &self,
        request: Request<v1::IssueBatchRequest>,
    ) -> Result<Response<v1::IssueBatchReply>, Status> {
        let peer = peer(&request)?;
        let message = request.into_inner();
        self.answer("issue_batch", move |pki| {
            pki.refuse_denied(&peer)?;
            pki.issue_batch(peer.certificate.as_deref(), &message, &peer.address.to_string())
        })
        .await
    }

    async fn transitions(
        &self,
        request: Request<v1::TransitionsRequest>,
    ) -> Result<Response<v1::TransitionsReply>, Status> {
        let message = request.into_inner();
        self.answer("transitions", move |pki| pki.transitions(&message)).await
    }

    async fn challenge(&self, request: Request<v1::ChallengeRequest>) -> Result<Response<v1::ChallengeReply>, Status> {
        let message = request.into_inner();
        self.answer("challenge", move |pki| pki.challenge(&message)).await
    }

    async fn attest(&self, request: Request<v1::AttestRequest>) -> Result<Response<v1::EnrollReply>, Status> {
        let peer = peer(&request)?;
        let message = request.into_inner();
        self.answer("attest", move |pki| pki.attest(&message, &peer.address.to_string())).await
    }

    async fn sync(
        &self,
        request: Request<Streaming<v1::SyncRequest>>,
    ) -> Result<Response<BoxStream<v1::SyncReply>>, Status> {
        let peer = peer(&request)?;
        let (replies, stream) = channel(UNREAD_REPLIES);
        let (pki, permits) = (self.pki.clone(), self.permits.clone());
        // Ends with the connection: then nobody reads the replies, and no report comes.
        tokio::spawn(Conversation { pki, permits, peer, reports: request.into_inner(), replies }.hold());
        Ok(Response::new(Box::pin(ReceiverStream::new(stream).map(|reply| *reply))))
    }

    async fn issue_jwt(&self, request: Request<v1::IssueJwtRequest>) -> Result<Response<v1::IssueJwtReply>, Status> {
        let peer = peer(&request)?;
        let message = request.into_inner();
        self.answer("issue_jwt", move |pki| {
            pki.refuse_denied(&peer)?;
            pki.issue_jwt(peer.certificate.as_deref(), &message, &peer.address.to_string())
        })
        .await
    }
}

impl HostService {
    pub(crate) fn new(pki: Arc<Pki>) -> HostService {
        HostService { pki, permits: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    async fn answer<T: Send + 'static>(
        &self,
        method: &'static str,
        act: impl FnOnce(&Pki) -> Result<T, Refused> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        run(self.pki.clone(), &self.permits, method, act).await.map(Response::new)
    }
}

pub(crate) async fn run<T: Send + 'static>(
    pki: Arc<Pki>,
    permits: &Semaphore,
    method: &'static str,
    act: impl FnOnce(&Pki) -> Result<T, Refused> + Send + 'static,
) -> Result<T, Status> {
    let _permit = permits.acquire().await.expect("the semaphore is never closed");
    let worker = pki.clone();
    let result = tokio::task::spawn_blocking(move || act(&worker)).await;
    let result = result.map_err(|error| {
        tracing::error!(%error, method, "a request panicked");
        pki.metrics.count(method, "internal");
        Status::internal("the PKI failed; see the log of meshd-pki")
    })?;
    pki.metrics.count(method, result.as_ref().map_or_else(Refused::kind, |_| "ok"));
    if let Err(refused) = &result {
        tracing::warn!(method, reason = %refused, "refused");
    }
    Ok(result?)
}

/// One host's conversation, until either side ends it.
struct Conversation {
    pki: Arc<Pki>,
    permits: Arc<Semaphore>,
    peer: Peer,
    reports: Streaming<v1::SyncRequest>,
    /// In boxes: a channel has room for 32 from its start.
    replies: Sender<Box<Result<v1::SyncReply, Status>>>,
}

impl Conversation {
    async fn hold(mut self) {
        let (mut news, mut stopping) = (self.pki.news(), self.pki.stopping());
        if *stopping.borrow_and_update() {
            return;
        }
        // What the host has, as far as it said; nothing is pushed before its first report.
        let mut had: Option<Had> = None;
        loop {
            let reply = tokio::select! {
                report = self.reports.message() => match report {
                    Ok(Some(report)) => {
                        had = Some(Had {
                            bundle: report.bundle_sequence,
                            deny: report.deny_sequence,
                            federation: report.federation_revision,
                        });
                        self.answer(report).await
                    }
                    Ok(None) | Err(_) => return,
                },
                // The host comes again, to whoever serves then.
                _ = stopping.changed() => return,
                Ok(()) = news.changed(), if had.is_some() => {
                    let (known, told) = (had.unwrap_or_default(), news.borrow_and_update().newest);
                    let host = self.host_name();
                    let act = move |pki: &Pki| pki.sync_news(&host, known);
                    let reply = run(self.pki.clone(), &self.permits, "sync_push", act).await;
                    // What was told is not told again with the next change.
                    had = Some(reply.as_ref().map_or(known, |reply| known.and(told, reply)));
                    reply
                }
            };
            let is_over = reply.is_err();
            if self.replies.send(Box::new(reply)).await.is_err() || is_over {
                return;
            }
        }
    }

    /// As the certificate has it; whether it may be told anything was judged with its reports.
    fn host_name(&self) -> String {
        let leaf = self.peer.certificate.as_deref().and_then(|der| inspect_svid(der).ok());
        leaf.map(|info| info.id.name().to_owned()).unwrap_or_default()
    }

    async fn answer(&self, report: v1::SyncRequest) -> Result<v1::SyncReply, Status> {
        let peer = self.peer.clone();
        run(self.pki.clone(), &self.permits, "sync", move |pki| {
            let certificate = peer.certificate.as_deref();
            if let Err(denied) = pki.refuse_denied(&peer) {
                return pki.last_word(certificate, &report).ok_or(denied);
            }
            pki.sync_report(certificate, &report, &peer.address.to_string())
        })
        .await
    }
}

pub(crate) fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    let peer = request.extensions().get::<Peer>().cloned();
    peer.ok_or_else(|| Status::internal("the listener did not say who called"))
}
