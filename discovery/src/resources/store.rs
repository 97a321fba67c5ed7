//! Where resources lie in stores of keys, such as etcd and Consul's, below a prefix of their own:
//!
//! ```text
//! /meshd-resources/v1/NAMESPACE/KIND/NAME        one document (YAML or JSON), the kind in lower case
//! ```

use std::sync::Arc;

use meshd_identity::TrustDomain;

use super::read::{self, Document, Said};
use super::{Id, Kind, ResourceChange, ResourceRecord};
use crate::stored::refused;

/// Below which all keys lie, unless told otherwise.
pub(crate) const BASE: &str = "/meshd-resources/v1";
/// Beside the prefix that a source is given for services, if it is.
pub(crate) fn base_for(prefix: Option<&str>) -> String {
    prefix.map_or_else(|| BASE.to_owned(), |prefix| format!("{}-resources", prefix.trim_end_matches('/')))
}

/// What a rule of a route has at most is a few KiB; this is far beyond the largest route.
pub(crate) const MOST_BYTES: usize = 256 * 1024;

/// Which document a key is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredKey(pub(crate) Id);

impl StoredKey {
    /// `None`: of another form, which a newer meshd may have written.
    pub(crate) fn read(base: &str, key: &str) -> Option<StoredKey> {
        let mut parts = key.strip_prefix(base)?.strip_prefix('/')?.split('/');
        let (namespace, kind, name) = (parts.next()?, parts.next()?, parts.next()?);
        let kind = Kind::of_lower(kind).filter(|kind| *kind != Kind::MeshService && parts.next().is_none())?;
        let named = !namespace.is_empty() && !name.is_empty();
        named.then(|| StoredKey(Id { kind, namespace: namespace.into(), name: name.into() }))
    }

    /// What was written to it. `key` as the store has it.
    pub(crate) fn document(&self, key: &str, value: &[u8], trust_domain: &TrustDomain) -> ResourceChange {
        match self.understand(value, trust_domain) {
            Ok(resources) => {
                let key: Arc<str> = key.into();
                ResourceChange::Set(ResourceRecord { origin: key.clone(), key, resources })
            }
            Err(problems) => ResourceChange::Refused(refused(key, key, &problems)),
        }
    }

    fn understand(&self, value: &[u8], trust_domain: &TrustDomain) -> Result<Vec<super::Resource>, Vec<String>> {
        if value.len() > MOST_BYTES {
            return Err(vec![format!("has {} bytes and {MOST_BYTES} are allowed", value.len())]);
        }
        let text = std::str::from_utf8(value).map_err(|_| vec!["is not UTF-8".to_owned()])?;
        let mut found = read::read(text, trust_domain);
        let Document { id, outcome, .. } = match (found.pop(), found.is_empty()) {
            (Some(document), true) => document,
            (None, _) => return Err(vec![format!("is empty; it holds one {} document", self.0.kind)]),
            (Some(_), false) => return Err(vec!["holds several documents; give each a key of its own".to_owned()]),
        };
        let said = outcome.map_err(|problems| problems.iter().map(read::shown).collect::<Vec<_>>())?;
        if id.as_ref() != Some(&self.0) {
            let found = id.map_or_else(|| "another".to_owned(), |id| id.to_string());
            return Err(vec![format!(
                "metadata: describes {found}, and the key is that of {}; write it to its own",
                self.0
            )]);
        }
        match said {
            Said::Resources(resources) => Ok(resources),
            // Its kind would be another one.
            Said::Service(_) => Err(vec!["is a MeshService, which has keys of its own".to_owned()]),
        }
    }
}
