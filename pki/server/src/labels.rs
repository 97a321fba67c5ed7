//! Labels of hosts: said by the operator at enrolment, matched by entries.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

const LONGEST: usize = 63;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    #[error("`{0}` is no label; write KEY=VALUE, each of 1 to {LONGEST} of a-z, A-Z, 0-9, `.`, `-`, `_`, `/`")]
    Form(String),
    #[error("the label `{0}` is given twice; keep one of them")]
    Twice(String),
}

/// `role=web`
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Label {
    pub key: String,
    pub value: String,
}

impl FromStr for Label {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Label, LabelError> {
        let bad = || LabelError::Form(text.chars().take(200).flat_map(char::escape_debug).collect());
        let (key, value) = text.split_once('=').ok_or_else(bad)?;
        let is_good = |part: &str| {
            let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_/".contains(&byte);
            (1..=LONGEST).contains(&part.len()) && part.bytes().all(is_allowed)
        };
        if !is_good(key) || !is_good(value) {
            return Err(bad());
        }
        Ok(Label { key: key.to_owned(), value: value.to_owned() })
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.key, self.value)
    }
}

pub(crate) fn label_map(labels: &[Label]) -> Result<BTreeMap<String, String>, LabelError> {
    let mut map = BTreeMap::new();
    for Label { key, value } in labels {
        if map.insert(key.clone(), value.clone()).is_some() {
            return Err(LabelError::Twice(key.clone()));
        }
    }
    Ok(map)
}

/// As commands write them.
pub(crate) fn texts(labels: &BTreeMap<String, String>) -> Vec<String> {
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_a_key_with_a_value() {
        assert_eq!("role=web".parse::<Label>().unwrap().to_string(), "role=web");
        for text in ["role", "=web", "role=", "a b=c", "a=b=c", "a=é"] {
            assert!(text.parse::<Label>().is_err(), "{text}");
        }
        let twice = ["a=b", "a=c"].map(|text| text.parse().unwrap());
        assert_eq!(label_map(&twice), Err(LabelError::Twice("a".to_owned())));
    }
}
