//! Which address of this host others reach it at, when nobody said.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::{UdpSocket, lookup_host};

use super::RegistrarError;

/// The source address of the route to the first of `HOST:PORT`s that there is one to. Nothing is sent.
pub(crate) async fn address_towards(backends: &[String]) -> Result<IpAddr, RegistrarError> {
    let mut problems = Vec::new();
    for backend in backends {
        match towards(backend).await {
            Ok(address) if address.is_loopback() => problems.push(format!("{backend} is on this host")),
            Ok(address) => return Ok(address),
            Err(error) => problems.push(format!("{backend}: {error}")),
        }
    }
    Err(RegistrarError(format!(
        "which address peers reach this host at cannot be told from the route to the backend ({}); write it as [host] \
         address in meshd.toml",
        problems.join("; ")
    )))
}

async fn towards(backend: &str) -> std::io::Result<IpAddr> {
    let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
    for to in lookup_host(backend).await? {
        match route_to(to).await {
            Ok(address) => return Ok(address),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn route_to(to: SocketAddr) -> std::io::Result<IpAddr> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(to).await?;
    Ok(socket.local_addr()?.ip().to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_backend_on_this_host_tells_no_address_and_the_remedy_is_named() {
        let error = address_towards(&["127.0.0.1:2379".to_owned()]).await.unwrap_err().to_string();
        assert!(error.contains("127.0.0.1:2379 is on this host") && error.contains("[host] address"), "{error}");
    }
}
