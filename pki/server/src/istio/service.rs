//! gRPC: from the wire to [`Pki::create_certificate`] and back, with the codes that istiod answers.

use std::sync::Arc;

use meshd_pki_api::istio::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use meshd_pki_api::istio::{IstioCertificateRequest, IstioCertificateResponse};
use tokio::sync::Semaphore;
use tonic::{Code, Request, Response, Status};

use super::Shown;
use crate::pki::Pki;
use crate::service::{AT_ONCE, peer, run};

/// A request is below 2 KiB.
const LARGEST_REQUEST: usize = 64 * 1024;
const SCHEME: &str = "Bearer ";

pub(crate) struct IstioService {
    pki: Arc<Pki>,
    permits: Arc<Semaphore>,
}

impl IstioService {
    pub(crate) fn server(pki: Arc<Pki>) -> IstioCertificateServiceServer<IstioService> {
        let service = IstioService { pki, permits: Arc::new(Semaphore::new(AT_ONCE)) };
        IstioCertificateServiceServer::new(service).max_decoding_message_size(LARGEST_REQUEST)
    }
}

#[tonic::async_trait]
impl IstioCertificateService for IstioService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = peer(&request)?;
        let certificate = peer.certificate.as_ref().map(|leaf| leaf.to_vec());
        let shown = Shown { token: token(&request), certificate };
        let message = request.into_inner();
        let act = move |pki: &Pki| {
            if shown.token.is_none() {
                pki.refuse_denied(&peer)?;
            }
            pki.create_certificate(&shown, &message, &peer.address.to_string())
        };
        let reply = run(self.pki.clone(), &self.permits, "istio_create_certificate", act).await;
        reply.map(Response::new).map_err(as_istiod)
    }
}

fn token(request: &Request<IstioCertificateRequest>) -> Option<String> {
    let header = request.metadata().get("authorization")?.to_str().ok()?;
    // Files with tokens end in a newline at times.
    Some(header.strip_prefix(SCHEME)?.trim().to_owned())
}

/// istiod does not tell apart who you are and what you may; and what is off is not there.
fn as_istiod(status: Status) -> Status {
    match status.code() {
        Code::PermissionDenied => Status::unauthenticated(status.message()),
        Code::NotFound => Status::unimplemented(status.message()),
        _ => status,
    }
}
