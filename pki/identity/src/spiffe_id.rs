use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

use crate::{TrustDomain, TrustDomainError};

/// The namespace of hosts and of the PKI itself; no workload may be enrolled in it.
pub const SYSTEM_NAMESPACE: &str = "meshd-system";

const PKI_NAME: &str = "pki";
const SCHEME: &str = "spiffe://";
/// SPIFFE-ID.md 2.3: an implementation must support 2048 bytes and should not produce more.
const MAX_LENGTH: usize = 2048;

/// `spiffe://<trust domain>/ns/<namespace>/sa/<name>`: the only shape of identity in the mesh. Cheap to clone.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId(Arc<Parts>);

struct Parts {
    uri: String,
    trust_domain: TrustDomain,
    namespace_end: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("`{0}` is not a SPIFFE ID; write spiffe://<trust domain>/ns/<namespace>/sa/<name>")]
    NotSpiffe(String),
    #[error("SPIFFE ID `{0}` has the wrong path; it must be exactly /ns/<namespace>/sa/<name>")]
    Shape(String),
    #[error("identity `{0}` is neither `ns/<namespace>/sa/<name>` nor a full spiffe:// URI")]
    NotShort(String),
    #[error("the {part} is empty; give it a name of a-z, A-Z, 0-9, `.`, `-`, `_`")]
    Empty { part: &'static str },
    #[error("the {part} may not be `{value}`; choose a real name")]
    Dots { part: &'static str, value: String },
    #[error("the {part} `{value}` contains `{character}`; only a-z, A-Z, 0-9, `.`, `-` and `_` are allowed")]
    Character { part: &'static str, value: String, character: char },
    #[error("the host id `pki` is reserved for the PKI itself; choose another one")]
    ReservedHost,
    #[error("the SPIFFE ID has {0} bytes; 2048 are allowed, choose shorter names")]
    TooLong(usize),
    #[error(transparent)]
    TrustDomain(#[from] TrustDomainError),
}

impl SpiffeId {
    pub fn workload(trust_domain: &TrustDomain, namespace: &str, name: &str) -> Result<SpiffeId, IdError> {
        check_segment("namespace", namespace)?;
        check_segment("name", name)?;
        let prefix = format!("{SCHEME}{trust_domain}/ns/{namespace}");
        let uri = format!("{prefix}/sa/{name}");
        if uri.len() > MAX_LENGTH {
            return Err(IdError::TooLong(uri.len()));
        }
        Ok(SpiffeId(Arc::new(Parts { uri, trust_domain: trust_domain.clone(), namespace_end: prefix.len() })))
    }

    /// The identity of a host: its own, as opposed to that of any workload on it.
    pub fn host(trust_domain: &TrustDomain, host_id: &str) -> Result<SpiffeId, IdError> {
        check_segment("host id", host_id)?;
        // A host of that name would hold the very identity that hosts take for the PKI's.
        if host_id == PKI_NAME {
            return Err(IdError::ReservedHost);
        }
        SpiffeId::workload(trust_domain, SYSTEM_NAMESPACE, host_id)
    }

    /// The identity every PKI server of a trust domain presents.
    pub fn pki(trust_domain: &TrustDomain) -> SpiffeId {
        SpiffeId::workload(trust_domain, SYSTEM_NAMESPACE, PKI_NAME).expect("a constant path is valid")
    }

    /// Reads `ns/<namespace>/sa/<name>` as an identity of `trust_domain`; a full URI stands for itself and may
    /// belong to another trust domain.
    pub fn parse_in(trust_domain: &TrustDomain, text: &str) -> Result<SpiffeId, IdError> {
        if has_scheme(text) {
            return text.parse();
        }
        match split_path(text) {
            Some((namespace, name)) => SpiffeId::workload(trust_domain, namespace, name),
            None => Err(IdError::NotShort(printable(text))),
        }
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust_domain
    }

    pub fn namespace(&self) -> &str {
        let start = SCHEME.len() + self.0.trust_domain.as_str().len() + "/ns/".len();
        &self.0.uri[start..self.0.namespace_end]
    }

    pub fn name(&self) -> &str {
        &self.0.uri[self.0.namespace_end + "/sa/".len()..]
    }

    pub fn as_str(&self) -> &str {
        &self.0.uri
    }

    /// `ns/<namespace>/sa/<name>`, the form used in files and messages where the trust domain is known.
    pub fn short(&self) -> &str {
        &self.0.uri[SCHEME.len() + self.0.trust_domain.as_str().len() + 1..]
    }

    /// Hosts and the PKI live in the reserved namespace.
    pub fn is_system(&self) -> bool {
        self.namespace() == SYSTEM_NAMESPACE
    }
}

/// The name that selects an identity in a TLS ClientHello. A selector, never trust: the certificate decides.
pub fn server_name(id: &SpiffeId) -> String {
    let hash = digest::digest(&digest::SHA256, id.as_str().as_bytes());
    let mut name = data_encoding::BASE32_NOPAD.encode(hash.as_ref()).to_ascii_lowercase();
    name.push_str(".id.mesh.internal");
    name
}

impl FromStr for SpiffeId {
    type Err = IdError;

    fn from_str(uri: &str) -> Result<SpiffeId, IdError> {
        if uri.len() > MAX_LENGTH {
            return Err(IdError::TooLong(uri.len()));
        }
        let Some(rest) = uri.strip_prefix(SCHEME) else {
            return Err(IdError::NotSpiffe(printable(uri)));
        };
        let Some((trust_domain, path)) = rest.split_once('/') else {
            return Err(IdError::Shape(printable(uri)));
        };
        let trust_domain: TrustDomain = trust_domain.parse()?;
        match split_path(path) {
            Some((namespace, name)) => SpiffeId::workload(&trust_domain, namespace, name),
            None => Err(IdError::Shape(printable(uri))),
        }
    }
}

fn has_scheme(text: &str) -> bool {
    text.contains("://")
}

/// Whether this is the path of some workload's SPIFFE ID, without its first slash (SPIFFE-ID.md 2.2).
pub(crate) fn is_path(path: &str) -> bool {
    path.len() <= MAX_LENGTH && path.split('/').all(|segment| check_segment("segment", segment).is_ok())
}

/// `ns/<namespace>/sa/<name>` and nothing else: four segments, the two labels in place.
fn split_path(path: &str) -> Option<(&str, &str)> {
    let mut segments = path.split('/');
    let found = (segments.next()?, segments.next()?, segments.next()?, segments.next()?, segments.next());
    match found {
        ("ns", namespace, "sa", name, None) => Some((namespace, name)),
        _ => None,
    }
}

fn check_segment(part: &'static str, value: &str) -> Result<(), IdError> {
    match value {
        "" => return Err(IdError::Empty { part }),
        "." | ".." => return Err(IdError::Dots { part, value: value.to_owned() }),
        _ => {}
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    match value.chars().find(|c| !allowed(*c)) {
        Some(character) => Err(IdError::Character { part, value: printable(value), character }),
        None => Ok(()),
    }
}

/// Text from a peer, made safe for a log line: escaped and cut.
fn printable(text: &str) -> String {
    text.chars().take(300).flat_map(char::escape_debug).collect()
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &SpiffeId) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.as_str() == other.as_str()
    }
}

impl Eq for SpiffeId {}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &SpiffeId) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &SpiffeId) -> Ordering {
        self.as_str().cmp(other.as_str())
    }
}

