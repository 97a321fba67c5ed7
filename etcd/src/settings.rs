//! Where etcd is and how to be admitted.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("no etcd endpoint is given; name each member as https://HOST:PORT")]
    NoEndpoint,
    #[error("`{0}` is no etcd endpoint; write https://HOST:PORT")]
    Endpoint(String),
    #[error("{}: {detail}; PEM is needed", path.display())]
    Pem { path: PathBuf, detail: String },
    #[error("a client certificate and its key go together; give both or neither")]
    HalfCertificate,
    #[error("the password file {}: {source}", path.display())]
    Password { path: PathBuf, source: std::io::Error },
    #[error("a user and a password file go together; give both or neither")]
    HalfUser,
    #[error("TLS to etcd is not possible with this material: {0}")]
    Tls(#[from] rustls::Error),
    #[error(
        "https:// to etcd needs the authority that its certificates chain to: --etcd-ca FILE of meshd-pki, `ca` of a [[source]]"
    )]
    NoAuthority,
    #[error("http:// to etcd at {0}: it would carry what the mesh trusts in clear; use https://, or loopback")]
    Clear(String),
}

/// Read from files anew for each connection, so that renewed ones are used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// `https://HOST:PORT` of each member.
    pub endpoints: Vec<String>,
    /// What the members' certificates chain to.
    pub ca: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub user: Option<String>,
    pub password_file: Option<PathBuf>,
}

#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    pub(crate) tls: bool,
    pub(crate) host: String,
    /// `HOST:PORT`
    pub(crate) address: String,
}

impl Settings {
    pub fn check(&self) -> Result<(), SettingsError> {
        let is_tls = self.parsed()?.iter().any(|endpoint| endpoint.tls);
        if is_tls {
            self.tls()?;
        }
        self.credentials()?;
        if is_tls && self.ca.is_none() { Err(SettingsError::NoAuthority) } else { Ok(()) }
    }

    /// `HOST:PORT` of each member.
    pub fn addresses(&self) -> Result<Vec<String>, SettingsError> {
        Ok(self.parsed()?.into_iter().map(|endpoint| endpoint.address).collect())
    }

    pub(crate) fn parsed(&self) -> Result<Vec<Endpoint>, SettingsError> {
        if self.endpoints.is_empty() {
            return Err(SettingsError::NoEndpoint);
        }
        self.endpoints.iter().map(|text| endpoint(text)).collect()
    }

    pub(crate) fn tls(&self) -> Result<Arc<ClientConfig>, SettingsError> {
        let mut roots = RootCertStore::empty();
        if let Some(path) = &self.ca {
            for certificate in certificates(path)? {
                roots.add(certificate)?;
            }
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots);
        let mut config = match (&self.cert, &self.key) {
            (None, None) => builder.with_no_client_auth(),
            (Some(cert), Some(key)) => {
                let pem = |error: rustls::pki_types::pem::Error| SettingsError::Pem {
                    path: key.clone(),
                    detail: error.to_string(),
                };
                let private = PrivateKeyDer::from_pem_file(key).map_err(pem)?;
                builder.with_client_auth_cert(certificates(cert)?, private)?
            }
            _ => return Err(SettingsError::HalfCertificate),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    pub(crate) fn credentials(&self) -> Result<Option<(String, String)>, SettingsError> {
        match (&self.user, &self.password_file) {
            (None, None) => Ok(None),
            (Some(user), Some(path)) => {
                let read = std::fs::read_to_string(path);
                let password = read.map_err(|source| SettingsError::Password { path: path.clone(), source })?;
                Ok(Some((user.clone(), password.trim_end_matches(['\r', '\n']).to_owned())))
            }
            _ => Err(SettingsError::HalfUser),
        }
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, SettingsError> {
    let pem = |detail: String| SettingsError::Pem { path: path.to_owned(), detail };
    let found: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|error| pem(error.to_string()))?.collect();
    let found = found.map_err(|error| pem(error.to_string()))?;
    if found.is_empty() { Err(pem("no certificate in it".to_owned())) } else { Ok(found) }
}

fn endpoint(text: &str) -> Result<Endpoint, SettingsError> {
    let bad = || SettingsError::Endpoint(text.to_owned());
    let (scheme, address) = text.split_once("://").ok_or_else(bad)?;
    let address = address.trim_end_matches('/');
    let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
    if host.is_empty() || port.parse::<u16>().is_err() {
        return Err(bad());
    }
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let is_loopback = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    match scheme {
        "https" => Ok(Endpoint { tls: true, host, address: address.to_owned() }),
        "http" if is_loopback => Ok(Endpoint { tls: false, host, address: address.to_owned() }),
        "http" => Err(SettingsError::Clear(text.to_owned())),
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(endpoints: &[&str]) -> String {
        let endpoints = endpoints.iter().map(|text| (*text).to_owned()).collect();
        Settings { endpoints, ..Settings::default() }.check().unwrap_err().to_string()
    }

    #[test]
    fn endpoints_are_urls_and_clear_text_stays_on_this_machine() {
        assert!(error(&[]).contains("https://HOST:PORT"));
        assert!(error(&["etcd:2379"]).contains("`etcd:2379`"));
        assert!(error(&["https://etcd"]).contains("`https://etcd`"));
        assert!(error(&["http://10.0.0.1:2379"]).contains("in clear"));
        let endpoints = vec!["http://127.0.0.1:2379".to_owned(), "http://[::1]:2379/".to_owned()];
        let settings = Settings { endpoints, ..Settings::default() };
        settings.check().unwrap();
        assert_eq!(settings.parsed().unwrap()[1].address, "[::1]:2379");
    }

    #[test]
    fn halves_are_refused_and_files_are_named() {
        let base = Settings { endpoints: vec!["https://a:1".to_owned()], ..Settings::default() };
        let half = Settings { cert: Some("c".into()), ..base.clone() };
        assert!(matches!(half.check(), Err(SettingsError::HalfCertificate)));
        let half = Settings { user: Some("u".to_owned()), ..base.clone() };
        assert!(matches!(half.check(), Err(SettingsError::HalfUser)));
        assert!(matches!(base.check(), Err(SettingsError::NoAuthority)));
        let missing = Settings { ca: Some("/no/such.pem".into()), ..base };
        assert!(missing.check().unwrap_err().to_string().contains("/no/such.pem"));
    }
}
