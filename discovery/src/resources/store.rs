//! Where resources lie in stores of keys, such as etcd and Consul's, below a prefix of their own:
//!
//! ```text
//! /meshd-resources/v1/NAMESPACE/KIND/NAME        one document (YAML or JSON), the kind in lower case
//! ```

use std::sync::Arc;

use meshd_identity::TrustDomain;

use super::read::{self, Document, Said};
use super::{Id, Kind, Resource, ResourceChange, ResourceRecord, ResourceRefusal};
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
        let key: Arc<str> = key.into();
        let of_key = |resources| ResourceRecord { key: key.clone(), origin: key.clone(), resources };
        match self.understand(value, trust_domain) {
            Ok(resources) => ResourceChange::Set(of_key(resources)),
            Err(Bad { problems, meanwhile }) => {
                let meanwhile = meanwhile.map(|resource| of_key(vec![resource]));
                ResourceChange::Refused(ResourceRefusal { meanwhile, ..refused(&key, &key, &problems).into() })
            }
        }
    }

    fn understand(&self, value: &[u8], trust_domain: &TrustDomain) -> Result<Vec<Resource>, Bad> {
        let is_no_document = |problem: String| Bad { problems: vec![problem], meanwhile: read::meanwhile(&self.0) };
        let document = self.one(value, trust_domain).map_err(is_no_document)?;
        let meanwhile = document.meanwhile(&self.0);
        self.said(document).map_err(|problems| Bad { problems, meanwhile })
    }

    fn one(&self, value: &[u8], trust_domain: &TrustDomain) -> Result<Document, String> {
        if value.len() > MOST_BYTES {
            return Err(format!("has {} bytes and {MOST_BYTES} are allowed", value.len()));
        }
        let text = std::str::from_utf8(value).map_err(|_| "is not UTF-8".to_owned())?;
        let mut found = read::read(text, trust_domain);
        match (found.pop(), found.is_empty()) {
            (Some(document), true) => Ok(document),
            (None, _) => Err(format!("is empty; it holds one {} document", self.0.kind)),
            (Some(_), false) => Err("holds several documents; give each a key of its own".to_owned()),
        }
    }

    fn said(&self, Document { id, outcome, .. }: Document) -> Result<Vec<Resource>, Vec<String>> {
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

/// What is wrong, and what stands for it.
struct Bad {
    problems: Vec<String>,
    meanwhile: Option<Resource>,
}
