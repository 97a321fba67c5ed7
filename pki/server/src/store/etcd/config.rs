//! `etcd.toml` in a state directory: that its records are in etcd, and how to get there. Every command finds it, so that
//! none needs to be told.

use std::fs;
use std::path::{Path, PathBuf};

use meshd_etcd::Settings;
use meshd_identity::TrustDomain;
use serde::{Deserialize, Serialize};

use crate::keys::replace_private;
use crate::store::DbError;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EtcdConfig {
    /// The name of this server among the replicas; drawn once.
    pub replica: String,
    pub trust_domain: String,
    /// https://HOST:PORT of each member.
    pub endpoints: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cert: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// How long after its last sign of life another replica leads.
    #[serde(default = "default_lease")]
    pub lease_s: i64,
}

/// Longer than an election of etcd's own, shorter than anything here waits for.
pub(crate) fn default_lease() -> i64 {
    15
}

impl EtcdConfig {
    pub(crate) fn path(dir: &Path) -> PathBuf {
        dir.join("etcd.toml")
    }

    /// `None` where the records are in a file.
    pub(crate) fn read(dir: &Path) -> Result<Option<EtcdConfig>, DbError> {
        let path = EtcdConfig::path(dir);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|source| DbError::Config { path: path.clone(), detail: source.to_string() })?,
        };
        let parsed = toml::from_str(&text);
        parsed.map(Some).map_err(|error| DbError::Config { path, detail: error.to_string() })
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<(), DbError> {
        let path = EtcdConfig::path(dir);
        let failed = |detail: String| DbError::Config { path: path.clone(), detail };
        let text = toml::to_string(self).map_err(|error| failed(error.to_string()))?;
        replace_private(&path, text.as_bytes()).map_err(|error| failed(error.to_string()))
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            endpoints: self.endpoints.clone(),
            ca: self.ca.clone(),
            cert: self.cert.clone(),
            key: self.key.clone(),
            user: self.user.clone(),
            password_file: self.password_file.clone(),
        }
    }

    /// Below which all keys of this PKI are.
    pub(crate) fn base(&self) -> Result<String, DbError> {
        let domain: Result<TrustDomain, _> = self.trust_domain.parse();
        let domain = domain.map_err(|error| DbError::Config {
            path: PathBuf::from("etcd.toml"),
            detail: format!("trust_domain: {error}"),
        })?;
        Ok(format!("/meshd/pki/{domain}/"))
    }
}
