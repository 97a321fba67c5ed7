use std::net::IpAddr;

use serde::Deserialize;

use crate::documents::{is_of_a_host, is_plain_word};

/// `[host]` of meshd.toml: what is registered of this host with everything it serves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostConfig {
    /// Where peers reach it; the source address of the route to the backend if left out.
    pub address: Option<IpAddr>,
    pub network: String,
    pub zone: String,
}

impl HostConfig {
    /// Field and reason of what is wrong.
    pub fn problem(&self) -> Option<(&'static str, &'static str)> {
        let word = "at most 63 of a-z, A-Z, 0-9, `-`, `_` and `.` are allowed; choose a plain word";
        if self.address.is_some_and(|address| !is_of_a_host(address.to_canonical())) {
            return Some(("host.address", "this is not the address of a host; write the one peers dial"));
        }
        let words = [("host.network", &self.network), ("host.zone", &self.zone)];
        words.into_iter().find(|(_, text)| !is_plain_word(text)).map(|(field, _)| (field, word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_nobody_dials_and_names_that_are_no_words_are_refused() {
        let problem = |text: &str| toml::from_str::<HostConfig>(text).unwrap().problem().map(|(field, _)| field);
        assert_eq!(problem("address = \"10.0.0.1\"\nzone = \"rack-1\""), None);
        assert_eq!(problem("address = \"0.0.0.0\""), Some("host.address"));
        assert_eq!(problem("zone = \"rack 1\""), Some("host.zone"));
        assert_eq!(problem("network = \"a/b\""), Some("host.network"));
    }
}
