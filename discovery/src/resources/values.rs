//! Values of documents that are more than text. Each is read from the text it is written as and written as such.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ipnet::IpNet;
use meshd_identity::SpiffeId;
use regex::bytes::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

use crate::yaml::printable;

/// Of a compiled expression. What people write takes some KiB; more is an attack or a mistake.
const MOST_OF_AN_EXPRESSION: usize = 32 * 1024;

/// Of which every sum can be written again.
const LONGEST: Duration = Duration::from_secs(99_999 * 3600);

/// A length of time as the Gateway API writes it (GEP-2257): up to four of `h`, `m`, `s`, `ms`, each with a number of at
/// most five digits. `0s` is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(Duration);

impl Span {
    pub const fn from_millis(millis: u64) -> Span {
        Span(Duration::from_millis(millis))
    }

    pub const fn get(self) -> Duration {
        self.0
    }

    pub const fn is_zero(self) -> bool {
        self.0.is_zero()
    }
}

pub(crate) fn span_of(text: &str) -> Result<Duration, String> {
    let wrong = || {
        let form = "write up to four numbers of at most five digits, each with h, m, s or ms, like 1m30s or 250ms";
        format!("`{}` is not a duration; {form} (GEP-2257)", printable(text))
    };
    let (mut rest, mut sum, mut parts) = (text, Duration::ZERO, 0);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..digits].parse().ok().filter(|_| (1..=5).contains(&digits)).ok_or_else(wrong)?;
        rest = &rest[digits..];
        let units: [(&str, u64); 4] = [("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1000)];
        let (unit, millis) = units.into_iter().find(|(unit, _)| rest.starts_with(unit)).ok_or_else(wrong)?;
        rest = &rest[unit.len()..];
        sum += Duration::from_millis(number * millis);
        parts += 1;
    }
    match (1..=4).contains(&parts) {
        true if sum > LONGEST => Err(format!("`{text}` is longer than 99999h, the longest that can be written")),
        true => Ok(sum),
        false => Err(wrong()),
    }
}

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Span, String> {
        span_of(&text).map(Span)
    }
}

impl From<Span> for String {
    fn from(span: Span) -> String {
        span.to_string()
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        let parts =
            [("h", millis / 3_600_000), ("m", millis / 60_000 % 60), ("s", millis / 1000 % 60), ("ms", millis % 1000)];
        if millis == 0 {
            return f.write_str("0s");
        }
        parts.iter().filter(|(_, number)| *number > 0).try_for_each(|(unit, number)| write!(f, "{number}{unit}"))
    }
}

/// A regular expression that has to match a whole value: RE2's syntax without Unicode classes, in time linear in the
/// length of the value. Compiled when it is first needed: most hosts that hold a route never ask it anything.
#[derive(Clone, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Pattern {
    text: Arc<str>,
    regex: OnceLock<Option<Regex>>,
}

pub(crate) fn pattern_of(text: &str) -> Result<Regex, String> {
    let build = |text: &str| RegexBuilder::new(text).unicode(false).size_limit(MOST_OF_AN_EXPRESSION).build();
    // By itself as well: brackets may not close what stands around it.
    let built = build(text).and_then(|_| build(&format!("^(?:{text})$")));
    built.map_err(|error| {
        let reason = match &error {
            regex::Error::CompiledTooBig(_) => "it is too large when compiled".to_owned(),
            // The last line says what is wrong; those before draw a picture.
            other => other.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned(),
        };
        format!("`{}` is not a regular expression of RE2's syntax: {reason}", printable(text))
    })
}

impl Pattern {
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it matches the whole of `value`.
    pub fn matches(&self, value: &[u8]) -> bool {
        // It was compiled when it was checked.
        let regex = self.regex.get_or_init(|| pattern_of(&self.text).ok());
        regex.as_ref().is_some_and(|regex| regex.is_match(value))
    }
}

impl From<String> for Pattern {
    fn from(text: String) -> Pattern {
        Pattern { text: text.into(), regex: OnceLock::new() }
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> String {
        pattern.text.as_ref().to_owned()
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Pattern) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.text)
    }
}

/// Addresses: `10.0.0.0/8`, or one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network(IpNet);

pub(crate) fn network_of(text: &str) -> Result<IpNet, String> {
    let network = match text.parse::<IpAddr>() {
        Ok(address) => IpNet::from(address),
        Err(_) => text.parse().map_err(|_| {
            format!("`{}` is not a network; write an address and how many bits count, like 10.0.0.0/8", printable(text))
        })?,
    };
    if network.trunc() != network {
        return Err(format!("`{text}` has bits beyond its length set; write {}", network.trunc()));
    }
    match in_ipv4_form(&network) {
        Some(form) => Err(format!("`{text}` is IPv4 in IPv6 form, which no client has; write {form}")),
        None => Ok(network),
    }
}