impl Hash for SpiffeId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

impl Borrow<str> for SpiffeId {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl TryFrom<String> for SpiffeId {
    type Error = IdError;

    fn try_from(uri: String) -> Result<SpiffeId, IdError> {
        uri.parse()
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> String {
        id.as_str().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn domain() -> TrustDomain {
        "prod.example.org".parse().unwrap()
    }

    #[test]
    fn takes_an_identity_apart() {
        let id: SpiffeId = "spiffe://prod.example.org/ns/shop/sa/payments".parse().unwrap();
        assert_eq!((id.trust_domain().as_str(), id.namespace(), id.name()), ("prod.example.org", "shop", "payments"));
        assert_eq!(id.short(), "ns/shop/sa/payments");
        assert!(!id.is_system());
        assert!(SpiffeId::pki(&domain()).is_system());
    }

    #[test]
    fn a_host_lives_in_the_system_namespace() {
        assert_eq!(SpiffeId::host(&domain(), "web").unwrap().short(), "ns/meshd-system/sa/web");
        assert!(SpiffeId::host(&domain(), "web/../root").is_err());
        assert_eq!(SpiffeId::host(&domain(), "pki"), Err(IdError::ReservedHost));
    }

    #[test]
    fn refuses_everything_but_the_one_shape() {
        let long = format!("spiffe://a/ns/{}/sa/b", "x".repeat(2048));
        let bad = [
            "",
            "spiffe://",
            "spiffe://prod.example.org",
            "spiffe://prod.example.org/",
            "spiffe://a/ns/shop",
            "spiffe://a/ns/shop/sa",
            "spiffe://a/ns/shop/sa/",
            "spiffe://a/ns//sa/x",
            "spiffe://a/ns/shop/sa/x/",
            "spiffe://a/ns/shop/sa/x/y",
            "spiffe://a//ns/shop/sa/x",
            "spiffe://a/sa/x/ns/shop",
            "spiffe://a/ns/./sa/x",
            "spiffe://a/ns/shop/sa/..",
            "spiffe://a/ns/shop/sa/x?y=1",
            "spiffe://a/ns/shop/sa/x#y",
            "spiffe://a/ns/shop/sa/%78",
            "spiffe://a/ns/shop/sa/x y",
            "spiffe://a/ns/shop/sa/pay\u{0}",
            "spiffe://a:8080/ns/shop/sa/x",
            "spiffe://user@a/ns/shop/sa/x",
            "spiffe://A/ns/shop/sa/x",
            "spiffe:///ns/shop/sa/x",
            "SPIFFE://a/ns/shop/sa/x",
            "https://a/ns/shop/sa/x",
            "ns/shop/sa/x",
            long.as_str(),
        ];
        for uri in bad {
            assert!(uri.parse::<SpiffeId>().is_err(), "{uri:?} was accepted");
        }
    }

    #[test]
    fn an_error_says_what_is_allowed() {
        let shape = "spiffe://a/workload/x".parse::<SpiffeId>().unwrap_err().to_string();
        assert!(shape.contains("/ns/<namespace>/sa/<name>"), "{shape}");
        let letter = SpiffeId::workload(&domain(), "shop", "pay ments").unwrap_err().to_string();
        assert!(letter.contains("name `pay ments`") && letter.contains("a-z"), "{letter}");
    }

    #[test]
    fn short_and_full_forms_mean_the_same() {
        let short = SpiffeId::parse_in(&domain(), "ns/shop/sa/payments").unwrap();
        let full = SpiffeId::parse_in(&domain(), "spiffe://prod.example.org/ns/shop/sa/payments").unwrap();
        assert_eq!(short, full);
        let foreign = SpiffeId::parse_in(&domain(), "spiffe://other/ns/shop/sa/payments").unwrap();
        assert_eq!(foreign.trust_domain().as_str(), "other");
        for bad in ["shop/payments", "/ns/shop/sa/x", "ns/shop/sa/x/", "payments", "http://x"] {
            assert!(SpiffeId::parse_in(&domain(), bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn server_names_are_dns_labels_that_depend_on_every_byte() {
        let one = server_name(&"spiffe://a/ns/shop/sa/x".parse().unwrap());
        let other = server_name(&"spiffe://a/ns/shop/sa/X".parse().unwrap());
        assert_ne!(one, other);
        // printf 'spiffe://a/ns/shop/sa/x' | sha256sum | xxd -r -p | base32 | tr -d = | tr A-Z a-z
        assert_eq!(one, "dwclxfa5rf6vf65jeqnsihgikphddvp55vf4ds4j2um2zsw3ssha.id.mesh.internal");
        let label = one.split('.').next().unwrap();
        assert!(label.len() <= 63 && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()));
    }

    proptest! {
        #[test]
        fn parsing_undoes_display(
            domain in "[a-z0-9._-]{1,40}",
            namespace in "[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,20}",
            name in "[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,20}",
        ) {
            let domain: TrustDomain = domain.parse().unwrap();
            let id = SpiffeId::workload(&domain, &namespace, &name).unwrap();
            let again: SpiffeId = id.to_string().parse().unwrap();
            prop_assert_eq!(&again, &id);
            prop_assert_eq!((again.namespace(), again.name()), (namespace.as_str(), name.as_str()));
            prop_assert_eq!(SpiffeId::parse_in(&domain, id.short()).unwrap(), id.clone());
            let json = serde_json::to_string(&id).unwrap();
            prop_assert_eq!(serde_json::from_str::<SpiffeId>(&json).unwrap(), id);
        }

        #[test]
        fn any_text_is_refused_or_returned_unchanged(text in "(spiffe://)?[ -~é/]{0,60}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.as_str(), text);
            }
        }
    }
}
