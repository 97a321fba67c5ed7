//! `[[source]]` of meshd.toml.

use std::path::PathBuf;
use std::sync::Arc;

use meshd_etcd::Settings;
use meshd_identity::TrustDomain;
use serde::Deserialize;

use crate::consul;
use crate::etcd::DEFAULT_ENDPOINT;
use crate::name::{NameError, check_label};
use crate::register::Registrar;
use crate::resources::{Kind, base_for};
use crate::write::{FilesStore, Replace, Store};
use crate::{
    Belief, ConsulSource, EtcdSource, FilesSource, KubernetesSettings, KubernetesSource, ServiceName, Source, Wanted,
};

/// One `[[source]]`; their order in meshd.toml is their precedence, first wins.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    pub kind: SourceKind,
    /// The kind, unless told otherwise.
    pub name: Option<String>,
    /// For `kind = "files"`: the directory with the YAML documents.
    pub dir: Option<PathBuf>,
    /// For `kind = "etcd"`: `https://HOST:PORT` of each member.
    #[serde(default)]
    pub endpoints: Vec<String>,
    /// What the members' certificates chain to, and how to be admitted: a client certificate, or a user.
    pub ca: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub user: Option<String>,
    pub password_file: Option<PathBuf>,
    /// Below which the keys lie.
    pub prefix: Option<String>,
    /// Whether this host writes there what its units serve.
    #[serde(default)]
    pub register: bool,
    /// For `kind = "consul"`: `https://HOST:PORT` of an agent, the file with the token to show it, and the namespace of
    /// instances that do not say theirs. For `kind = "kubernetes"`: the namespace of the Leases of hosts that register.
    pub address: Option<String>,
    pub token_file: Option<PathBuf>,
    pub namespace: Option<String>,
    /// For `kind = "kubernetes"`: where the API server is and who we are there; in a pod, its own if left out.
    pub kubeconfig: Option<PathBuf>,
    /// Which context of it; its own choice if left out.
    pub context: Option<String>,
    /// Namespaces whose `MeshService` documents are believed when they come from this source. None by default.
    #[serde(default)]
    pub authority: Namespaces,
    #[serde(default)]
    pub provides: Provides,
}

/// What else a source is believed about, by kind.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provides {
    /// Namespaces for whose services it may say where they run. All by default: who may serve is not up to it.
    #[serde(default = "Namespaces::everything")]
    pub endpoints: Namespaces,
    /// Namespaces whose routes are believed. None by default: who routes a service sees what is sent to it.
    #[serde(default)]
    pub routes: Namespaces,
    /// Namespaces whose policies are believed. None by default. Policies for everybody are of namespace meshd-system.
    #[serde(default)]
    pub policies: Namespaces,
}

impl Provides {
    /// Whether it is worth reading them there.
    pub(crate) fn has_resources(&self) -> bool {
        self.routes != Namespaces::default() || self.policies != Namespaces::default()
    }

    /// Those that may be believed of somebody.
    pub(crate) fn kinds(&self) -> Vec<Kind> {
        let grants = |kind: &Kind| if kind.is_route() { &self.routes } else { &self.policies };
        let is_ours = |kind: &Kind| *kind != Kind::MeshService && *grants(kind) != Namespaces::default();
        Kind::ALL.into_iter().filter(is_ours).collect()
    }

    /// Whether a document of that kind and namespace, neither a MeshService, may be believed.
    pub(crate) fn covers(&self, kind: Kind, namespace: &str) -> bool {
        let granted = if kind.is_route() { &self.routes } else { &self.policies };
        granted.covers(namespace)
    }

    pub fn everything() -> Provides {
        let all = Namespaces::everything;
        Provides { endpoints: all(), routes: all(), policies: all() }
    }
}

impl Default for Provides {
    fn default() -> Provides {
        Provides { endpoints: Namespaces::everything(), routes: Namespaces::default(), policies: Namespaces::default() }
    }
}

