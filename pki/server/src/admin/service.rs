//! The Admin API: who calls, and that it is [`Pki::command`] which answers.

use std::sync::Arc;

use meshd_identity::denial::DenyIndex;
use meshd_identity::inspect_svid;
use meshd_pki_api::MAX_MESSAGE_BYTES;
use meshd_pki_api::admin::admin_server::{Admin, AdminServer};
use meshd_pki_api::admin::{Command, Reply};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use super::{Actor, AdminError};
use crate::audit::Event;
use crate::pki::Pki;
use crate::service::Peer;
use crate::store::{deny, roles};
use crate::times::{rfc3339, unix};

/// Who is at the other end of the Unix socket; put into every request by the listener.
#[derive(Debug, Clone)]
pub(super) enum Local {
    Known(Actor),
    /// Neither root, nor the PKI's own user, nor among those who may read.
    Stranger(String),
}

pub(crate) struct AdminService {
    pki: Arc<Pki>,
    permits: Arc<Semaphore>,
}

/// Commands worked on at once by one listener: hosts that renew use the same threads and the same database.
const AT_ONCE: usize = 2;

impl AdminService {
    pub(crate) fn server(pki: Arc<Pki>) -> AdminServer<AdminService> {
        AdminServer::new(AdminService { pki, permits: Arc::new(Semaphore::new(AT_ONCE)) })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn run(&self, request: Request<Command>) -> Result<Response<Reply>, Status> {
        let local = request.extensions().get::<Local>().cloned();
        let peer = request.extensions().get::<Peer>().cloned();
        let command = request.into_inner().command;
        let pki = self.pki.clone();
        let _permit = self.permits.acquire().await.expect("the semaphore is never closed");
        let answer = move || {
            let actor = pki.admin_actor(local, peer)?;
            let unknown = || AdminError::Invalid("the command is unknown here; install a newer meshd-pki".to_owned());
            pki.command(&actor, command.ok_or_else(unknown)?)
        };
        let result = tokio::task::spawn_blocking(answer).await;
        let result = result.map_err(|error| {
            tracing::error!(%error, "a command panicked");
            Status::internal("the PKI failed; see the log of meshd-pki")
        })?;
        self.pki.metrics.count("admin", if result.is_ok() { "ok" } else { "refused" });
        Ok(Response::new(Reply { reply: Some(result?) }))
    }
}

impl Pki {
    fn admin_actor(&self, local: Option<Local>, peer: Option<Peer>) -> Result<Actor, AdminError> {
        let refused = match (local, peer) {
            (Some(Local::Known(actor)), _) => return Ok(actor),
            (Some(Local::Stranger(name)), _) => {
                let why = format!(
                    "{name} may not use this socket: root and the PKI's own user may, and whom `meshd-pki run \
                     --admin-readers` names may read"
                );
                (name, why)
            }
            (None, Some(peer)) => match self.remote_actor(&peer)? {
                Ok(actor) => return Ok(actor),
                Err(why) => (peer.address.to_string(), why),
            },
            (None, None) => return Err(AdminError::Forbidden("the listener did not say who called".to_owned())),
        };
        let (by, why) = refused;
        let detail = Some(why.clone());
        self.record_refusal(Event { event: "admin", result: "refused", by: Some(by), detail, ..Event::default() });
        Err(AdminError::Forbidden(why))
    }

    /// The peer's chain was verified by TLS. Judged anew for each command: the connection may be older than its
    /// end, a revoked role or a denial.
    fn remote_actor(&self, peer: &Peer) -> Result<Result<Actor, String>, AdminError> {
        let from = peer.address;
        let Some(certificate) = peer.certificate.as_deref() else {
            return Ok(Err("a client certificate is needed; give --cert, --key and --bundle".to_owned()));
        };
        let info = match inspect_svid(certificate) {
            Ok(info) => info,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let id = info.id;
        if info.not_after <= self.now() {
            return Ok(Err(format!("the certificate of {id} ended at {}", rfc3339(unix(info.not_after)))));
        }
        let (role, is_denied) = self.state.database.read(|view| -> Result<_, AdminError> {
            let denied = DenyIndex::of(&deny::deny(view)?.to_set(&self.trust_domain));
            let is_denied = peer.marks.as_ref().is_none_or(|marks| denied.denies(marks));
            Ok((roles::role(view, id.as_str())?, is_denied))
        })?;
        if is_denied {
            return Ok(Err(format!("{id} is denied in this mesh")));
        }
        Ok(match role {
            Some(role) => Ok(Actor { name: format!("{id} from {from}"), role }),
            None => Err(format!("{id} has no role on this PKI; see `meshd-pki role grant`")),
        })
    }
}
