//! What processes of a host are known by: written into entries at the PKI, attested on hosts. All of an entry must hold.

use std::fmt;
use std::mem::discriminant;
use std::str::FromStr;

use data_encoding::HEXLOWER;

/// Of one entry: there are no more kinds.
const MOST: usize = 5;
/// PATH_MAX of Linux.
const LONGEST_PATH: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ProcessSelector {
    /// In the cgroup of this systemd unit.
    Unit(Box<str>),
    /// Effective user.
    Uid(u32),
    /// Effective group; supplementary ones do not count.
    Gid(u32),
    /// The program it runs, as the host's root directory has it.
    Path(Box<str>),
    /// The content of that program.
    Sha256([u8; 32]),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    #[error(
        "`{0}` is no selector that hosts can attest; write systemd:unit:NAME.service, unix:uid:NUMBER, unix:gid:NUMBER, \
         unix:path:/PROGRAM or unix:sha256:HEX (64 lower-case digits)"
    )]
    Unknown(String),
    #[error("all selectors of an entry must hold, and no process is both {0} and {1}; give one of them")]
    Both(String, String),
}

impl ProcessSelector {
    /// The selectors of one entry.
    pub fn parse_all(texts: &[String]) -> Result<Vec<ProcessSelector>, SelectorError> {
        let mut all: Vec<ProcessSelector> = Vec::with_capacity(MOST);
        for text in texts {
            let one: ProcessSelector = text.parse()?;
            match all.iter().find(|other| discriminant(*other) == discriminant(&one)) {
                Some(other) if *other == one => {}
                Some(other) => return Err(SelectorError::Both(other.to_string(), one.to_string())),
                None => all.push(one),
            }
        }
        Ok(all)
    }

    /// Whether it is about the program, which a host sees with a capability only that it need not have.
    pub fn is_of_program(&self) -> bool {
        matches!(self, ProcessSelector::Path(_) | ProcessSelector::Sha256(_))
    }
}

impl FromStr for ProcessSelector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<ProcessSelector, SelectorError> {
        let read = || {
            let (kind, value) =
                text.split_once(':').and_then(|(system, rest)| Some((system, rest.split_once(':')?)))?;
            match (kind, value) {
                ("systemd", ("unit", name)) => is_unit(name).then(|| ProcessSelector::Unit(name.into())),
                ("unix", ("uid", uid)) => number(uid).map(ProcessSelector::Uid),
                ("unix", ("gid", gid)) => number(gid).map(ProcessSelector::Gid),
                ("unix", ("path", path)) => is_program(path).then(|| ProcessSelector::Path(path.into())),
                ("unix", ("sha256", hex)) => {
                    let hash = HEXLOWER.decode(hex.as_bytes()).ok()?;
                    hash.try_into().ok().map(ProcessSelector::Sha256)
                }
                _ => None,
            }
        };
        read().ok_or_else(|| SelectorError::Unknown(text.chars().take(100).flat_map(char::escape_debug).collect()))
    }
}

/// As it is written.
impl fmt::Display for ProcessSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProcessSelector::Unit(name) => write!(f, "systemd:unit:{name}"),
            ProcessSelector::Uid(uid) => write!(f, "unix:uid:{uid}"),
            ProcessSelector::Gid(gid) => write!(f, "unix:gid:{gid}"),
            ProcessSelector::Path(path) => write!(f, "unix:path:{path}"),
            ProcessSelector::Sha256(hash) => write!(f, "unix:sha256:{}", HEXLOWER.encode(hash)),
        }
    }
}

fn is_unit(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    name.contains('.') && name.len() < 256 && !name.ends_with(".slice") && name.bytes().all(is_allowed)
}

/// One spelling per number.
fn number(text: &str) -> Option<u32> {
    text.parse::<u32>().ok().filter(|number| number.to_string() == text)
}

/// As the kernel tells paths.
fn is_program(path: &str) -> bool {
    let parts = path.strip_prefix('/').map(|rest| rest.split('/'));
    let is_plain = |part: &str| !matches!(part, "" | "." | "..") && !part.chars().any(char::is_control);
    path.len() < LONGEST_PATH && parts.is_some_and(|mut parts| parts.all(is_plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_understood_and_anything_else_is_refused() {
        let hash = format!("unix:sha256:{}", "0a".repeat(32));
        for text in ["systemd:unit:web@1.service", "unix:uid:0", "unix:gid:4294967295", "unix:path:/usr/bin/web", &hash]
        {
            assert_eq!(text.parse::<ProcessSelector>().unwrap().to_string(), text);
        }
        for wrong in [
            "systemd:unit:web",
            "systemd:unit:system.slice",
            "unix:uid:-1",
            "unix:uid:+7",
            "unix:gid:07",
            "unix:path:bin/web",
            "unix:path:/",
            "unix:path:/usr//web",
            "unix:path:/usr/../web",
            "unix:path:/a\nb",
            "unix:sha256:00",
            &hash.to_uppercase(),
            "k8s:pod:x",
            "",
        ] {
            assert!(matches!(wrong.parse::<ProcessSelector>(), Err(SelectorError::Unknown(_))), "{wrong}");
        }
    }

    #[test]
    fn an_entry_has_at_most_one_selector_of_a_kind() {
        let all =
            |texts: &[&str]| ProcessSelector::parse_all(&texts.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>());
        assert_eq!(all(&["unix:uid:7", "systemd:unit:web.service", "unix:uid:7"]).unwrap().len(), 2);
        let error = all(&["unix:uid:7", "unix:uid:8"]).unwrap_err().to_string();
        assert!(error.contains("unix:uid:7 and unix:uid:8"), "{error}");
    }
}
