//! `[[source]]` of meshd.toml.

use std::path::PathBuf;

use meshd_identity::TrustDomain;
use serde::Deserialize;

use crate::name::{NameError, check_label};
use crate::{Belief, FilesSource, Source};

/// One `[[source]]`; their order in meshd.toml is their precedence, first wins.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    pub kind: SourceKind,
    pub name: String,
    /// For `kind = "files"`: the directory with the YAML documents.
    #[serde(default = "resources_d")]
    pub dir: PathBuf,
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
}

impl Default for Provides {
    fn default() -> Provides {
        Provides { endpoints: Namespaces::everything() }
    }
}

/// The source of a meshd.toml that names none: root's own files, which may say everything.
impl Default for SourceConfig {
    fn default() -> SourceConfig {
        let (kind, name, dir, authority) = (SourceKind::Files, "files".into(), resources_d(), Namespaces::everything());
        SourceConfig { kind, name, dir, authority, provides: Provides::default() }
    }
}

fn resources_d() -> PathBuf {
    "/etc/meshd/resources.d".into()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    Files,
}

/// A source and what it is trusted with.
pub struct Configured {
    pub source: Box<dyn Source>,
    pub authority: Namespaces,
    pub provides: Provides,
    pub belief: Belief,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("[[source]] name: {0}")]
    Name(NameError),
    #[error("[[source]] name: `{0}` is used twice; give every source its own name")]
    Duplicate(String),
}

impl SourceConfig {
    pub fn open(&self, trust_domain: &TrustDomain) -> Result<Configured, ConfigError> {
        check_label("name", &self.name).map_err(ConfigError::Name)?;
        let (source, belief): (Box<dyn Source>, Belief) = match self.kind {
            SourceKind::Files => {
                (Box::new(FilesSource::new(&self.name, self.dir.clone(), trust_domain.clone())), Belief::Always)
            }
        };
        Ok(Configured { source, authority: self.authority.clone(), provides: self.provides.clone(), belief })
    }

    /// Opens all of them; two may not share a name, because messages and metrics name the source.
    pub fn open_all(configs: &[SourceConfig], trust_domain: &TrustDomain) -> Result<Vec<Configured>, ConfigError> {
        for (index, config) in configs.iter().enumerate() {
            if configs[..index].iter().any(|earlier| earlier.name == config.name) {
                return Err(ConfigError::Duplicate(config.name.clone()));
            }
        }
        configs.iter().map(|config| config.open(trust_domain)).collect()
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
    fn two_sources_of_one_name_and_one_without_a_name_are_refused() {
        let td: TrustDomain = "example.org".parse().unwrap();
        let config = parse("kind = \"files\"\nname = \"f\"\ndir = \"/x\"").unwrap();
        assert_eq!(SourceConfig::open_all(std::slice::from_ref(&config), &td).map(|all| all.len()).ok(), Some(1));
        let twice = SourceConfig::open_all(&[config.clone(), config.clone()], &td).err().unwrap();
        assert_eq!(twice, ConfigError::Duplicate("f".into()));
        let unnamed = SourceConfig { name: String::new(), ..config }.open(&td).err().unwrap().to_string();
        assert!(unnamed.starts_with("[[source]] name: the name is empty"), "{unnamed}");
    }
}
