//! Where Consul is and how to be admitted. Files are read anew for each use, so that renewed ones count.

use std::hash::BuildHasher;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper::header::HeaderValue;
use rustls::ClientConfig;

use crate::tls::{self, MaterialError};

/// Where a Consul agent listens unless told otherwise.
const DEFAULT_ADDRESS: &str = "http://127.0.0.1:8500";

#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("address: `{0}` is no address of Consul; write https://HOST:PORT, or http:// to loopback")]
    Address(String),
    #[error("address: http:// to Consul at {0} would carry its token in clear; use https://, or an agent on loopback")]
    Clear(String),
    #[error("ca: https:// to Consul needs the authority that its certificates chain to; give its PEM file")]
    NoAuthority,
    #[error("cert, key: a client certificate and its key go together; give both or neither")]
    HalfCertificate,
    #[error("{field}: {}: {detail}", path.display())]
    Pem { field: &'static str, path: PathBuf, detail: String },
    #[error("ca, cert, key: TLS to Consul is not possible with this material: {0}")]
    Tls(#[from] rustls::Error),
    #[error("token_file: {}: {detail}; it holds the SecretID of a token, alone", path.display())]
    Token { path: PathBuf, detail: String },
    #[error("prefix: `{0}` is no path of Consul's store; write words of a-z, A-Z, 0-9, `-`, `_` and `.` between `/`")]
    Prefix(String),
    #[error("namespace: {0}")]
    Namespace(String),
}

#[derive(Debug, Clone, Default)]
pub struct Settings {
    pub address: Option<String>,
    pub ca: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub token_file: Option<PathBuf>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) tls: bool,
    pub(super) host: String,
    /// `HOST:PORT`
    pub(super) authority: String,
}

impl Settings {
    /// A mistake in them, or in the files they name.
    pub(super) fn check(&self) -> Result<(), SettingsError> {
        if self.parsed()?.tls {
            self.tls()?;
        }
        self.token()?;
        Ok(())
    }

    pub(super) fn parsed(&self) -> Result<Address, SettingsError> {
        let text = self.address.as_deref().unwrap_or(DEFAULT_ADDRESS);
        let bad = || SettingsError::Address(text.to_owned());
        let (scheme, authority) = text.split_once("://").ok_or_else(bad)?;
        let authority = authority.trim_end_matches('/');
        let (host, port) = authority.rsplit_once(':').ok_or_else(bad)?;
        let plain = authority.chars().all(|c| c.is_ascii_alphanumeric() || "-_.:[]".contains(c));
        if host.is_empty() || !plain || port.parse::<u16>().is_err() {
            return Err(bad());
        }
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let is_loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        let tls = match scheme {
            "https" => true,
            "http" if is_loopback => false,
            "http" => return Err(SettingsError::Clear(text.to_owned())),
            _ => return Err(bad()),
        };
        Ok(Address { tls, host, authority: authority.to_owned() })
    }

    /// Of what it takes for TLS.
    pub(super) fn hash_of_files(&self, hashing: &impl BuildHasher) -> u64 {
        let files = [&self.ca, &self.cert, &self.key].map(|path| std::fs::read(path.as_ref()?).ok());
        hashing.hash_one(files)
    }

    pub(super) fn tls(&self) -> Result<Arc<ClientConfig>, SettingsError> {
        let read = |field, path: &Path| tls::certificates_of(path).map_err(|error| pem(field, path, &error));
        let roots = read("ca", self.ca.as_deref().ok_or(SettingsError::NoAuthority)?)?;
        let identity = match (&self.cert, &self.key) {
            (None, None) => None,
            (Some(cert), Some(key)) => {
                let private = tls::key_of(key).map_err(|error| pem("key", key, &error))?;
                Some((read("cert", cert)?, private))
            }
            _ => return Err(SettingsError::HalfCertificate),
        };
        Ok(tls::client(roots, identity, &[b"h2".as_slice(), b"http/1.1"])?)
    }

    /// What to show; `None`: nothing, so that the agent shows its own.
    pub(super) fn token(&self) -> Result<Option<HeaderValue>, SettingsError> {
        let Some(path) = &self.token_file else { return Ok(None) };
        let bad = |detail: String| SettingsError::Token { path: path.clone(), detail };
        let text = std::fs::read_to_string(path).map_err(|error| bad(error.to_string()))?;
        let mut token = match text.trim() {
            "" => return Err(bad("is empty".to_owned())),
            token => HeaderValue::from_str(token).map_err(|_| bad("is no token".to_owned()))?,
        };
        token.set_sensitive(true);
        Ok(Some(token))
    }
}

fn pem(field: &'static str, path: &Path, detail: &MaterialError) -> SettingsError {
    SettingsError::Pem { field, path: path.to_owned(), detail: detail.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: &str) -> Settings {
        Settings { address: Some(address.to_owned()), ..Settings::default() }
    }

    #[test]
    fn the_local_agent_is_asked_unless_told_and_clear_text_stays_on_this_machine() {
        let parsed = Settings::default().parsed().unwrap();
        assert_eq!(parsed, Address { tls: false, host: "127.0.0.1".into(), authority: "127.0.0.1:8500".into() });
        let parsed = at("https://[2001:db8::1]:8501/").parsed().unwrap();
        assert_eq!((parsed.tls, &*parsed.host, &*parsed.authority), (true, "2001:db8::1", "[2001:db8::1]:8501"));
        assert!(at("http://10.0.0.1:8500").check().unwrap_err().to_string().contains("in clear"));
        for bad in ["consul:8500", "https://consul", "unix:///run/consul.sock", "https://a b:1", "https://a/x:1"] {
            assert!(matches!(at(bad).check(), Err(SettingsError::Address(_))), "{bad}");
        }
    }

    #[test]
    fn mistakes_in_files_name_the_field_and_the_file() {
        let base = at("https://consul:8501");
        assert!(matches!(base.check(), Err(SettingsError::NoAuthority)));
        let missing = Settings { ca: Some("/no/such.pem".into()), ..base };
        assert!(missing.check().unwrap_err().to_string().starts_with("ca: /no/such.pem: "));
        let missing = Settings { token_file: Some("/no/such".into()), ..Settings::default() };
        assert!(missing.check().unwrap_err().to_string().starts_with("token_file: /no/such: "));
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("token");
        let with = Settings { token_file: Some(file.clone()), ..Settings::default() };
        for (text, problem) in [(" \n", "is empty"), ("a\nb", "is no token")] {
            std::fs::write(&file, text).unwrap();
            assert!(with.check().unwrap_err().to_string().contains(problem), "{text}");
        }
        std::fs::write(&file, "secret\n").unwrap();
        assert_eq!(with.token().unwrap().unwrap(), "secret");
    }
}
