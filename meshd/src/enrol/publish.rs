//! What a `[[workload.serve]]` says of its registration.

use std::sync::Arc;
use std::time::Duration;

use meshd_discovery::{MAX_WEIGHT, ServiceName};

use super::entry::{CheckEntry, FieldError, ServeEntry};
use super::{Enrolment, Workload};

const CHECK_EVERY_S: u64 = 5;
const TIMEOUT_S: u64 = 5;
const MOST_WORDS: usize = 64;
const LONGEST_VERSION: usize = 128;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Published {
    pub weight: Option<u32>,
    pub version: Option<String>,
    /// Beside that somebody listens.
    pub check: Option<Check>,
}

/// A question whose answer says whether the application is well.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Check {
    pub ask: Ask,
    pub every: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ask {
    /// For a connection.
    Tcp,
    /// For a path, with GET.
    Http(String),
    /// A program of this host, which asks in its own way.
    Exec(Program),
}

/// Started as it stands here, never by a shell.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Program {
    /// Its path, and what it is given. Not empty.
    pub command: Vec<String>,
    pub timeout: Duration,
    /// Another than meshd's own.
    pub user: Option<String>,
}

/// None where it is not to be registered.
pub(super) fn published(serve: &ServeEntry) -> Result<Option<Published>, FieldError> {
    let ServeEntry { service, weight, version, .. } = serve;
    if serve.publish == Some(false) {
        let said = weight.is_some() || version.is_some() || serve.check.is_some();
        let reason =
            format!("{service}: with `publish = false`, `weight`, `version` and `check` mean nothing; remove them");
        return if said { Err(("workload.serve.publish", reason)) } else { Ok(None) };
    }
    if let Some(weight) = weight.filter(|weight| *weight > MAX_WEIGHT) {
        return Err(("workload.serve.weight", format!("{weight} is too much; write 0 to {MAX_WEIGHT}")));
    }
    let is_text = |text: &String| text.len() <= LONGEST_VERSION && !text.chars().any(char::is_control);
    if !version.as_ref().is_none_or(is_text) {
        let reason = format!("at most {LONGEST_VERSION} bytes of text on one line are allowed; shorten it");
        return Err(("workload.serve.version", reason));
    }
    let check = serve.check.as_ref().map(check).transpose().map_err(|reason| ("workload.serve.check", reason))?;
    Ok(Some(Published { weight: *weight, version: version.clone(), check }))
}

fn check(entry: &CheckEntry) -> Result<Check, String> {
    let every = Duration::from_secs(match entry.every_s.unwrap_or(CHECK_EVERY_S) {
        seconds @ 1..=3600 => seconds,
        other => return Err(format!("every_s: {other} is no pause between checks; write 1 to 3600")),
    });
    if entry.exec.is_none() && (entry.timeout_s.is_some() || entry.user.is_some()) {
        return Err("timeout_s, user: they say something about `exec` only; remove them".to_owned());
    }
    let ask = match (&entry.http, entry.tcp, &entry.exec) {
        (Some(path), false, None) if path.starts_with('/') && path.chars().all(|c| c.is_ascii_graphic()) => {
            Ask::Http(path.clone())
        }
        (Some(path), false, None) => return Err(format!("http: `{path}` is no path; write one like \"/healthz\"")),
        (None, true, None) => Ask::Tcp,
        (None, false, Some(command)) => Ask::Exec(program(command, entry)?),
        _ => {
            let ways = "`http = \"/healthz\"`, `tcp = true` or `exec = [\"/usr/bin/pg_isready\"]`";
            return Err(format!("give either of {ways}"));
        }
    };
    Ok(Check { ask, every })
}

fn program(command: &[String], entry: &CheckEntry) -> Result<Program, String> {
    if !command.first().is_some_and(|path| path.starts_with('/')) {
        let example = "[\"/usr/bin/pg_isready\", \"-q\"]";
        return Err(format!("exec: begin with the full path of a program, as in {example}; it is not run by a shell"));
    }
    if command.len() > MOST_WORDS || command.iter().any(|word| word.contains('\0')) {
        return Err(format!("exec: at most {MOST_WORDS} words without NUL are allowed; write a script for more"));
    }
    let timeout = Duration::from_secs(match entry.timeout_s.unwrap_or(TIMEOUT_S) {
        seconds @ 1..=60 => seconds,
        other => return Err(format!("timeout_s: {other} is no time to wait for a check; write 1 to 60")),
    });
    Ok(Program { command: command.to_vec(), timeout, user: entry.user.clone() })
}

