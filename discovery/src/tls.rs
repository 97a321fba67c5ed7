//! A client's side of TLS to a backend: version 1.3, and no roots but those that are given.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

/// What a client shows of itself.
pub(crate) type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

#[derive(Debug, thiserror::Error)]
pub(crate) enum MaterialError {
    #[error("{0}")]
    Unreadable(io::Error),
    #[error("{0}; PEM is needed")]
    Pem(PemError),
    #[error("no certificate in it; PEM is needed")]
    Empty,
}

impl From<PemError> for MaterialError {
    fn from(error: PemError) -> MaterialError {
        match error {
            PemError::Io(error) => MaterialError::Unreadable(error),
            error => MaterialError::Pem(error),
        }
    }
}

/// `protocols`: what is offered by ALPN, if anything.
pub(crate) fn client(
    roots: Vec<CertificateDer<'static>>,
    identity: Option<Identity>,
    protocols: &[&[u8]],
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(store);
    let mut config = match identity {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(Arc::new(config))
}

pub(crate) fn certificates_of(path: &Path) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    some(CertificateDer::pem_file_iter(path)?.collect::<Result<_, _>>()?)
}

pub(crate) fn certificates_in(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    some(CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>()?)
}

pub(crate) fn key_of(path: &Path) -> Result<PrivateKeyDer<'static>, MaterialError> {
    Ok(PrivateKeyDer::from_pem_file(path)?)
}

pub(crate) fn key_in(text: &[u8]) -> Result<PrivateKeyDer<'static>, MaterialError> {
    Ok(PrivateKeyDer::from_pem_slice(text)?)
}

fn some(found: Vec<CertificateDer<'static>>) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    if found.is_empty() { Err(MaterialError::Empty) } else { Ok(found) }
}