/// The source of a meshd.toml that names none: root's own files, which may say everything.
impl Default for SourceConfig {
    fn default() -> SourceConfig {
        let (authority, provides) = (Namespaces::everything(), Provides::everything());
        SourceConfig { authority, provides, ..SourceConfig::of(SourceKind::Files) }
    }
}

const RESOURCES_D: &str = "/etc/meshd/resources.d";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    Files,
    Etcd,
    Consul,
    Kubernetes,
}

impl SourceKind {
    fn name(self) -> &'static str {
        match self {
            SourceKind::Files => "files",
            SourceKind::Etcd => "etcd",
            SourceKind::Consul => "consul",
            SourceKind::Kubernetes => "kubernetes",
        }
    }

    /// The keys of `[[source]]` that mean something for this kind, besides those of every kind.
    fn keys(self) -> &'static [&'static str] {
        match self {
            SourceKind::Files => &["dir"],
            SourceKind::Etcd => &["endpoints", "ca", "cert", "key", "user", "password_file", "prefix", "register"],
            SourceKind::Consul => &["address", "ca", "cert", "key", "token_file", "namespace", "prefix", "register"],
            SourceKind::Kubernetes => &["kubeconfig", "context", "namespace", "register"],
        }
    }
}

/// A source and what it is trusted with.
pub struct Configured {
    pub source: Box<dyn Source>,
    pub authority: Namespaces,
    pub provides: Provides,
    pub belief: Belief,
    /// Where it is told to register, too.
    pub registrar: Option<Arc<dyn Registrar>>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("[[source]] name: {0}")]
    Name(NameError),
    #[error("[[source]] name: `{0}` is used twice; give every source its own name")]
    Duplicate(String),
    #[error("[[source]] `{name}`: `{key}` has no meaning with kind = \"{kind}\", which takes {known}; remove it")]
    Foreign { name: String, key: &'static str, kind: &'static str, known: String },
    #[error("[[source]] `{name}`: {reason}")]
    Etcd { name: String, reason: String },
    #[error("[[source]] `{name}`: {reason}")]
    Consul { name: String, reason: String },
    #[error("[[source]] `{name}`: {reason}")]
    Kubernetes { name: String, reason: String },
}

