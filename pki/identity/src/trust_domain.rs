use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// SPIFFE-ID.md 2.1: a trust domain name is at most 255 bytes.
const MAX_LENGTH: usize = 255;

/// The name of a trust domain, for example `prod.example.org`. Set when the PKI is created and never changed.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TrustDomain(Arc<str>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustDomainError {
    #[error("the trust domain is empty; give a name such as `prod.example.org`")]
    Empty,
    #[error("the trust domain has {0} bytes; SPIFFE allows 255, choose a shorter name")]
    TooLong(usize),
    #[error(
        "trust domain `{name}` contains `{character}`; only a-z, 0-9, `.`, `-` and `_` are allowed \
         (lower case, no scheme, port or path)"
    )]
    Character { name: String, character: char },
}

impl TrustDomain {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = TrustDomainError;

    fn from_str(name: &str) -> Result<TrustDomain, TrustDomainError> {
        if name.is_empty() {
            return Err(TrustDomainError::Empty);
        }
        if name.len() > MAX_LENGTH {
            return Err(TrustDomainError::TooLong(name.len()));
        }
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_');
        match name.chars().find(|c| !allowed(*c)) {
            Some(character) => Err(TrustDomainError::Character { name: name.escape_debug().to_string(), character }),
            None => Ok(TrustDomain(name.into())),
        }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for TrustDomain {
    type Error = TrustDomainError;

    fn try_from(name: String) -> Result<TrustDomain, TrustDomainError> {
        name.parse()
    }
}

impl From<TrustDomain> for String {
    fn from(domain: TrustDomain) -> String {
        domain.0.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_names_that_look_like_dns_or_addresses() {
        for name in ["a", "prod.example.org", "10.0.0.1", "with-dash_and.dot", &"a".repeat(255)] {
            assert_eq!(name.parse::<TrustDomain>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn refuses_bad_names_and_says_what_is_allowed() {
        for name in ["Prod.example", "a:8443", "user@a", "a/b", "a%20", "é", "a b", "spiffe://a"] {
            let error = name.parse::<TrustDomain>().unwrap_err().to_string();
            assert!(error.contains("only a-z"), "{name}: {error}");
        }
        assert_eq!("".parse::<TrustDomain>(), Err(TrustDomainError::Empty));
        assert_eq!("a".repeat(256).parse::<TrustDomain>(), Err(TrustDomainError::TooLong(256)));
    }
}
