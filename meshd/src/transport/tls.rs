//! Mutual TLS 1.3 between hosts: which certificate we show, whom we believe. Rebuilt whole whenever
//! certificates or bundle change; open connections keep what they were opened with.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use meshd_identity::denial::Marks;
use meshd_identity::{SpiffeId, TrustDomain, inspect_svid, server_name};
use meshd_pki_client::{Credentials, Judgement, ServerJudge, Svid};
use rustls::client::Resumption;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, ServerConfig,
    SignatureScheme,
};

use super::denied::Denied;
use super::generations::{Generation, Generations};
use super::trust::Trust;
use super::wire::{ALPN_HBONE, ALPN_MESHD};

/// Everything handshakes need.
pub struct TlsState {
    generations: Generations,
    pub server: Arc<ServerConfig>,
    keys: HashMap<SpiffeId, Identity>,
    by_sni: HashMap<String, SpiffeId>,
    default_identity: Option<SpiffeId>,
    trust: Arc<Trust>,
    provider: Arc<CryptoProvider>,
}

/// A certificate ready to sign with.
#[derive(Clone)]
pub struct Identity {
    pub key: Arc<CertifiedKey>,
    pub not_after: SystemTime,
}

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the private key of {id} is unusable: {source}; `meshd join` again to get a new one")]
    Key { id: SpiffeId, source: Error },
    #[error("the trust bundle holds no usable root: {0}; `meshd join` again")]
    Roots(String),
}

/// The peer's certificate, once a handshake has verified it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    pub id: SpiffeId,
    pub not_after: SystemTime,
    pub marks: Marks,
}

impl TlsState {
    /// Denies nobody.
    pub fn build(credentials: &Credentials, default: Option<&SpiffeId>, changes: u64) -> Result<TlsState, TlsError> {
        TlsState::build_denying(credentials, default, Generations::with(changes), Denied::nobody())
    }

    pub fn build_denying(
        credentials: &Credentials,
        default: Option<&SpiffeId>,
        generations: Generations,
        denied: Denied,
    ) -> Result<TlsState, TlsError> {
        let provider = Arc::new(provider());
        let trust = Arc::new(Trust::new(credentials, denied, &provider)?);
        let mut keys = HashMap::new();
        for (id, svid) in &credentials.workloads {
            let key = Arc::new(certified_key(svid, &provider)?);
            keys.insert(id.clone(), Identity { key, not_after: svid.not_after });
        }
        let by_sni: HashMap<String, SpiffeId> = keys.keys().map(|id| (server_name(id), id.clone())).collect();
        let default_identity = default.filter(|id| keys.contains_key(*id)).cloned();
        let resolver = SniResolver {
            keys: by_sni.iter().map(|(sni, id)| (sni.clone(), keys[id].key.clone())).collect(),
            default: default_identity.as_ref().map(|id| keys[id].key.clone()),
        };
        let server = server_config(&trust, &provider, resolver)?;
        Ok(TlsState { generations, server: Arc::new(server), keys, by_sni, default_identity, trust, provider })
    }

    /// Whom we can be.
    pub fn identities(&self) -> impl Iterator<Item = &SpiffeId> {
        self.keys.keys()
    }

    pub fn identity(&self, id: &SpiffeId) -> Option<&Identity> {
        self.keys.get(id)
    }

    /// The identity we presented to a client that asked for `sni`, and whether the client chose it.
    pub fn presented(&self, sni: Option<&str>) -> Option<(&SpiffeId, bool)> {
        match sni {
            Some(sni) => self.by_sni.get(sni).map(|id| (id, true)),
            None => self.default_identity.as_ref().map(|id| (id, false)),
        }
    }

    /// The peer of a finished handshake.
    pub fn peer(&self, chain: Option<&[CertificateDer<'_>]>) -> Option<PeerCertificate> {
        let chain = chain?;
        let info = inspect_svid(chain.first()?).ok()?;
        Some(PeerCertificate { id: info.id, not_after: info.not_after, marks: self.trust.marks(chain)? })
    }

    pub fn generations(&self) -> &Generations {
        &self.generations
    }

    /// Of connections made now with peers of a trust domain.
    pub fn generation(&self, domain: &TrustDomain) -> Generation {
        self.generations.of(domain)
    }

    pub fn denied(&self) -> &Denied {
        &self.trust.denied
    }

    /// Whether our identity may have dealings with a trust domain: always with our own, with others as the PKI says.
    pub fn deals(&self, own: &SpiffeId, domain: &TrustDomain) -> bool {
        self.trust.deals(own, domain)
    }

    /// Whether identities of a trust domain can be verified at all.
    pub fn knows(&self, domain: &TrustDomain) -> bool {
        self.trust.knows(domain)
    }

    /// To dial as `source` and accept nobody but `expected`. None: we hold no certificate for `source`.
    pub fn client(&self, source: &SpiffeId, expected: &SpiffeId, alpn: &[u8]) -> Option<ClientConfig> {
        let identity = self.keys.get(source)?;
        let judgement = exactly(expected.clone(), self.trust.clone());
        let verifier = ServerJudge::new(self.provider.clone(), judgement);
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .ok()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(identity.key.clone())));
        config.alpn_protocols = vec![alpn.to_vec()];
        // A resumed session would skip verification.
        config.resumption = Resumption::disabled();
        Some(config)
    }
}

/// AES-GCM only, as ztunnel; hybrid post-quantum key exchange preferred.
fn provider() -> CryptoProvider {
    use aws_lc_rs::{cipher_suite, kx_group};
    CryptoProvider {
        cipher_suites: vec![cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
        ..aws_lc_rs::default_provider()
    }
}

fn certified_key(svid: &Svid, provider: &CryptoProvider) -> Result<CertifiedKey, TlsError> {
    let unusable = |source| TlsError::Key { id: svid.id.clone(), source };
    let key = provider.key_provider.load_private_key(svid.key.clone_key()).map_err(unusable)?;
    Ok(CertifiedKey::new(svid.chain.clone(), key))
}

fn server_config(
    trust: &Arc<Trust>,
    provider: &Arc<CryptoProvider>,
    resolver: SniResolver,
) -> Result<ServerConfig, TlsError> {
    let unusable = |error: &dyn fmt::Display| TlsError::Roots(error.to_string());
    let verifier = MeshClient { trust: trust.clone(), provider: provider.clone() };
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| unusable(&error))?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![ALPN_MESHD.to_vec(), ALPN_HBONE.to_vec()];
    // A resumed session would bring an old client certificate along unverified.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// SNI selects which of our identities a client gets; it is never trusted for anything else.
#[derive(Debug)]
struct SniResolver {
    keys: HashMap<String, Arc<CertifiedKey>>,
    default: Option<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for SniResolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        match hello.server_name() {
            Some(sni) => self.keys.get(sni).cloned(),
            None => self.default.clone(),
        }
    }
}

/// Believes a server that proves exactly the identity the endpoint record names.
fn exactly(expected: SpiffeId, trust: Arc<Trust>) -> impl Judgement + 'static {
    move |leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>], now: UnixTime| match trust
        .verify_server(leaf, rest, now)?
        .id
        == expected
    {
        true => Ok(()),
        false => Err(Error::InvalidCertificate(CertificateError::NotValidForName)),
    }
}

/// Believes clients of our own trust domain and of federated ones; whom they may reach is decided per stream.
#[derive(Debug)]
struct MeshClient {
    trust: Arc<Trust>,
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for MeshClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Hints would only tell strangers our authorities' names and cost every handshake bytes.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.trust.verify_client(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
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