/// Of a network of mapped addresses (`::ffff:10.0.0.0/104`): addresses are compared in their IPv4 form.
fn in_ipv4_form(network: &IpNet) -> Option<String> {
    let IpNet::V6(network) = network else { return None };
    let address = network.addr().to_ipv4_mapped()?;
    Some(format!("{address}/{}", network.prefix_len().checked_sub(96)?))
}

impl Network {
    /// An IPv4 address in IPv6 form is the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Network, String> {
        network_of(&text).map(Network)
    }
}

impl From<Network> for String {
    fn from(network: Network) -> String {
        network.0.to_string()
    }
}

/// Whom an AuthorizationPolicy means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Peer {
    /// `*`: whoever proved an identity.
    Anybody,
    Identity(SpiffeId),
}

impl TryFrom<String> for Peer {
    type Error = String;

    fn try_from(text: String) -> Result<Peer, String> {
        if text == "*" {
            return Ok(Peer::Anybody);
        }
        text.parse().map(Peer::Identity).map_err(|error: meshd_identity::IdError| error.to_string())
    }
}

impl From<Peer> for String {
    fn from(peer: Peer) -> String {
        match peer {
            Peer::Anybody => "*".to_owned(),
            Peer::Identity(identity) => identity.as_str().to_owned(),
        }
    }
}

/// A path of an AuthorizationPolicy: `/health` is that one, `/admin/*` everything that begins with `/admin/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum PathPattern {
    Exact(Arc<str>),
    Below(Arc<str>),
}

impl From<String> for PathPattern {
    fn from(text: String) -> PathPattern {
        match text.strip_suffix('*') {
            Some(below) => PathPattern::Below(below.into()),
            None => PathPattern::Exact(text.into()),
        }
    }
}

impl From<PathPattern> for String {
    fn from(pattern: PathPattern) -> String {
        match pattern {
            PathPattern::Exact(text) => text.as_ref().to_owned(),
            PathPattern::Below(text) => format!("{text}*"),
        }
    }
}

impl PathPattern {
    /// `path`: normalised, without its query.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            PathPattern::Exact(exact) => path == &**exact,
            PathPattern::Below(below) => path.starts_with(&**below),
        }
    }
}

/// What of it no path has once it is normalised, so that it would never match. `whole`: nothing comes after it.
pub(crate) fn never_in_a_path(text: &str, whole: bool) -> Option<&'static str> {
    let anywhere = ["//", "/./", "/../", "%2f", "%2F", "#", "?"].into_iter().find(|part| text.contains(part));
    anywhere.or(["/..", "/."].into_iter().find(|end| whole && text.ends_with(end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_the_gateway_api() {
        for (text, millis) in
            [("0s", 0), ("1h30m", 5_400_000), ("1500ms", 1500), ("99999h", 99_999 * 3_600_000), ("10s1ms", 10_001)]
        {
            assert_eq!(span_of(text).unwrap(), Duration::from_millis(millis), "{text}");
        }
        for text in ["", "1", "1d", "-1s", "1.5s", "100000s", "1s1s1s1s1s", "s", "1 s", "99999h1ms"] {
            assert!(span_of(text).is_err(), "{text}");
        }
        for text in ["0s", "1h30m", "1m1s500ms", "99998h59m59s999ms"] {
            assert_eq!(Span::try_from(text.to_owned()).unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_regular_expression_matches_whole_values_only() {
        let pattern = Pattern::from("/a|/b\\d+".to_owned());
        assert!(
            pattern.matches(b"/a") && pattern.matches(b"/b12") && !pattern.matches(b"/ab") && !pattern.matches(b"x/a")
        );
        for text in ["(", "a{1000}{1000}", "(?=x)", "a)|(?:b"] {
            assert!(pattern_of(text).unwrap_err().contains("RE2"), "{text}");
        }
    }

    #[test]
    fn networks_have_no_bits_beyond_their_length() {
        let network = Network::try_from("10.0.0.0/8".to_owned()).unwrap();
        assert!(network.contains("10.1.2.3".parse().unwrap()) && network.contains("::ffff:10.1.2.3".parse().unwrap()));
        assert!(!network.contains("11.0.0.1".parse().unwrap()));
        assert!(network_of("10.0.0.1/8").unwrap_err().contains("10.0.0.0/8"));
        for (mapped, form) in [
            ("::ffff:10.0.0.0/104", "write 10.0.0.0/8"),
            ("::ffff:0:0/96", "write 0.0.0.0/0"),
            ("::ffff:10.0.0.1", "write 10.0.0.1/32"),
        ] {
            assert!(network_of(mapped).unwrap_err().contains(form), "{mapped}");
        }
        assert!(network_of("::/0").is_ok());
        assert!(network_of("2001:db8::1").is_ok() && network_of("10.0.0.0/33").is_err() && network_of("x").is_err());
    }
}