impl SourceConfig {
    fn of(kind: SourceKind) -> SourceConfig {
        SourceConfig {
            kind,
            name: None,
            dir: None,
            endpoints: Vec::new(),
            ca: None,
            cert: None,
            key: None,
            user: None,
            password_file: None,
            prefix: None,
            register: false,
            address: None,
            token_file: None,
            namespace: None,
            kubeconfig: None,
            context: None,
            authority: Namespaces::default(),
            provides: Provides::default(),
        }
    }

    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(self.kind.name())
    }

    /// The keys that are given.
    fn given(&self) -> impl Iterator<Item = &'static str> {
        let all = [
            ("dir", self.dir.is_some()),
            ("endpoints", !self.endpoints.is_empty()),
            ("ca", self.ca.is_some()),
            ("cert", self.cert.is_some()),
            ("key", self.key.is_some()),
            ("user", self.user.is_some()),
            ("password_file", self.password_file.is_some()),
            ("prefix", self.prefix.is_some()),
            ("register", self.register),
            ("address", self.address.is_some()),
            ("token_file", self.token_file.is_some()),
            ("namespace", self.namespace.is_some()),
            ("kubeconfig", self.kubeconfig.is_some()),
            ("context", self.context.is_some()),
        ];
        all.into_iter().filter(|(_, given)| *given).map(|(key, _)| key)
    }

    fn etcd(&self) -> Settings {
        Settings {
            endpoints: match self.endpoints.as_slice() {
                [] => vec![DEFAULT_ENDPOINT.to_owned()],
                some => some.to_vec(),
            },
            ca: self.ca.clone(),
            cert: self.cert.clone(),
            key: self.key.clone(),
            user: self.user.clone(),
            password_file: self.password_file.clone(),
        }
    }

    fn consul(&self) -> consul::Settings {
        consul::Settings {
            address: self.address.clone(),
            ca: self.ca.clone(),
            cert: self.cert.clone(),
            key: self.key.clone(),
            token_file: self.token_file.clone(),
        }
    }

    /// A key that means nothing for the kind, or a name that is none.
    fn check(&self) -> Result<(), ConfigError> {
        let (name, kind) = (self.name(), self.kind);
        check_label("name", name).map_err(ConfigError::Name)?;
        if let Some(key) = self.given().find(|key| !kind.keys().contains(key)) {
            let known = kind.keys().join(", ");
            return Err(ConfigError::Foreign { name: name.to_owned(), key, kind: kind.name(), known });
        }
        Ok(())
    }

    fn dir(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| RESOURCES_D.into())
    }

    fn etcd_source(&self, trust_domain: &TrustDomain) -> Result<EtcdSource, ConfigError> {
        let (prefix, provides) = (self.prefix.as_deref(), self.provides.clone());
        let source = EtcdSource::new(self.name(), self.etcd(), prefix, provides, trust_domain.clone());
        source.map_err(|error| ConfigError::Etcd { name: self.name().to_owned(), reason: error.to_string() })
    }

    fn consul_source(&self, trust_domain: &TrustDomain) -> Result<ConsulSource, ConfigError> {
        let (namespace, prefix) = (self.namespace.as_deref(), self.prefix.as_deref());
        let provides = self.provides.clone();
        let source = ConsulSource::new(self.name(), self.consul(), namespace, prefix, provides, trust_domain.clone());
        source.map_err(|error| ConfigError::Consul { name: self.name().to_owned(), reason: error.to_string() })
    }

    fn kubernetes_source(&self, trust_domain: &TrustDomain) -> Result<KubernetesSource, ConfigError> {
        let settings = KubernetesSettings { kubeconfig: self.kubeconfig.clone(), context: self.context.clone() };
        let (authority, provides) = (self.authority.clone(), self.provides.clone());
        let namespace = self.namespace.as_deref();
        let source = KubernetesSource::new(self.name(), settings, namespace, authority, provides, trust_domain.clone());
        source.map_err(|reason| ConfigError::Kubernetes { name: self.name().to_owned(), reason })
    }

    /// The backend, for whoever reads and writes its documents.
    pub fn store(&self, trust_domain: &TrustDomain, replace: Replace) -> Result<Box<dyn Store>, ConfigError> {
        self.check()?;
        let resources = base_for(self.prefix.as_deref());
        Ok(match self.kind {
            SourceKind::Files => Box::new(FilesStore::new(self.name(), self.dir(), replace)),
            SourceKind::Etcd => Box::new(self.etcd_source(trust_domain)?.store(&resources)),
            SourceKind::Consul => Box::new(self.consul_source(trust_domain)?.store(&resources)),
            SourceKind::Kubernetes => Box::new(self.kubernetes_source(trust_domain)?.store()),
        })
    }

    pub fn open(&self, trust_domain: &TrustDomain) -> Result<Configured, ConfigError> {
        self.check()?;
        let mut registrar: Option<Arc<dyn Registrar>> = None;
        let (source, belief): (Box<dyn Source>, Belief) = match self.kind {
            SourceKind::Files => {
                (Box::new(FilesSource::new(self.name(), self.dir(), trust_domain.clone())), Belief::Always)
            }
            SourceKind::Etcd => {
                let source = self.etcd_source(trust_domain)?;
                registrar = self.register.then(|| Arc::new(source.registrar()) as Arc<dyn Registrar>);
                (Box::new(source), Belief::Guarded)
            }
            SourceKind::Consul => {
                let source = self.consul_source(trust_domain)?;
                registrar = self.register.then(|| Arc::new(source.registrar()) as Arc<dyn Registrar>);
                (Box::new(source), Belief::Guarded)
            }
            SourceKind::Kubernetes => {
                let source = self.kubernetes_source(trust_domain)?;
                registrar = self.register.then(|| Arc::new(source.registrar()) as Arc<dyn Registrar>);
                (Box::new(source), Belief::Guarded)
            }
        };
        Ok(Configured { source, authority: self.authority.clone(), provides: self.provides.clone(), belief, registrar })
    }

    /// Whether documents of a kind and namespace are believed that come from it.
    pub fn is_believed_about(&self, kind: Kind, namespace: &str) -> bool {
        let granted = match kind {
            Kind::MeshService => &self.authority,
            kind if kind.is_route() => &self.provides.routes,
            _ => &self.provides.policies,
        };
        granted.covers(namespace)
    }

    /// Opens all of them; two may not share a name, because messages and metrics name the source.
    pub fn open_all(configs: &[SourceConfig], trust_domain: &TrustDomain) -> Result<Vec<Configured>, ConfigError> {
        for (index, config) in configs.iter().enumerate() {
            if configs[..index].iter().any(|earlier| earlier.name() == config.name()) {
                return Err(ConfigError::Duplicate(config.name().to_owned()));
            }
        }
        configs.iter().map(|config| config.open(trust_domain)).collect()
    }
}

