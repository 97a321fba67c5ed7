//! Who is the PKI: rustls verifiers, and the check of what it issued.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use meshd_identity::{Bundle, SpiffeId, inspect_svid};
use rustls::client::danger::ServerCertVerifier;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, Error, RootCertStore};

use crate::judge::ServerJudge;

/// Accepts any server. For the one connection that fetches a bundle whose digest is already known: nothing secret
/// is sent on it, and nothing read from it is believed without the digest.
pub(crate) fn any_server(provider: Arc<CryptoProvider>) -> Arc<dyn ServerCertVerifier> {
    Arc::new(ServerJudge::new(provider, |_: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: UnixTime| Ok(())))
}

/// Accepts a PKI server of one trust domain: its chain ends in the bundle and its SPIFFE ID is the PKI's.
pub(crate) fn pki_server(
    provider: Arc<CryptoProvider>,
    bundle: &Bundle,
    last_pki_time: SystemTime,
) -> Result<Arc<dyn ServerCertVerifier>, Error> {
    let expected = SpiffeId::pki(&bundle.trust_domain);
    let server = PkiServer { provider: provider.clone(), roots: root_store(bundle)?, expected, last_pki_time };
    let judgement =
        move |leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>], now: UnixTime| server.verify(leaf, rest, now);
    Ok(Arc::new(ServerJudge::new(provider, judgement)))
}

struct PkiServer {
    provider: Arc<CryptoProvider>,
    roots: RootCertStore,
    expected: SpiffeId,
    /// The PKI's clock when it last answered; helps a host whose own clock is behind.
    last_pki_time: SystemTime,
}

impl PkiServer {
    fn verify(&self, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>], now: UnixTime) -> Result<(), Error> {
        let domain = self.expected.trust_domain();
        self.verify_chain(leaf, rest, now).map_err(|error| {
            Error::General(format!("the server's certificate does not verify against the bundle of {domain}: {error}"))
        })?;
        let found = inspect_svid(leaf).map_err(|error| Error::General(error.to_string()))?;
        if found.id == self.expected {
            return Ok(());
        }
        let expected = &self.expected;
        Err(Error::General(format!("the server is {}, expected {expected}; check the PKI address", found.id)))
    }

    fn verify_chain(&self, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>], now: UnixTime) -> Result<(), Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        let verified = verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, rest, now, algorithms);
        let early = CertificateError::NotValidYet;
        let is_early = |error: &Error| match error {
            Error::InvalidCertificate(CertificateError::NotValidYetContext { .. }) => true,
            Error::InvalidCertificate(other) => *other == early,
            _ => false,
        };
        match verified {
            // Only ever relaxes "not yet": a PKI whose clock once ran ahead must not lock its hosts out.
            Err(error) if is_early(&error) => {
                let known = UnixTime::since_unix_epoch(since_epoch(self.last_pki_time));
                verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, rest, known, algorithms)
            }
            other => other,
        }
    }
}

/// Checks that a chain just issued leads from `leaf` to the bundle that came with it, at the PKI's own time: the
/// host's clock may be wrong, and a certificate that peers accept must not be thrown away for that.
pub(crate) fn check_issued(chain: &[Vec<u8>], bundle: &Bundle, pki_time: SystemTime) -> Result<(), Error> {
    let [leaf, rest @ ..] = chain else {
        return Err(Error::NoCertificatesPresented);
    };
    let leaf = CertificateDer::from(leaf.as_slice());
    let rest: Vec<CertificateDer<'_>> = rest.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let parsed = ParsedCertificate::try_from(&leaf)?;
    let now = UnixTime::since_unix_epoch(since_epoch(pki_time));
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let algorithms = provider.signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(&parsed, &root_store(bundle)?, &rest, now, algorithms)
}

fn root_store(bundle: &Bundle) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for root in &bundle.roots {
        roots.add(CertificateDer::from(root.as_slice()))?;
    }
    Ok(roots)
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use meshd_identity::TrustDomain;
    use rustls::pki_types::ServerName;

    use super::*;
    use crate::Svid;
    use crate::fake::FakeCa;

    const HOUR: Duration = Duration::from_secs(3600);

    fn domain() -> TrustDomain {
        "prod.example.org".parse().unwrap()
    }

    fn verify(ca: &FakeCa, svid: &Svid, last_pki_time: SystemTime, now: SystemTime) -> Result<(), String> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = pki_server(provider, &ca.bundle(), last_pki_time).unwrap();
        let name = ServerName::try_from("pki.id.mesh.internal").unwrap();
        let now = UnixTime::since_unix_epoch(since_epoch(now));
        let verified = verifier.verify_server_cert(&svid.chain[0], &svid.chain[1..], &name, &[], now);
        verified.map(|_| ()).map_err(|error| error.to_string())
    }

    #[test]
    fn only_the_pki_of_the_bundles_domain_is_accepted() {
        let ca = FakeCa::new(domain());
        let (epoch, now) = (SystemTime::UNIX_EPOCH, SystemTime::now());
        verify(&ca, &ca.svid(&SpiffeId::pki(&domain())), epoch, now).unwrap();
        let host = ca.svid(&SpiffeId::host(&domain(), "web").unwrap());
        assert!(verify(&ca, &host, epoch, now).unwrap_err().contains("expected spiffe://prod.example.org"));
        let foreign = ca.svid(&SpiffeId::pki(&"other".parse().unwrap()));
        assert!(verify(&ca, &foreign, epoch, now).unwrap_err().contains("spiffe://other/"));
        let impostor = FakeCa::new(domain()).svid(&SpiffeId::pki(&domain()));
        assert!(verify(&ca, &impostor, epoch, now).unwrap_err().contains("does not verify"));
        let expired = ca.expired_svid(&SpiffeId::pki(&domain()));
        assert!(verify(&ca, &expired, epoch, now).unwrap_err().contains("expired"));
    }

    #[test]
    fn a_host_whose_clock_is_behind_uses_the_last_time_the_pki_told() {
        let ca = FakeCa::new(domain());
        let svid = ca.svid(&SpiffeId::pki(&domain()));
        let now = SystemTime::now();
        assert!(verify(&ca, &svid, SystemTime::UNIX_EPOCH, now - 48 * HOUR).is_err());
        verify(&ca, &svid, now, now - 48 * HOUR).unwrap();
    }

    #[test]
    fn a_pki_time_from_the_future_does_not_lock_out() {
        let ca = FakeCa::new(domain());
        let svid = ca.svid(&SpiffeId::pki(&domain()));
        let now = SystemTime::now();
        verify(&ca, &svid, now + 10_000 * HOUR, now).unwrap();
    }

    #[test]
    fn an_issued_chain_must_lead_to_the_bundle_it_came_with() {
        let (ca, other) = (FakeCa::new(domain()), FakeCa::new(domain()));
        let svid = ca.svid(&SpiffeId::workload(&domain(), "shop", "payments").unwrap());
        let chain: Vec<Vec<u8>> = svid.chain.iter().map(|der| der.to_vec()).collect();
        check_issued(&chain, &ca.bundle(), SystemTime::now()).unwrap();
        assert!(check_issued(&chain, &other.bundle(), SystemTime::now()).is_err());
        assert!(check_issued(&chain[..1], &ca.bundle(), SystemTime::now()).is_err());
        assert!(check_issued(&[], &ca.bundle(), SystemTime::now()).is_err());
    }
}
