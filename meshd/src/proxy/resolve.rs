//! WHERE to: from the address the application dialled to the service that owns it. Pure.

use std::net::SocketAddr;
use std::sync::Arc;

use meshd_discovery::{Directory, Protocol, Service};

use crate::dns::Vips;
use crate::fault::Fault;

/// The service meant, and its port.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub service: Arc<Service>,
    pub port: u16,
    pub protocol: Protocol,
}

pub(super) fn service(directory: &Directory, vips: &Vips, original: SocketAddr) -> Result<Place, Fault> {
    let name = vips.service_of(original.ip()).ok_or(Fault::NoService)?;
    let service = directory.get(&name).ok_or(Fault::NoService)?;
    let port = service.ports.iter().find(|port| port.port == original.port()).ok_or(Fault::NoService)?;
    Ok(Place { service: service.clone(), port: port.port, protocol: port.protocol })
}
