use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};

/// RFC 1035 2.3.4.
const MAX_LABEL: usize = 63;

/// A service in the mesh, written `payments.shop`: a name and a namespace, both DNS labels. Cheap to clone.
#[derive(Clone, Deserialize)]
#[serde(try_from = "String")]
pub struct ServiceName {
    text: Arc<str>,
    /// Where the dot is; a label is at most 63 bytes, so it fits.
    dot: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("`{0}` is not a service name; write <name>.<namespace>, for example payments.shop")]
    Shape(String),
    #[error("the {part} is empty; give it a DNS label such as `payments`")]
    Empty { part: &'static str },
    #[error("the {part} has {length} bytes; a DNS label has at most 63, choose a shorter one")]
    TooLong { part: &'static str, length: usize },
    #[error("the {part} `{value}` contains `{character}`; only a-z, 0-9 and `-` are allowed (lower case)")]
    Character { part: &'static str, value: String, character: char },
    #[error("the {part} `{value}` starts or ends with `-`; a DNS label may not")]
    Hyphen { part: &'static str, value: String },
}

impl ServiceName {
    pub fn new(name: &str, namespace: &str) -> Result<ServiceName, NameError> {
        check_label("name", name)?;
        check_label("namespace", namespace)?;
        Ok(ServiceName { text: format!("{name}.{namespace}").into(), dot: name.len() as u8 })
    }

    pub fn name(&self) -> &str {
        &self.text[..usize::from(self.dot)]
    }

    pub fn namespace(&self) -> &str {
        &self.text[usize::from(self.dot) + 1..]
    }

    /// `payments.shop`
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// RFC 1123 labels in lower case: what DNS can carry and Kubernetes accepts.
pub(crate) fn check_label(part: &'static str, value: &str) -> Result<(), NameError> {
    let shown = || value.chars().take(80).flat_map(char::escape_debug).collect::<String>();
    if value.is_empty() {
        return Err(NameError::Empty { part });
    }
    if value.len() > MAX_LABEL {
        return Err(NameError::TooLong { part, length: value.len() });
    }
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if let Some(character) = value.chars().find(|c| !allowed(*c)) {
        return Err(NameError::Character { part, value: shown(), character });
    }
    if value.starts_with('-') || value.ends_with('-') {
        return Err(NameError::Hyphen { part, value: shown() });
    }
    Ok(())
}

impl FromStr for ServiceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<ServiceName, NameError> {
        match text.split_once('.') {
            Some((name, namespace)) if !namespace.contains('.') => ServiceName::new(name, namespace),
            _ => Err(NameError::Shape(text.chars().take(200).flat_map(char::escape_debug).collect())),
        }
    }
}

impl TryFrom<String> for ServiceName {
    type Error = NameError;

    fn try_from(text: String) -> Result<ServiceName, NameError> {
        text.parse()
    }
}

impl Serialize for ServiceName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

// Compared and hashed as its text, so that maps can be asked with a `&str` from the wire.
impl Borrow<str> for ServiceName {
    fn borrow(&self) -> &str {
        &self.text
    }
}

impl PartialEq for ServiceName {
    fn eq(&self, other: &ServiceName) -> bool {
        self.text == other.text
    }
}

impl Eq for ServiceName {}

impl PartialOrd for ServiceName {
    fn partial_cmp(&self, other: &ServiceName) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ServiceName {
    fn cmp(&self, other: &ServiceName) -> Ordering {
        self.text.cmp(&other.text)
    }
}

impl Hash for ServiceName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_name_is_two_dns_labels() {
        let name: ServiceName = "payments.shop".parse().unwrap();
        assert_eq!((name.name(), name.namespace(), name.to_string().as_str()), ("payments", "shop", "payments.shop"));
        let longest = format!("{}.{}", "a".repeat(63), "b".repeat(63));
        assert_eq!(longest.parse::<ServiceName>().unwrap().namespace().len(), 63);
    }

    #[test]
    fn anything_else_is_refused_with_the_part_that_is_wrong() {
        for (text, expected) in [
            ("payments", "write <name>.<namespace>"),
            ("a.b.c", "write <name>.<namespace>"),
            (".shop", "the name is empty"),
            ("payments.", "the namespace is empty"),
            ("Payments.shop", "contains `P`"),
            ("pay_ments.shop", "contains `_`"),
            ("-a.shop", "starts or ends with `-`"),
            ("a.shop-", "the namespace `shop-`"),
            (&format!("{}.shop", "a".repeat(64)), "64 bytes"),
        ] {
            let error = text.parse::<ServiceName>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn maps_keyed_by_name_answer_to_text() {
        let name: ServiceName = "payments.shop".parse().unwrap();
        let map = BTreeMap::from([(name, 1)]);
        assert_eq!(map.get("payments.shop"), Some(&1));
        assert_eq!(map.get("payments.other"), None);
    }

    #[test]
    fn serialised_as_text_and_checked_when_read() {
        let name: ServiceName = "a.b".parse().unwrap();
        assert_eq!(serde_json::to_string(&name).unwrap(), "\"a.b\"");
        assert_eq!(serde_json::from_str::<ServiceName>("\"a.b\"").unwrap(), name);
        assert!(serde_json::from_str::<ServiceName>("\"A.b\"").is_err());
    }
}
