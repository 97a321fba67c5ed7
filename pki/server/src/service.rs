//! gRPC: from wire to [`Pki`] and back. Each call runs on a blocking thread: it signs and syncs.

use std::net::SocketAddr;
use std::sync::Arc;

use meshd_pki_api::v1;
use meshd_pki_api::v1::host_server::Host;
use rustls::pki_types::CertificateDer;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use crate::pki::Pki;
use crate::refused::Refused;

/// Who is at the other end of a connection; put into every request by the listener.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// The leaf, when the peer presented one and TLS verified it.
    pub(crate) certificate: Option<CertificateDer<'static>>,
    pub(crate) address: SocketAddr,
}

/// Calls worked on at once. All of them share one database, so more would only wait with a thread each.
const AT_ONCE: usize = 8;

pub(crate) struct HostService {
    pki: Arc<Pki>,
    permits: Semaphore,
}

#[tonic::async_trait]
impl Host for HostService {
    async fn bundle(&self, request: Request<v1::BundleRequest>) -> Result<Response<v1::BundleReply>, Status> {
        let digest = request.into_inner().sha256;
        self.run("bundle", move |pki| {
            let bundle = pki.bundle(&digest)?;
            Ok(v1::BundleReply { bundle: Some(bundle) })
        })
        .await
    }

    async fn enroll(&self, request: Request<v1::EnrollRequest>) -> Result<Response<v1::EnrollReply>, Status> {
        let peer = peer(&request)?;
        let message = request.into_inner();
        self.run("enroll", move |pki| pki.enrol(&message, &peer.address.to_string())).await
    }

    async fn issue_batch(
        &self,
        request: Request<v1::IssueBatchRequest>,
    ) -> Result<Response<v1::IssueBatchReply>, Status> {
        let peer = peer(&request)?;
        let message = request.into_inner();
        self.run("issue_batch", move |pki| {
            pki.issue_batch(peer.certificate.as_deref(), &message, &peer.address.to_string())
        })
        .await
    }
}

impl HostService {
    pub(crate) fn new(pki: Arc<Pki>) -> HostService {
        HostService { pki, permits: Semaphore::new(AT_ONCE) }
    }

    async fn run<T: Send + 'static>(
        &self,
        method: &'static str,
        act: impl FnOnce(&Pki) -> Result<T, Refused> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let _permit = self.permits.acquire().await.expect("the semaphore is never closed");
        let pki = self.pki.clone();
        let result = tokio::task::spawn_blocking(move || act(&pki)).await;
        let result = result.map_err(|error| {
            tracing::error!(%error, method, "a request panicked");
            self.pki.metrics.count(method, "internal");
            Status::internal("the PKI failed; see the log of meshd-pki")
        })?;
        self.pki.metrics.count(method, result.as_ref().map_or_else(Refused::kind, |_| "ok"));
        if let Err(refused) = &result {
            tracing::warn!(method, reason = %refused, "refused");
        }
        Ok(Response::new(result?))
    }
}

fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    let peer = request.extensions().get::<Peer>().cloned();
    peer.ok_or_else(|| Status::internal("the listener did not say who called"))
}