impl Enrolment {
    /// All ports of a service that one identity serves are one registration, which says each thing once.
    pub(super) fn agree_on_registration(
        &self,
        service: &ServiceName,
        owner: &Arc<Workload>,
        published: Option<&Published>,
    ) -> Result<(), FieldError> {
        let Some(published) = published else { return Ok(()) };
        let same = |other: &&Arc<super::Delivery>| other.service == *service && other.owner.identity == owner.identity;
        for other in self.deliveries.iter().filter(same) {
            let Some(theirs) = &other.published else { continue };
            let differ = |field, ours: Option<String>, theirs: Option<String>| match (ours, theirs) {
                (Some(ours), Some(theirs)) if ours != theirs => {
                    let reason = format!(
                        "all ports of {service} are registered together: it is {ours} here and {theirs} at {}; write it once",
                        other.origin
                    );
                    Err((field, reason))
                }
                _ => Ok(()),
            };
            let weight = |published: &Published| published.weight.map(|weight| weight.to_string());
            differ("workload.serve.weight", weight(published), weight(theirs))?;
            differ("workload.serve.version", published.version.clone(), theirs.version.clone())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Option<Published>, FieldError> {
        published(&toml::from_str(&format!("service = \"payments.shop\"\nport = 80\n{text}")).unwrap())
    }

    #[test]
    fn what_is_served_is_registered_unless_told_otherwise() {
        assert_eq!(read(""), Ok(Some(Published::default())));
        assert_eq!(read("publish = false"), Ok(None));
        let all = read("weight = 7\nversion = \"1.2\"\ncheck = { http = \"/healthz\", every_s = 2 }").unwrap().unwrap();
        let check = Check { ask: Ask::Http("/healthz".to_owned()), every: Duration::from_secs(2) };
        assert_eq!(all, Published { weight: Some(7), version: Some("1.2".to_owned()), check: Some(check) });
        let tcp = read("check = { tcp = true }").unwrap().unwrap().check.unwrap();
        assert_eq!(tcp, Check { ask: Ask::Tcp, every: Duration::from_secs(5) });
        let text = "check = { exec = [\"/bin/true\", \"-x\"], timeout_s = 2, user = \"postgres\" }";
        let Ask::Exec(program) = read(text).unwrap().unwrap().check.unwrap().ask else { panic!("no program") };
        assert_eq!(
            (program.command.len(), program.timeout.as_secs(), program.user.as_deref()),
            (2, 2, Some("postgres"))
        );
    }

    #[test]
    fn mistakes_name_the_field_and_the_remedy() {
        for (text, field, expected) in [
            ("publish = false\nweight = 7", "workload.serve.publish", "remove them"),
            ("weight = 1000001", "workload.serve.weight", "0 to 1000000"),
            ("version = \"a\\nb\"", "workload.serve.version", "one line"),
            ("check = {}", "workload.serve.check", "give either"),
            ("check = { http = \"/\", tcp = true }", "workload.serve.check", "give either"),
            ("check = { tcp = true, exec = [\"/bin/true\"] }", "workload.serve.check", "give either"),
            ("check = { exec = [] }", "workload.serve.check", "full path"),
            ("check = { exec = [\"pg_isready\"] }", "workload.serve.check", "full path"),
            ("check = { exec = [\"/bin/true\"], timeout_s = 61 }", "workload.serve.check", "1 to 60"),
            ("check = { tcp = true, user = \"x\" }", "workload.serve.check", "`exec` only"),
            ("check = { http = \"healthz\" }", "workload.serve.check", "\"/healthz\""),
            ("check = { http = \"/a b\" }", "workload.serve.check", "no path"),
            ("check = { tcp = true, every_s = 0 }", "workload.serve.check", "1 to 3600"),
        ] {
            let (found, reason) = read(text).unwrap_err();
            assert!(found == field && reason.contains(expected), "{found}: {reason}");
        }
    }
}