/// `imports` of meshd.toml: which services this host uses. `payments.shop`, `*.shop` for a namespace, `*` for all; left out:
/// what is looked up here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "Vec<String>")]
pub struct Imports(Option<Wanted>);

impl Imports {
    pub fn declared(&self) -> Option<&Wanted> {
        self.0.as_ref()
    }
}

impl TryFrom<Vec<String>> for Imports {
    type Error = String;

    fn try_from(patterns: Vec<String>) -> Result<Imports, String> {
        let mut wanted = Wanted::default();
        for pattern in patterns {
            if pattern == "*" {
                wanted.everything = true;
            } else if let Some(namespace) = pattern.strip_prefix("*.") {
                check_label("namespace", namespace).map_err(|error| format!("imports: `{pattern}`: {error}"))?;
                wanted.namespaces.insert(namespace.to_owned());
            } else {
                let service: ServiceName = pattern.parse().map_err(|error| {
                    format!("imports: {error}; or write `*.shop` for a namespace, `*` for everything")
                })?;
                wanted.services.insert(service);
            }
        }
        Ok(Imports(Some(wanted)))
    }
}

/// The namespaces for which a source may say what a service is: names, or `*` for all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "Vec<String>")]
pub struct Namespaces {
    all: bool,
    namespaces: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("authority: {0}; list namespaces, or \"*\" for all of them")]
