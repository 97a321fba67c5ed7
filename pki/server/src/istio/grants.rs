//! `[istio]` in the file of --attestors: who may ask, and for what.

use meshd_identity::SYSTEM_NAMESPACE;
use rcgen::SanType;
use rustls::pki_types::ServerName;
use serde::Deserialize;

const AUDIENCE: &str = "istio-ca";
const ANY: &str = "*";

/// As the operator writes it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Section {
    /// Names of `[[kubernetes]]`.
    clusters: Vec<String>,
    #[serde(default = "audience")]
    audience: String,
    /// Whose service accounts have certificates here; `*` for every namespace but those of meshd.
    namespaces: Vec<String>,
    /// NAMESPACE/ACCOUNT of proxies that ask for the pods of their node.
    #[serde(default)]
    trusted_node_accounts: Vec<String>,
    /// Whether a certificate is enough to get the next one.
    #[serde(default)]
    renew_by_certificate: bool,
    /// What proxies call this PKI: DNS names and addresses.
    #[serde(default)]
    names: Vec<String>,
}

/// The same, checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Grants {
    pub(crate) clusters: Vec<String>,
    pub(crate) audience: String,
    pub(crate) names: Vec<SanType>,
    pub(crate) renew_by_certificate: bool,
    namespaces: Vec<String>,
    trusted_node_accounts: Vec<(String, String)>,
}

fn audience() -> String {
    AUDIENCE.to_owned()
}

impl Grants {
    pub(crate) fn read(section: &Section, clusters: &[&str]) -> Result<Grants, String> {
        if let Some(name) = section.clusters.iter().find(|name| !clusters.contains(&name.as_str())) {
            return Err(format!("clusters: `{name}` is the `name` of no [[kubernetes]]"));
        }
        let account = |text: &String| {
            let parts = text.split_once('/').filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty());
            let parts = parts.map(|(namespace, name)| (namespace.to_owned(), name.to_owned()));
            parts.ok_or_else(|| format!("trusted_node_accounts: `{text}` is not NAMESPACE/ACCOUNT"))
        };
        Ok(Grants {
            clusters: section.clusters.clone(),
            audience: section.audience.clone(),
            names: section.names.iter().map(|text| name(text)).collect::<Result<_, _>>()?,
            renew_by_certificate: section.renew_by_certificate,
            namespaces: section.namespaces.clone(),
            trusted_node_accounts: section.trusted_node_accounts.iter().map(account).collect::<Result<_, _>>()?,
        })
    }

    pub(super) fn has_namespace(&self, namespace: &str) -> bool {
        let is_it = |granted: &String| granted == ANY || granted == namespace;
        namespace != SYSTEM_NAMESPACE && self.namespaces.iter().any(is_it)
    }

    pub(super) fn trusts_node(&self, namespace: &str, account: &str) -> bool {
        self.trusted_node_accounts.iter().any(|(one, name)| one == namespace && name == account)
    }
}

fn name(text: &str) -> Result<SanType, String> {
    let bad = |why: &dyn std::fmt::Display| format!("names: `{text}` is neither a DNS name nor an address: {why}");
    match ServerName::try_from(text).map_err(|error| bad(&error))? {
        ServerName::IpAddress(address) => Ok(SanType::IpAddress(std::net::IpAddr::from(address))),
        _ => Ok(SanType::DnsName(text.try_into().map_err(|error: rcgen::Error| bad(&error))?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Grants, String> {
        Grants::read(&toml::from_str(text).map_err(|error: toml::de::Error| error.to_string())?, &["prod"])
    }

    #[test]
    fn what_it_says_is_checked_with_what_to_do() {
        let good = "clusters = [\"prod\"]\nnamespaces = [\"shop\"]\n";
        assert_eq!(read(good).unwrap().audience, "istio-ca");
        for (line, expected) in [
            ("trusted_node_accounts = [\"ztunnel\"]", "not NAMESPACE/ACCOUNT"),
            ("names = [\"pki example\"]", "neither a DNS name"),
            ("accounts = []", "unknown field"),
        ] {
            let error = read(&format!("{good}{line}")).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        assert!(read("clusters = [\"test\"]\nnamespaces = []").unwrap_err().contains("no [[kubernetes]]"));
        assert!(read("clusters = [\"prod\"]").unwrap_err().contains("namespaces"));
    }
}
