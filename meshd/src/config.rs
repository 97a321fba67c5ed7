//! `meshd.toml`: composed of each subsystem's own Config; unknown keys are refused with line and suggestion.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use meshd_discovery::{HostConfig, Imports, SourceConfig};
use meshd_identity::TrustDomain;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::capture::CaptureConfig;
use crate::dns::DnsConfig;
use crate::enrol::Reserved;
use crate::proxy::ProxyConfig;
use crate::telemetry::MetricsConfig;
use crate::workload_api::WorkloadApiConfig;

/// The whole file. Every section has defaults, so an empty file is a valid one.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Identity, virtual IPs and other state that survives a reboot.
    pub state_dir: PathBuf,
    /// The sockets of the admin and the Workload API; gone after a reboot.
    pub run_dir: PathBuf,
    /// Which units of this host are which workloads.
    pub enrol_dir: PathBuf,
    pub proxy: ProxyConfig,
    pub capture: CaptureConfig,
    pub dns: DnsConfig,
    pub metrics: MetricsConfig,
    pub workload_api: WorkloadApiConfig,
    /// What is registered of this host.
    pub host: HostConfig,
    /// Which services this host uses: what sources on other machines are asked for.
    pub imports: Imports,
    #[serde(rename = "source")]
    pub sources: Vec<SourceConfig>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            state_dir: "/var/lib/meshd".into(),
            run_dir: "/run/meshd".into(),
            enrol_dir: "/etc/meshd/enrol.d".into(),
            proxy: ProxyConfig::default(),
            capture: CaptureConfig::default(),
            dns: DnsConfig::default(),
            metrics: MetricsConfig::default(),
            workload_api: WorkloadApiConfig::default(),
            host: HostConfig::default(),
            imports: Imports::default(),
            sources: vec![SourceConfig::default()],
        }
    }
}

impl Config {
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let config: Config = read_toml(path)?;
        match config.capture.problem().or_else(|| config.dns.problem()).or_else(|| config.host.problem()) {
            None => Ok(config),
            Some((field, reason)) => {
                Err(ConfigError::Value { path: path.into(), field: field.into(), reason: reason.into() })
            }
        }
    }

    /// Addresses a peer must never be connected to through us.
    pub fn reserved(&self) -> Reserved {
        let capture = SocketAddr::from((Ipv4Addr::LOCALHOST, self.proxy.capture_port));
        let others = [capture, self.metrics.listen, self.dns.listen];
        Reserved {
            listeners: self.proxy.mesh_listen.iter().copied().chain(others).collect(),
            virtual_ips: vec![self.capture.vip4.into(), self.capture.vip6.into()],
        }
    }

    pub fn identity_dir(&self) -> PathBuf {
        self.state_dir.join("identity")
    }

    pub fn admin_socket(&self) -> PathBuf {
        self.run_dir.join("admin.sock")
    }

    pub fn api_socket(&self) -> PathBuf {
        self.run_dir.join("api.sock")
    }
}

/// What is wrong with a configuration file: where, what, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path}: {source}; create it, or name another file with --config")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}:{line}: {reason}")]
    Parse { path: PathBuf, line: usize, reason: String },
    #[error("{path}: {field}: {reason}")]
    Value { path: PathBuf, field: String, reason: String },
}

/// Reads one TOML file; the error names file, line and the nearest known key.
pub fn read_toml<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
    parse_toml(path, &text)
}

/// The line of a byte of `text`, counted from 1.
pub fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// The same for the text of a file, read already.
pub fn parse_toml<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(1, |span| line_of(text, span.start));
        ConfigError::Parse { path: path.into(), line, reason: explain(error.message()) }
    })
}

/// serde names all valid keys; an operator at 3 a.m. wants the one that was meant.
fn explain(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    if !message.starts_with("unknown") {
        return message.to_owned();
    }
    let Some(given) = quoted.next() else { return message.to_owned() };
    let nearest = quoted.min_by_key(|known| strsim::damerau_levenshtein(given, known));
    match nearest {
        Some(known) if strsim::normalized_damerau_levenshtein(given, known) > 0.5 => {
            format!("{message}; did you mean `{known}`?")
        }
        _ => message.to_owned(),
    }
}

/// An identity in a host file: `ns/shop/sa/web`, in the host's own trust domain.
pub fn identity_in(
    trust_domain: &TrustDomain,
    text: &str,
    path: &Path,
    field: &str,
) -> Result<meshd_identity::SpiffeId, ConfigError> {
    meshd_identity::SpiffeId::parse_in(trust_domain, text).map_err(|error| ConfigError::Value {
        path: path.into(),
        field: field.into(),
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        parse_toml::<Config>(Path::new("meshd.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn an_empty_file_is_the_defaults() {
        let config: Config = parse_toml(Path::new("meshd.toml"), "").unwrap();
        assert_eq!(config.state_dir, Path::new("/var/lib/meshd"));
        assert_eq!(config.sources.len(), 1);
    }

    #[test]
    fn an_unknown_key_is_refused_with_line_and_suggestion() {
        let message = refused("state_dir = \"/x\"\n\n[proxy]\nthread = 2\n");
        assert!(message.starts_with("meshd.toml:4: unknown field `thread`"), "{message}");
        assert!(message.ends_with("did you mean `threads`?"), "{message}");
    }

    #[test]
    fn a_wrong_type_names_the_line() {
        let message = refused("[proxy]\nthreads = \"two\"\n");
        assert!(message.starts_with("meshd.toml:2: invalid type: string \"two\""), "{message}");
    }

    #[test]
    fn the_hosts_own_routing_tables_are_no_place_for_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meshd.toml");
        for (text, field) in [
            ("[capture]\ntable = 254\n", "capture.table"),
            ("[capture]\nmark = 0\n", "capture.mark"),
            ("[capture]\nmark = 1\n", "capture.mark"),
        ] {
            std::fs::write(&path, text).unwrap();
            let message = Config::load(&path).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
    }

    #[test]
    fn an_unknown_source_kind_lists_the_known_ones() {
        let message = refused("[[source]]\nkind = \"zookeeper\"\n");
        assert!(message.contains("meshd.toml:2") && message.contains("files"), "{message}");
    }
}
