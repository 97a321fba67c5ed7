//! Who a bundle endpoint has to be.

use std::fmt;
use std::sync::Arc;

use meshd_identity::Bundle;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, PeerIncompatible, RootCertStore, SignatureScheme,
};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;

/// Where distributions keep the authorities of the web.
const SYSTEM_AUTHORITIES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"];

/// By name, under authorities of the operator's choice or the system's.
pub(super) fn web(authorities: Option<&str>) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    match authorities {
        Some(pem) => add_pem(&mut roots, pem.as_bytes())?,
        None => {
            let system = SYSTEM_AUTHORITIES.iter().find_map(|path| std::fs::read(path).ok());
            let pem = system.ok_or("this system has no list of web authorities; give --ca FILE")?;
            add_pem(&mut roots, &pem)?;
        }
    }
    let config = builder()?.with_root_certificates(roots).with_no_client_auth();
    Ok(finished(config))
}

/// Whether a PEM file of authorities can be used; an error when it holds none.
pub(super) fn check_authorities(pem: &str) -> Result<(), String> {
    add_pem(&mut RootCertStore::empty(), pem.as_bytes())
}

fn add_pem(roots: &mut RootCertStore, pem: &[u8]) -> Result<(), String> {
    let found: Vec<CertificateDer<'_>> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|error| format!("not PEM: {error}"))?;
    let (added, _) = roots.add_parsable_certificates(found);
    if added == 0 { Err("no certificate of an authority in it".to_owned()) } else { Ok(()) }
}

/// By SPIFFE ID, under the bundle of the trust domain in it. The name in the URL does not matter.
pub(super) fn spiffe(bundle: &Bundle, spiffe_id: &str) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    for root in &bundle.roots {
        roots.add(CertificateDer::from(root.as_slice())).map_err(|error| error.to_string())?;
    }
    let verifier = Arc::new(Exactly { roots, spiffe_id: spiffe_id.to_owned(), provider: provider() });
    let config = builder()?.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    Ok(finished(config))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, String> {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| error.to_string())
}

fn finished(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // A resumed session would skip the verification.
    config.resumption = Resumption::disabled();
    config
}

struct Exactly {
    roots: RootCertStore,
    spiffe_id: String,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Exactly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exactly").field("spiffe_id", &self.spiffe_id).finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Exactly {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, rest, now, algorithms)?;
        match only_uri(leaf) {
            Some(found) if found == self.spiffe_id => Ok(ServerCertVerified::assertion()),
            _ => Err(Error::InvalidCertificate(CertificateError::NotValidForName)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::ServerDoesNotSupportTls12Or13.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Of any SPIFFE implementation: its identities need not have the form of ours. Counted on the raw extension: a URI
/// that cannot be read must not hide.
fn only_uri(leaf: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(leaf).ok()?;
    let mut uris = Vec::new();
    for extension in certificate.extensions() {
        if let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension() {
            for name in &names.general_names {
                match name {
                    GeneralName::URI(uri) => uris.push((*uri).to_owned()),
                    GeneralName::Invalid(..) => return None,
                    _ => {}
                }
            }
        }
    }
    if certificate.is_ca() || uris.len() != 1 { None } else { uris.pop() }
}
