//! `enrol.d/90-cli.toml`: the one file `meshd enrol` and `meshd unenrol` write, whole.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use toml::Spanned;

use super::entry::{EnrolFile, WorkloadEntry};
use super::files::EnrolError;
use super::{Enrolment, Selector};
use crate::config::{ConfigError, parse_toml};
use crate::durable;

const NAME: &str = "90-cli.toml";

const HEADER: &str = "\
# Written by `meshd enrol` and `meshd unenrol`, whole, each time: changes and comments made by hand are lost.
# Workloads of a configuration management tool belong into another file of this directory.
";

#[derive(Debug, thiserror::Error)]
pub enum CliFileError {
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    #[error("cannot {action} {path}: {source}; are you root?")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{selector} is enrolled by {origin}; change it there: meshd enrol writes {NAME} only")]
    Elsewhere { selector: Selector, origin: super::Origin },
    #[error("{0} is not enrolled; `meshd enrol --list` shows what is")]
    Unknown(Selector),
}

/// The file as it is and as it shall be. Locked, so that two operators do not undo each other's work.
pub struct CliFile {
    path: PathBuf,
    before: Option<String>,
    entries: Vec<WorkloadEntry>,
    _lock: File,
}

impl CliFile {
    pub fn open(dir: &Path) -> Result<CliFile, CliFileError> {
        let lock = lock(dir)?;
        let path = dir.join(NAME);
        let before = match std::fs::read_to_string(&path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(CliFileError::Io { action: "read", path, source }),
        };
        let file: EnrolFile = parse_toml(&path, before.as_deref().unwrap_or_default())
            .map_err(|error: ConfigError| EnrolError::from(error))?;
        let entries = file.workloads.into_iter().map(Spanned::into_inner).collect();
        Ok(CliFile { path, before, entries, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a workload, or replaces what this file said of the same selector. `now` is what all files say.
    pub fn enrol(&mut self, now: &Enrolment, selector: &Selector, entry: WorkloadEntry) -> Result<(), CliFileError> {
        self.only_ours(now, selector)?;
        self.forget(selector);
        self.entries.push(entry);
        Ok(())
    }

    pub fn unenrol(&mut self, now: &Enrolment, selector: &Selector) -> Result<(), CliFileError> {
        self.only_ours(now, selector)?;
        if self.forget(selector) { Ok(()) } else { Err(CliFileError::Unknown(selector.clone())) }
    }

    fn only_ours(&self, now: &Enrolment, selector: &Selector) -> Result<(), CliFileError> {
        match now.enrolled_by(selector) {
            Some(workload) if workload.origin.path != self.path => {
                Err(CliFileError::Elsewhere { selector: selector.clone(), origin: workload.origin.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Whether there was anything to forget.
    fn forget(&mut self, selector: &Selector) -> bool {
        let before = self.entries.len();
        self.entries.retain(|entry| entry.selector().as_ref() != Ok(selector));
        self.entries.len() != before
    }

    /// What the file shall say.
    pub fn text(&self) -> String {
        let mut entries = self.entries.clone();
        entries.sort_by_cached_key(|entry| entry.selector().ok());
        let workloads = entries.into_iter().map(|entry| Spanned::new(0..0, entry)).collect();
        let body = toml::to_string(&EnrolFile { workloads });
        format!("{HEADER}\n{}", body.expect("strings, numbers and lists of them are TOML"))
    }

    /// Replaces the file in one step: a reader sees the old one or the new one.
    pub fn write(&self) -> Result<(), CliFileError> {
        self.put(&self.text())
    }

    /// As it was when it was opened.
    pub fn restore(&self) -> Result<(), CliFileError> {
        match &self.before {
            Some(text) => self.put(text),
            None => std::fs::remove_file(&self.path).map_err(|source| self.failed("remove", source)),
        }
    }

    fn put(&self, text: &str) -> Result<(), CliFileError> {
        durable::replace(&self.path, text).map_err(|source| self.failed("write", source))
    }

    fn failed(&self, action: &'static str, source: io::Error) -> CliFileError {
        CliFileError::Io { action, path: self.path.clone(), source }
    }
}

/// Waits for whoever else is at it: that takes no longer than a reload.
fn lock(dir: &Path) -> Result<File, CliFileError> {
    let directory = File::open(dir).map_err(|source| EnrolError::List { path: dir.into(), source })?;
    let locked = directory.lock();
    locked.map_err(|source| CliFileError::Io { action: "lock", path: dir.into(), source })?;
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enrol::{CheckEntry, ClientAddress, Mode, Reserved, ServeEntry, load};
    use meshd_identity::TrustDomain;

    fn domain() -> TrustDomain {
        "mesh.example".parse().unwrap()
    }

    fn entry(selector: &Selector, name: &str) -> WorkloadEntry {
        let serve = ServeEntry {
            service: format!("{name}.shop"),
            port: 80,
            deliver: Some("127.0.0.1:8080".parse().unwrap()),
            mode: Mode::Strict,
            client_address: ClientAddress::ProxyV2,
            local_ok: vec![997],
            plaintext_from: vec!["10.0.0.0/8".parse().unwrap()],
            check: Some(CheckEntry { tcp: true, ..CheckEntry::default() }),
            weight: Some(7),
            ..ServeEntry::default()
        };
        WorkloadEntry {
            namespace: "shop".into(),
            name: name.into(),
            serve: vec![Spanned::new(0..0, serve)],
            ..WorkloadEntry::of(selector)
        }
    }

    fn enrol(dir: &Path, selector: &Selector, name: &str) -> Result<(), CliFileError> {
        let mut file = CliFile::open(dir)?;
        file.enrol(&load(dir, &domain(), &Reserved::default()).unwrap(), selector, entry(selector, name))?;
        file.write()
    }

    #[test]
    fn what_is_written_is_what_was_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let web = Selector::unit("web.service").unwrap();
        enrol(dir.path(), &web, "web").unwrap();
        let enrolment = load(dir.path(), &domain(), &Reserved::default()).unwrap();
        let delivery = &enrolment.deliveries()[0];
        assert_eq!(
            (delivery.mode, &delivery.local_ok[..], delivery.plaintext_from.len()),
            (Mode::Strict, &[997][..], 1)
        );
        let published = delivery.published.as_ref().unwrap();
        assert!(published.check.is_some() && published.weight == Some(7), "{published:?}");
        assert_eq!(enrolment.enrolled_by(&web).unwrap().identity.short(), "ns/shop/sa/web");
        let text = std::fs::read_to_string(dir.path().join(NAME)).unwrap();
        assert!(text.starts_with("# Written by `meshd enrol`"), "{text}");
    }

    #[test]
    fn entries_are_sorted_and_a_second_enrolment_of_the_same_replaces_the_first() {
        let dir = tempfile::tempdir().unwrap();
        for (unit, name) in [("b.service", "b"), ("a.service", "a"), ("b.service", "other")] {
            enrol(dir.path(), &Selector::unit(unit).unwrap(), name).unwrap();
        }
        let enrolment = load(dir.path(), &domain(), &Reserved::default()).unwrap();
        let names: Vec<&str> = enrolment.workloads().iter().map(|workload| workload.identity.name()).collect();
        assert_eq!(names, ["a", "other"]);
    }

    #[test]
    fn what_another_file_enrols_is_left_to_that_file() {
        let dir = tempfile::tempdir().unwrap();
        let text = "\n[[workload]]\nunit = \"web.service\"\nnamespace = \"shop\"\nname = \"web\"\n";
        std::fs::write(dir.path().join("10-ansible.toml"), text).unwrap();
        let web = Selector::unit("web.service").unwrap();
        let error = enrol(dir.path(), &web, "mine").unwrap_err().to_string();
        assert!(error.contains("10-ansible.toml:2"), "{error}");
        let enrolment = load(dir.path(), &domain(), &Reserved::default()).unwrap();
        let error = CliFile::open(dir.path()).unwrap().unenrol(&enrolment, &web).unwrap_err().to_string();
        assert!(error.contains("10-ansible.toml:2") && !dir.path().join(NAME).exists(), "{error}");
    }

    #[test]
    fn an_unenrolled_workload_is_gone_and_an_unknown_one_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let web = Selector::unit("web.service").unwrap();
        enrol(dir.path(), &web, "web").unwrap();
        let unenrol = || {
            let mut file = CliFile::open(dir.path())?;
            file.unenrol(&load(dir.path(), &domain(), &Reserved::default()).unwrap(), &web)?;
            file.write()
        };
        unenrol().unwrap();
        assert!(load(dir.path(), &domain(), &Reserved::default()).unwrap().workloads().is_empty());
        assert!(unenrol().unwrap_err().to_string().contains("enrol --list"));
    }

    #[test]
    fn a_change_is_taken_back_to_the_letter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let by_hand = "# by hand\n[[workload]]\nuid = 7\nnamespace = \"shop\"\nname = \"user\"\n";
        std::fs::write(&path, by_hand).unwrap();
        let file = CliFile::open(dir.path()).unwrap();
        file.write().unwrap();
        assert_ne!(std::fs::read_to_string(&path).unwrap(), by_hand);
        file.restore().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), by_hand);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left behind");
    }
}
