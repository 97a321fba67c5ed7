use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use meshd_identity::{Bundle, SpiffeId, TrustDomain};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::Federation;

/// One identity with the certificate and key that prove it.
#[derive(Clone)]
pub struct Svid {
    pub id: SpiffeId,
    /// Leaf first, then intermediates, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    pub key: Arc<PrivateKeyDer<'static>>,
    /// When the PKI issued it; renewal counts from here (NotBefore is backdated).
    pub issued_at: SystemTime,
    pub not_before: SystemTime,
    /// The earliest end in the whole chain.
    pub not_after: SystemTime,
    /// Of the leaf, lower-case hexadecimal.
    pub serial: String,
}

/// Everything a host holds. Replaced as a whole: leaf certificates and the bundle that verifies them travel together.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub trust_domain: TrustDomain,
    pub host_id: String,
    pub bundle: Bundle,
    pub host: Arc<Svid>,
    pub workloads: BTreeMap<SpiffeId, Arc<Svid>>,
    /// Identities the PKI does not permit this host, with its words.
    pub refused: BTreeMap<SpiffeId, String>,
    /// What the processes of an identity are known by, where the PKI says so.
    pub selectors: BTreeMap<SpiffeId, Vec<String>>,
    /// What programs are told of an identity beside it.
    pub hints: BTreeMap<SpiffeId, String>,
    /// The deny set in force, which the PKI has signed, names this host: it has given up its workloads' identities.
    pub banned: bool,
    /// Other trust domains, each with its own bundle.
    pub federation: Federation,
    /// `host:port` of the PKI servers.
    pub pki: Vec<String>,
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}
