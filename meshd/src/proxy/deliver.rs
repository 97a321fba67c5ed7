//! DELIVER: from a peer's target to a row of this host's own delivery table, and on to the application.
//! Everything else is refused: a host is never an open proxy.

use std::net::SocketAddr;
use std::sync::Arc;

use meshd_identity::SpiffeId;
use tokio::net::TcpStream;

use super::authorize::Permit;
use crate::enrol::{Delivery, Enrolment};
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

/// Connects to the application; only with a permit.
pub(super) async fn connect(dialer: &Dialer, delivery: &Delivery, _permit: Permit) -> Result<TcpStream, Fault> {
    dialer.tcp(delivery.deliver).await
}
