//! Whether anybody listens where a service is delivered to.

use std::net::SocketAddr;

use meshd_sys::sock_dump::listeners;

/// Who listens on this host; None when the kernel did not answer.
pub(super) struct Listening(Option<Vec<SocketAddr>>);

impl Listening {
    pub(super) fn now() -> Listening {
        match listeners() {
            Ok(found) => Listening(Some(found.iter().map(|listener| listener.address).collect())),
            Err(error) => {
                tracing::debug!(%error, "the kernel does not answer who listens");
                Listening(None)
            }
        }
    }

    /// False only if surely nobody does: who listens at an address that may be another host's is not known here.
    pub(super) fn reaches(&self, deliver: SocketAddr) -> bool {
        let Some(listeners) = &self.0 else { return true };
        let ip = deliver.ip().to_canonical();
        let hears = |address: &SocketAddr| {
            let own = address.ip().to_canonical();
            address.port() == deliver.port() && (own == ip || own.is_unspecified())
        };
        !ip.is_loopback() || listeners.iter().any(hears)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_port_nobody_listens_on_is_not_reached_and_others_are_not_known_of() {
        let listening = Listening(Some(["0.0.0.0:80", "127.0.0.1:81", "[::]:82"].map(|a| a.parse().unwrap()).to_vec()));
        let reaches = |deliver: &str| listening.reaches(deliver.parse().unwrap());
        assert!(reaches("127.0.0.1:80") && reaches("127.0.0.1:81") && reaches("127.0.0.1:82") && reaches("[::1]:82"));
        assert!(!reaches("127.0.0.2:81") && !reaches("127.0.0.1:83"));
        assert!(reaches("10.0.0.7:83") && Listening(None).reaches("127.0.0.1:83".parse().unwrap()));
    }

    #[tokio::test]
    async fn the_kernel_tells_who_listens_here() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        assert!(Listening::now().reaches(address));
        drop(listener);
        assert!(!Listening::now().reaches(address));
    }
}
