//! What the kernel has counted so far.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Counts since the rules were last replaced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Which life of the rules counted this: another number means that counts began again at zero.
    pub rules: u64,
    /// Plaintext calls by port and caller; a port nobody called is there without callers.
    pub ports: BTreeMap<u16, BTreeMap<PlainCaller, u64>>,
    /// All plaintext calls by port, where they are counted apart from who called: `ports` then has what became known
    /// of callers since the last tally, and whoever is missing in it is nobody known.
    pub totals: Option<BTreeMap<u16, u64>>,
    /// Connections refused at strict ports.
    pub refused: BTreeMap<u16, u64>,
}

/// Who called in clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum PlainCaller {
    /// A process of this host.
    Uid(u32),
    /// Another host.
    Address(IpAddr),
    /// More callers than the kernel's sets hold.
    Others,
}

impl fmt::Display for PlainCaller {
    fn fmt(&self, text: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PlainCaller::Uid(uid) => write!(text, "uid {uid}"),
            PlainCaller::Address(address) => write!(text, "{address}"),
            PlainCaller::Others => text.write_str("others"),
        }
    }
}

impl From<PlainCaller> for String {
    fn from(caller: PlainCaller) -> String {
        caller.to_string()
    }
}

impl TryFrom<String> for PlainCaller {
    type Error = String;

    fn try_from(text: String) -> Result<PlainCaller, String> {
        if text == "others" {
            return Ok(PlainCaller::Others);
        }
        let parsed = match text.strip_prefix("uid ") {
            Some(uid) => uid.parse().ok().map(PlainCaller::Uid),
            None => text.parse().ok().map(PlainCaller::Address),
        };
        parsed.ok_or_else(|| format!("`{text}` is no caller"))
    }
}
