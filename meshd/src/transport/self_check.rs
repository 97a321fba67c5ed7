//! A handshake of this host with itself, in memory, with exactly what is in use: what fails here fails for everybody.

use std::io;
use std::ops::DerefMut;

use meshd_identity::{SpiffeId, server_name};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ConnectionCommon, ServerConnection, SideData};

use super::tls::TlsState;
use super::wire::ALPN_MESHD;

/// A handshake takes three flights; more turns than this mean that it does not move.
const MOST_TURNS: usize = 8;

/// Whether `id` can be served, and believed, with the certificates, roots and deny set in use.
pub fn handshake(tls: &TlsState, id: &SpiffeId) -> Result<(), String> {
    shake(tls, id, tls, id)
}

/// `source` of one host dials `expected` of another.
pub(super) fn shake(
    dialling: &TlsState,
    source: &SpiffeId,
    serving: &TlsState,
    expected: &SpiffeId,
) -> Result<(), String> {
    let config = dialling.client(source, expected, ALPN_MESHD).ok_or("there is no certificate")?;
    let name = ServerName::try_from(server_name(expected)).map_err(|error| error.to_string())?;
    let mut client = ClientConnection::new(config.into(), name).map_err(|error| error.to_string())?;
    let mut server = ServerConnection::new(serving.server.clone()).map_err(|error| error.to_string())?;
    for _ in 0..MOST_TURNS {
        if !client.is_handshaking() && !server.is_handshaking() {
            return Ok(());
        }
        carry(&mut client, &mut server).map_err(|error| format!("as server: {error}"))?;
        carry(&mut server, &mut client).map_err(|error| format!("as client: {error}"))?;
    }
    Err("the handshake does not end".to_owned())
}

/// What one side has to say, to the other.
fn carry<A: SideData, B: SideData>(
    from: &mut impl DerefMut<Target = ConnectionCommon<A>>,
    to: &mut impl DerefMut<Target = ConnectionCommon<B>>,
) -> io::Result<()> {
    let mut wire = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut wire)?;
    }
    let mut rest = wire.as_slice();
    while !rest.is_empty() {
        to.read_tls(&mut rest)?;
        to.process_new_packets().map_err(io::Error::other)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use meshd_identity::TrustDomain;
    use meshd_identity::denial::DenyIndex;
    use meshd_identity::statements::{Denied as Entry, DenySet, Whom};
    use meshd_pki_client::fake::FakeCa;

    use super::*;
    use crate::transport::denied::Denied;
    use crate::transport::generations::Generations;

    fn domain() -> TrustDomain {
        "prod.example.org".parse().unwrap()
    }

    fn payments() -> SpiffeId {
        SpiffeId::workload(&domain(), "shop", "payments").unwrap()
    }

    #[test]
    fn what_is_in_order_shakes_hands_with_itself() {
        let credentials = FakeCa::new(domain()).credentials("web", &[payments()]);
        let tls = TlsState::build(&credentials, None, 0).unwrap();
        assert_eq!(handshake(&tls, &payments()), Ok(()));
        let other = SpiffeId::workload(&domain(), "shop", "other").unwrap();
        assert!(handshake(&tls, &other).unwrap_err().contains("no certificate"));
    }

    #[test]
    fn an_expired_a_foreign_and_a_denied_certificate_are_found_out() {
        let (ca, other) = (FakeCa::new(domain()), FakeCa::new(domain()));
        let mut expired = ca.credentials("web", &[]);
        expired.workloads.insert(payments(), ca.expired_svid(&payments()));
        let tls = TlsState::build(&expired, None, 0).unwrap();
        assert!(handshake(&tls, &payments()).unwrap_err().contains("expired"));
        let mut foreign = ca.credentials("web", &[]);
        foreign.workloads.insert(payments(), other.svid(&payments()));
        let tls = TlsState::build(&foreign, None, 0).unwrap();
        assert!(handshake(&tls, &payments()).unwrap_err().contains("UnknownIssuer"));
        let (set, denied) = Denied::channel();
        let credentials = ca.credentials("web", &[payments()]);
        let tls = TlsState::build_denying(&credentials, None, Generations::default(), denied).unwrap();
        assert_eq!(handshake(&tls, &payments()), Ok(()));
        let entries = vec![Entry { whom: Whom::Identity(payments()), until: 0 }];
        let deny = DenySet { trust_domain: domain(), sequence: 1, entries };
        set.send_replace(Arc::new(DenyIndex::of(&deny)));
        assert!(handshake(&tls, &payments()).unwrap_err().contains("Revoked"));
    }
}
