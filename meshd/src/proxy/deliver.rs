//! DELIVER: from a peer's target to a row of this host's own delivery table, and on to the application.
//! Everything else is refused: a host is never an open proxy.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use meshd_identity::SpiffeId;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::authorize::Permit;
use super::proxy_protocol;
use crate::enrol::{ClientAddress, Delivery, Enrolment};
use crate::fault::Fault;
use crate::transport::dial::Dialer;
use crate::transport::wire::Target;

/// The row a peer asks for. Pure.
///
/// `presented` is the identity we proved to the peer; where it chose that identity, the target must belong to it.
pub(super) fn find(
    enrolment: &Enrolment,
    target: &Target,
    dialled: SocketAddr,
    presented: &SpiffeId,
    chosen: bool,
) -> Result<Arc<Delivery>, Fault> {
    let delivery = match target {
        Target::Service(service, port) => enrolment.delivery(service, *port),
        // A plain HBONE peer names the address it dialled and the application's own port.
        Target::Address(address) if address.ip() == dialled.ip() => enrolment.delivery_at(address.port()),
        Target::Address(_) => None,
    };
    let delivery = delivery.ok_or(Fault::UnknownTarget)?;
    if chosen && delivery.owner.identity != *presented {
        return Err(Fault::Misdirected);
    }
    Ok(delivery.clone())
}

/// Who calls, as its TLS connection proves: no header has a say in what an application is told.
pub(super) struct Caller<'a> {
    pub id: &'a SpiffeId,
    pub address: SocketAddr,
}

/// The application, connected.
pub(super) struct Delivered {
    pub app: TcpStream,
    /// It asked to see the caller's address and sees ours: why.
    pub hidden: Option<Hidden>,
}

/// Why an application cannot see its caller's address.
#[derive(Debug, thiserror::Error)]
pub(super) enum Hidden {
    #[error("the caller has an address of the other family; let the application listen on that, too")]
    OtherFamily,
    #[error("the kernel lets meshd not connect from the caller's address: {0}")]
    NotAllowed(io::Error),
}

/// Connects to the application; only with a permit.
pub(super) async fn connect(
    dialer: &Dialer,
    delivery: &Delivery,
    caller: &Caller<'_>,
    _permit: Permit,
) -> Result<Delivered, Fault> {
    let to = delivery.deliver;
    match delivery.client_address {
        ClientAddress::None => plain(dialer, to, None).await,
        ClientAddress::ProxyV2 => announced(dialer, to, caller).await,
        ClientAddress::Transparent => match transparent(dialer, to, caller.address.ip().to_canonical()).await {
            Ok(connected) => Ok(Delivered { app: connected?, hidden: None }),
            Err(hidden) => plain(dialer, to, Some(hidden)).await,
        },
    }
}

async fn plain(dialer: &Dialer, to: SocketAddr, hidden: Option<Hidden>) -> Result<Delivered, Fault> {
    Ok(Delivered { app: dialer.tcp(to).await?, hidden })
}

async fn announced(dialer: &Dialer, to: SocketAddr, caller: &Caller<'_>) -> Result<Delivered, Fault> {
    let mut app = dialer.tcp(to).await?;
    let header = proxy_protocol::header(caller.address, to, caller.id);
    app.write_all(&header).await.map_err(|_| Fault::AppReset)?;
    Ok(Delivered { app, hidden: None })
}

async fn transparent(dialer: &Dialer, to: SocketAddr, source: IpAddr) -> Result<Result<TcpStream, Fault>, Hidden> {
    if source.is_ipv4() != to.is_ipv4() {
        return Err(Hidden::OtherFamily);
    }
    dialer.tcp_from(source, to).await.map_err(Hidden::NotAllowed)
}