pub struct NamespacesError(#[from] NameError);

impl Namespaces {
    pub fn new<T: Into<String>>(patterns: impl IntoIterator<Item = T>) -> Result<Namespaces, NamespacesError> {
        let mut authority = Namespaces::default();
        for pattern in patterns {
            let pattern = pattern.into();
            if pattern == "*" {
                authority.all = true;
            } else {
                check_label("namespace", &pattern)?;
                authority.namespaces.push(pattern);
            }
        }
        Ok(authority)
    }

    pub fn everything() -> Namespaces {
        Namespaces { all: true, namespaces: Vec::new() }
    }

    pub fn covers(&self, namespace: &str) -> bool {
        self.all || self.namespaces.iter().any(|granted| granted == namespace)
    }
}

impl TryFrom<Vec<String>> for Namespaces {
    type Error = NamespacesError;

    fn try_from(patterns: Vec<String>) -> Result<Namespaces, NamespacesError> {
        Namespaces::new(patterns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<SourceConfig, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_source_is_trusted_with_nothing_unless_told_but_the_one_nobody_configured_with_everything() {
        assert!(SourceConfig::default().authority.covers("shop"));
        let config = parse("kind = \"files\"\nname = \"files\"\ndir = \"/etc/meshd/resources.d\"").unwrap();
        assert!(!config.authority.covers("shop"));
        let config = parse("kind = \"files\"\nname = \"files\"\nauthority = [\"shop\"]").unwrap();
        assert!(config.authority.covers("shop") && !config.authority.covers("billing"));
        assert!(parse("kind = \"files\"\nname = \"f\"\nauthority = [\"*\"]").unwrap().authority.covers("any"));
    }

    #[test]
    fn wrong_keys_kinds_and_namespaces_are_refused() {
        for (text, expected) in [
            ("kind = \"file\"\nname = \"f\"", "unknown variant `file`"),
            ("kind = \"files\"\nname = \"f\"\ndirectory = \"/x\"", "unknown field `directory`"),
            ("kind = \"files\"\nname = \"f\"\nauthority = [\"Shop\"]", "list namespaces, or \"*\""),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_line_makes_a_source_and_keys_of_another_kind_are_refused() {
        let td: TrustDomain = "example.org".parse().unwrap();
        let etcd = parse("kind = \"etcd\"").unwrap();
        let opened = etcd.open(&td).unwrap();
        assert_eq!((opened.source.name(), opened.source.kind(), opened.belief), ("etcd", "etcd", Belief::Guarded));
        assert!(
            opened.registrar.is_none()
                && SourceConfig { register: true, ..etcd }.open(&td).unwrap().registrar.is_some()
        );
        let consul = parse("kind = \"consul\"").unwrap().open(&td).unwrap();
        assert_eq!((consul.source.name(), consul.source.kind(), consul.belief), ("consul", "consul", Belief::Guarded));
        for (text, expected) in [
            ("kind = \"consul\"\nendpoints = [\"x\"]", "`endpoints` has no meaning with kind = \"consul\""),
            (
                "kind = \"consul\"\naddress = \"http://192.0.2.1:8500\"",
                "[[source]] `consul`: address: http:// to Consul",
            ),
            ("kind = \"consul\"\nnamespace = \"Shop\"", "[[source]] `consul`: namespace: the namespace `Shop`"),
            ("kind = \"consul\"\nprefix = \"a b\"", "[[source]] `consul`: prefix: `a b`"),
            ("kind = \"etcd\"\ndir = \"/x\"", "`dir` has no meaning with kind = \"etcd\", which takes endpoints, ca"),
            ("kind = \"files\"\nuser = \"x\"", "`user` has no meaning with kind = \"files\", which takes dir"),
            ("kind = \"files\"\nregister = true", "`register` has no meaning with kind = \"files\""),
            ("kind = \"kubernetes\"\ncontext = \"prod\"", "add `kubeconfig`"),
            ("kind = \"kubernetes\"\nkubeconfig = \"/no/such\"", "`kubernetes`: /no/such: "),
            ("kind = \"kubernetes\"\ndir = \"/x\"", "which takes kubeconfig, context"),
            ("kind = \"etcd\"\nendpoints = [\"http://192.0.2.1:2379\"]", "http:// to etcd"),
        ] {
            let error = parse(text).unwrap().open(&td).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn imports_are_services_namespaces_or_everything() {
        let imports =
            |patterns: &[&str]| Imports::try_from(patterns.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>());
        let some = imports(&["payments.shop", "*.billing"]).unwrap();
        let covers = |name: &str| some.declared().unwrap().covers(&name.parse().unwrap());
        assert!(covers("payments.shop") && covers("any.billing") && !covers("web.shop"));
        assert!(imports(&["*"]).unwrap().declared().unwrap().everything);
        assert!(imports(&[]).unwrap().declared().is_some() && Imports::default().declared().is_none());
        for bad in ["shop", "*.Shop", "**"] {
            assert!(imports(&[bad]).unwrap_err().starts_with("imports: "), "{bad}");
        }
    }

    #[test]
    fn two_sources_of_one_name_and_one_without_a_name_are_refused() {
        let td: TrustDomain = "example.org".parse().unwrap();
        let config = parse("kind = \"files\"\nname = \"f\"\ndir = \"/x\"").unwrap();
        assert_eq!(SourceConfig::open_all(std::slice::from_ref(&config), &td).map(|all| all.len()).ok(), Some(1));
        let twice = SourceConfig::open_all(&[config.clone(), config.clone()], &td).err().unwrap();
        assert_eq!(twice, ConfigError::Duplicate("f".into()));
        let unnamed = SourceConfig { name: Some(String::new()), ..config }.open(&td).err().unwrap().to_string();
        assert!(unnamed.starts_with("[[source]] name: the name is empty"), "{unnamed}");
    }
}
