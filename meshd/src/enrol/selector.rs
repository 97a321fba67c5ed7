//! What tells a workload's processes from all others of the host.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Selector {
    /// A systemd unit: everything in its cgroup.
    Unit(Arc<str>),
    /// Scopes with generated names, say containers on the host's network.
    Scope(ScopePattern),
    Uid(u32),
    /// Whoever listens on this TCP port of the host.
    Port(u16),
}

/// What is wrong with a selector, and what to do; the field it is in is known to whoever asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SelectorError(String);

impl Selector {
    /// A unit's name as the operator wrote it; with `*`, a pattern of scopes.
    pub fn unit(name: &str) -> Result<Selector, SelectorError> {
        if name.contains('*') {
            return ScopePattern::parse(name).map(Selector::Scope);
        }
        if name.contains('/') || name.ends_with(".slice") {
            let reason = format!("`{name}` is a slice or a path; name the units in it, one [[workload]] each");
            return Err(SelectorError(reason));
        }
        if !name.contains('.') {
            let reason = format!("`{name}` names no unit; write it with its kind, like `{name}.service`");
            return Err(SelectorError(reason));
        }
        Ok(Selector::Unit(name.into()))
    }

    pub fn port(port: u16) -> Result<Selector, SelectorError> {
        match port {
            0 => Err(SelectorError("port 0 cannot be listened on; give 1..65535".to_owned())),
            port => Ok(Selector::Port(port)),
        }
    }
}

/// As it is displayed.
impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Selector, SelectorError> {
        if let Some(uid) = text.strip_prefix("uid:") {
            let no_uid = |_| SelectorError(format!("`{uid}` is no uid; write like uid:1001"));
            return uid.parse().map(Selector::Uid).map_err(no_uid);
        }
        if let Some(port) = text.strip_prefix("port:") {
            let no_port = |_| SelectorError(format!("`{port}` is no port; write like port:5432"));
            return Selector::port(port.parse().map_err(no_port)?);
        }
        Selector::unit(text)
    }
}

/// What operators see in metrics, logs and `meshd enrol --list`.
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Selector::Unit(unit) => f.write_str(unit),
            Selector::Scope(pattern) => pattern.fmt(f),
            Selector::Uid(uid) => write!(f, "uid:{uid}"),
            Selector::Port(port) => write!(f, "port:{port}"),
        }
    }
}

/// `docker-3f*.scope`: one `*`, for the part of a scope's name that changes with every start.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ScopePattern {
    before: Box<str>,
    after: Box<str>,
}

impl ScopePattern {
    pub fn parse(text: &str) -> Result<ScopePattern, SelectorError> {
        let refused = |why: &str| Err(SelectorError(format!("`{text}`: {why}")));
        let Some((before, after)) = text.split_once('*') else {
            return refused("a pattern has one `*`, like `docker-*.scope`");
        };
        if after.contains('*') || !after.ends_with(".scope") || text.contains('/') {
            return refused("one `*` is allowed, and only in names of scopes, like `docker-*.scope`");
        }
        let pattern = ScopePattern { before: before.into(), after: after.into() };
        if pattern.spells("init.scope") || !pattern.means_sessions() && pattern.spells("session-1.scope") {
            return refused("this means login sessions, too; write more of the name before the `*`");
        }
        Ok(pattern)
    }

    pub fn matches(&self, name: &str) -> bool {
        self.spells(name) && (self.means_sessions() || !name.starts_with("session-"))
    }

    /// Anybody who logs in gets a session scope; that must never be meant by the way.
    fn means_sessions(&self) -> bool {
        self.before.starts_with("session-")
    }

    fn spells(&self, name: &str) -> bool {
        name.len() >= self.literal() && name.starts_with(&*self.before) && name.ends_with(&*self.after)
    }

    /// How much of a name it spells out: the more, the closer it means one.
    pub(super) fn literal(&self) -> usize {
        self.before.len() + self.after.len()
    }
}

impl fmt::Display for ScopePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}*{}", self.before, self.after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_means_the_scopes_that_begin_and_end_like_it() {
        let pattern = ScopePattern::parse("docker-3f*.scope").unwrap();
        assert!(pattern.matches("docker-3f.scope") && pattern.matches("docker-3fa9c2.scope"));
        assert!(!pattern.matches("docker-4f.scope") && !pattern.matches("docker-3f.service"));
        assert!(!ScopePattern::parse("ab*b.scope").unwrap().matches("ab.scope"), "literals do not overlap");
        assert_eq!(pattern.to_string(), "docker-3f*.scope");
    }

    #[test]
    fn patterns_are_for_scopes_only_and_never_for_every_login_session_by_the_way() {
        for text in ["web*.service", "a*b*.scope", "*.scope", "s*.scope", "*-1.scope", "i*.scope", "a/*.scope"] {
            assert!(Selector::unit(text).is_err(), "{text}");
        }
        assert!(Selector::unit("session-*.scope").is_ok(), "said in so many words");
        for text in ["*2.scope", "se*2.scope"] {
            let pattern = ScopePattern::parse(text).unwrap();
            assert!(!pattern.matches("session-2.scope") && pattern.matches("sea-2.scope"), "{text}");
        }
        assert!(ScopePattern::parse("session-*.scope").unwrap().matches("session-2.scope"));
    }

    #[test]
    fn what_is_displayed_is_understood() {
        for text in ["web.service", "docker-3f*.scope", "uid:1001", "port:5432"] {
            assert_eq!(text.parse::<Selector>().unwrap().to_string(), text);
        }
        for wrong in ["web", "uid:foo", "uid:", "uid:-1", "port:0", "port:70000", "port:web.service"] {
            assert!(wrong.parse::<Selector>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_selector_that_means_nobody_says_what_to_write() {
        for (text, remedy) in [("web", "web.service"), ("system.slice", "name the units"), ("a/b.service", "name the")]
        {
            let error = Selector::unit(text).unwrap_err().to_string();
            assert!(error.contains(remedy), "{error}");
        }
        assert!(Selector::port(0).is_err());
    }
}
