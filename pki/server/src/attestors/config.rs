//! The file that says by what else than tokens hosts come in, as the operator writes it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ipnet::IpNet;
use meshd_identity::{SpiffeId, TrustDomain};
use serde::Deserialize;

use super::template::Template;
use crate::istio::grants::Section;
use crate::labels::Label;

const KUBERNETES_AUDIENCE: &str = "meshd-pki";

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    #[serde(default)]
    pub(super) x509pop: Vec<X509pop>,
    #[serde(default)]
    pub(super) kubernetes: Vec<Kubernetes>,
    pub(super) istio: Option<Section>,
}

/// `[[x509pop]]`: machines with a certificate of this authority.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct X509pop {
    pub(super) name: String,
    /// PEM; read again and again.
    pub(super) ca_file: PathBuf,
    pub(super) host: String,
    #[serde(default)]
    pub(super) allow: Vec<String>,
    #[serde(default)]
    pub(super) labels: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) from: Vec<IpNet>,
}

/// `[[kubernetes]]`: pods of this cluster.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kubernetes {
    pub(super) name: String,
    pub(super) issuer: String,
    #[serde(default = "audience")]
    pub(super) audience: String,
    /// The cluster's keys (`kubectl get --raw /openid/v1/jwks`); read again and again.
    pub(super) jwks_file: Option<PathBuf>,
    /// Or where to ask for them.
    pub(super) jwks_url: Option<String>,
    /// The authority of that server, PEM.
    pub(super) ca_file: Option<PathBuf>,
    /// What to show it, if it wants to know who asks.
    pub(super) bearer_file: Option<PathBuf>,
    #[serde(default)]
    pub(super) service_account: Vec<ServiceAccount>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServiceAccount {
    pub(super) namespace: String,
    #[serde(rename = "account")]
    pub(super) name: String,
    pub(super) host: String,
    #[serde(default)]
    pub(super) allow: Vec<String>,
    #[serde(default)]
    pub(super) labels: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) from: Vec<IpNet>,
}

/// What whoever has proved itself becomes.
#[derive(Debug, Clone)]
pub(super) struct Becomes {
    pub(super) host: Template,
    pub(super) allow: Vec<String>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) from: Vec<IpNet>,
}

fn audience() -> String {
    KUBERNETES_AUDIENCE.to_owned()
}

impl X509pop {
    pub(super) fn becomes(&self, domain: &TrustDomain, names: &[&'static str]) -> Result<Becomes, String> {
        let X509pop { host, allow, labels, from, .. } = self;
        Becomes::checked(host, allow, labels, from, (domain, names))
    }
}

impl ServiceAccount {
    pub(super) fn becomes(&self, domain: &TrustDomain, names: &[&'static str]) -> Result<Becomes, String> {
        let ServiceAccount { host, allow, labels, from, .. } = self;
        Becomes::checked(host, allow, labels, from, (domain, names))
    }
}

impl Becomes {
    fn checked(
        host: &str,
        allow: &[String],
        labels: &BTreeMap<String, String>,
        from: &[IpNet],
        (domain, names): (&TrustDomain, &[&'static str]),
    ) -> Result<Becomes, String> {
        let identity = |text: &String| {
            let id = SpiffeId::parse_in(domain, text).map_err(|error| error.to_string())?;
            let is_ours = id.trust_domain() == domain && !id.is_system();
            is_ours.then(|| id.to_string()).ok_or_else(|| format!("allow: {id} is no workload of `{domain}`"))
        };
        for (key, value) in labels {
            format!("{key}={value}").parse::<Label>().map_err(|error| error.to_string())?;
        }
        Ok(Becomes {
            host: Template::parse(host, names)?,
            allow: allow.iter().map(identity).collect::<Result<_, _>>()?,
            labels: labels.clone(),
            from: from.to_vec(),
        })
    }
}
