//! Without systemd-resolved: enrolled units see a resolv.conf of their own, bound over the host's by a drop-in.
//!
//! Drop-ins lie in /etc, so that units that start before meshd at boot have them, and so does what they bind. The bind
//! pins the file, hence it is always rewritten in place, and its source may be missing: a unit always starts.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::resolv_conf::{MARK, ResolvConf, with_ours_first};
use super::super::upstream::Stamp;
use super::{IntegrationError, tools};
use crate::host;

/// Where systemd reads drop-ins that survive a reboot.
pub const DIRECTORY: &str = "/etc/systemd/system";
const DROP_IN: &str = "50-meshd-dns.conf";
/// In the state directory.
pub(super) const RESOLV_CONF: &str = "resolv.conf";
const TARGET: &str = "/etc/resolv.conf";

/// The drop-ins of this host, and the file they bind.
pub struct DropIns {
    directory: PathBuf,
    resolv_conf: PathBuf,
}

impl DropIns {
    /// The daemon's own; `state_dir` is the one of meshd.toml.
    pub fn new(state_dir: &Path) -> DropIns {
        DropIns { directory: DIRECTORY.into(), resolv_conf: state_dir.join(RESOLV_CONF) }
    }

    /// True when something changed: systemd must then be told (`reload`), and units started anew.
    pub fn install<'u>(&self, units: impl IntoIterator<Item = &'u str>) -> Result<bool, IntegrationError> {
        let text = self.text()?;
        let mut changed = false;
        for unit in units.into_iter().filter(|unit| is_service(unit)) {
            let path = self.path(unit);
            if fs::read_to_string(&path).is_ok_and(|found| found == text) {
                continue;
            }
            let directory = self.directory.join(format!("{unit}.d"));
            fs::create_dir_all(&directory).map_err(IntegrationError::file("create", &directory))?;
            fs::write(&path, &text).map_err(IntegrationError::file("write", &path))?;
            changed = true;
        }
        Ok(changed)
    }

    /// True when something changed.
    pub fn remove<'u>(&self, units: impl IntoIterator<Item = &'u str>) -> Result<bool, IntegrationError> {
        let mut changed = false;
        for unit in units.into_iter().filter(|unit| is_service(unit)) {
            changed |= remove(&self.path(unit))?;
        }
        Ok(changed)
    }

    /// Units that have ours.
    fn installed(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".d").map(str::to_owned));
        names.filter(|unit| is_ours(&self.path(unit))).collect()
    }

    fn path(&self, unit: &str) -> PathBuf {
        self.directory.join(format!("{unit}.d")).join(DROP_IN)
    }

    fn text(&self) -> Result<String, IntegrationError> {
        let source = self.resolv_conf.to_str().filter(|source| source.bytes().all(is_plain));
        let source =
            source.ok_or(IntegrationError::Impossible("state_dir has characters that a unit file cannot name"))?;
        Ok(format!("{MARK} removed by `meshd intercept revert`.\n[Service]\nBindReadOnlyPaths=-{source}:{TARGET}\n"))
    }
}

/// systemd's own separators and specifiers would need quoting.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"/._-".contains(&byte)
}

/// Scopes have no drop-ins that bind, and a name is never a path.
fn is_service(unit: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    unit.ends_with(".service") && unit.len() < 256 && !unit.starts_with('.') && unit.bytes().all(allowed)
}

fn is_ours(path: &Path) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.starts_with(MARK))
}

/// The directory goes too when nothing else is in it.
fn remove(path: &Path) -> Result<bool, IntegrationError> {
    if !is_ours(path) {
        return Ok(false);
    }
    fs::remove_file(path).map_err(IntegrationError::file("remove", path))?;
    let _ = path.parent().map(fs::remove_dir);
    Ok(true)
}

/// Removes every drop-in of ours in `directory`, whichever daemon left it, or only those that bind the file `bound`.
pub(super) fn remove_all(directory: &Path, bound: Option<&PathBuf>) -> Result<(), IntegrationError> {
    let drop_ins = DropIns { directory: directory.into(), resolv_conf: bound.cloned().unwrap_or_default() };
    let mut installed = drop_ins.installed();
    if bound.is_some() {
        let text = drop_ins.text()?;
        installed.retain(|unit| fs::read_to_string(drop_ins.path(unit)).is_ok_and(|found| found == text));
    }
    if drop_ins.remove(installed.iter().map(String::as_str))? && host::systemd_runs() {
        reload()?;
    }
    Ok(())
}

/// systemd reads its unit files again.
pub fn reload() -> Result<(), IntegrationError> {
    Ok(tools::run("systemctl", &["--no-ask-password", "daemon-reload"])?)
}

/// Keeps the file like the host's, and drop-ins for exactly the enrolled units.
pub(super) struct Units {
    ours: IpAddr,
    host_file: PathBuf,
    drop_ins: DropIns,
    seen: Option<Stamp>,
    /// The host's file itself, its content aside: what units' binds hang on.
    place: Option<(u64, u64)>,
    kept: Option<Vec<Arc<str>>>,
    /// Drop-ins have changed and systemd has not read them.
    reload_due: bool,
    reload: fn() -> Result<(), IntegrationError>,
}

impl Units {
    pub(super) fn new(state_dir: &Path, ours: IpAddr, host_file: PathBuf) -> Units {
        Units {
            ours,
            host_file,
            drop_ins: DropIns::new(state_dir),
            seen: None,
            place: None,
            kept: None,
            reload_due: false,
            reload,
        }
    }

    pub(super) fn keep(&mut self, enrolled: &[Arc<str>]) -> Result<(), IntegrationError> {
        self.follow_host_file()?;
        self.follow_enrolment(enrolled)?;
        let place = fs::metadata(&self.host_file).ok().map(|found| (found.dev(), found.ino()));
        if self.place.is_some() && place.is_some() && self.place != place {
            bind_again(&self.drop_ins.resolv_conf, enrolled);
        }
        self.place = place.or(self.place);
        Ok(())
    }

    /// Names reach units another way.
    pub(super) fn withdraw(&mut self) -> Result<(), IntegrationError> {
        self.follow_enrolment(&[])
    }

    /// Somebody else removed what was installed.
    pub(super) fn forget(&mut self) {
        self.kept = None;
    }

    fn follow_host_file(&mut self) -> Result<(), IntegrationError> {
        let seen = Stamp::of(&self.host_file);
        if seen.is_some() && seen == self.seen {
            return Ok(());
        }
        let host = fs::read_to_string(&self.host_file).map(|text| ResolvConf::parse(&text)).unwrap_or_default();
        let path = &self.drop_ins.resolv_conf;
        write_in_place(path, &with_ours_first(self.ours, &host)).map_err(IntegrationError::file("write", path))?;
        self.seen = seen;
        Ok(())
    }

    fn follow_enrolment(&mut self, enrolled: &[Arc<str>]) -> Result<(), IntegrationError> {
        if self.kept.as_deref() != Some(enrolled) {
            let changed = self.change_drop_ins(enrolled);
            self.reload_due |= !matches!(changed, Ok(false));
            changed?;
            self.kept = Some(enrolled.to_vec());
        }
        if self.reload_due {
            (self.reload)()?;
            self.reload_due = false;
            tracing::info!("names of the mesh resolve in enrolled units from their next start on");
        }
        Ok(())
    }

    /// True when something changed.
    fn change_drop_ins(&self, enrolled: &[Arc<str>]) -> Result<bool, IntegrationError> {
        let gone = self.drop_ins.installed().into_iter().filter(|unit| !enrolled.iter().any(|kept| **kept == **unit));
        let gone: Vec<String> = gone.collect();
        let removed = self.drop_ins.remove(gone.iter().map(String::as_str))?;
        let installed = self.drop_ins.install(enrolled.iter().map(AsRef::as_ref))?;
        Ok(removed || installed)
    }
}

/// Whoever replaces the host's file by rename takes the bind away from running units. systemd can put it back into
/// those that have a mount namespace of their own, which the drop-in gave them.
fn bind_again(source: &Path, enrolled: &[Arc<str>]) {
    let Some(source) = source.to_str() else { return };
    for unit in enrolled.iter().filter(|unit| is_service(unit)) {
        // Not running, or not started anew since it was enrolled.
        if let Err(error) = tools::run("systemctl", &["--no-ask-password", "bind", "--read-only", unit, source, TARGET])
        {
            tracing::debug!(%error, %unit, "resolv.conf not bound again");
        }
    }
}

/// One write, then cut to length: readers and binds keep the file.
fn write_in_place(path: &Path, text: &str) -> io::Result<()> {
    if fs::read_to_string(path).is_ok_and(|found| found == text) {
        return Ok(());
    }
    let mut file = File::options().write(true).create(true).truncate(false).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    file.write_all(text.as_bytes())?;
    file.set_len(text.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Etc {
        directory: tempfile::TempDir,
        units: Units,
    }

    impl Etc {
        fn new() -> Etc {
            let directory = tempfile::tempdir().unwrap();
            let at = |name: &str| directory.path().join(name);
            let mut units = Units::new(directory.path(), [127, 0, 0, 1].into(), at("host.conf"));
            units.drop_ins = DropIns { directory: at("system"), resolv_conf: at("resolv.conf") };
            Etc { directory, units }
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.directory.path().join(name)).unwrap()
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.directory.path().join(name), text).unwrap();
        }
    }

    #[test]
    fn a_unit_gets_a_drop_in_once_and_only_ours_is_removed() {
        let etc = Etc::new();
        fs::create_dir_all(etc.directory.path().join("system/web.service.d")).unwrap();
        etc.write("system/web.service.d/local.conf", "[Service]\n");
        let drop_ins = DropIns {
            directory: etc.directory.path().join("system"),
            resolv_conf: "/var/lib/meshd/resolv.conf".into(),
        };
        assert!(drop_ins.install(["web.service", "pg@15.service"]).unwrap());
        assert!(!drop_ins.install(["web.service", "pg@15.service"]).unwrap());
        let expected = "# Written by meshd: removed by `meshd intercept revert`.\n[Service]\n\
                        BindReadOnlyPaths=-/var/lib/meshd/resolv.conf:/etc/resolv.conf\n";
        assert_eq!(etc.read("system/web.service.d/50-meshd-dns.conf"), expected);
        assert!(drop_ins.remove(["web.service", "pg@15.service", "other.service"]).unwrap());
        assert!(!drop_ins.remove(["web.service", "pg@15.service"]).unwrap());
        assert_eq!(etc.read("system/web.service.d/local.conf"), "[Service]\n");
        assert!(!etc.directory.path().join("system/pg@15.service.d").exists());
    }

    #[test]
    fn a_failed_reload_is_tried_again_and_drop_ins_taken_away_come_back() {
        let mut etc = Etc::new();
        let web = [Arc::from("web.service")];
        etc.units.reload = || Err(IntegrationError::Impossible("no"));
        assert!(etc.units.keep(&web).is_err());
        assert!(etc.units.keep(&web).is_err(), "systemd still has not read it");
        etc.units.reload = || Ok(());
        etc.units.keep(&web).unwrap();
        etc.units.reload = || Err(IntegrationError::Impossible("nothing changed"));
        etc.units.keep(&web).unwrap();
        etc.units.reload = || Ok(());
        remove_all(&etc.units.drop_ins.directory, Some(&"/elsewhere/resolv.conf".into())).unwrap();
        assert_eq!(etc.units.drop_ins.installed(), ["web.service"], "another daemon's");
        etc.units.drop_ins.remove(["web.service"]).unwrap();
        etc.units.forget();
        etc.units.keep(&web).unwrap();
        assert_eq!(etc.units.drop_ins.installed(), ["web.service"]);
        etc.units.withdraw().unwrap();
        assert_eq!(etc.units.drop_ins.installed(), Vec::<String>::new());
    }

    #[test]
    fn somebody_elses_file_of_the_same_name_stays() {
        let etc = Etc::new();
        fs::create_dir_all(etc.directory.path().join("system/web.service.d")).unwrap();
        etc.write("system/web.service.d/50-meshd-dns.conf", "[Service]\n");
        assert!(!etc.units.drop_ins.remove(["web.service"]).unwrap());
        assert_eq!(etc.units.drop_ins.installed(), Vec::<String>::new());
    }

    #[test]
    fn scopes_uids_and_paths_get_none() {
        let etc = Etc::new();
        let units = ["docker-1.scope", "uid:1001", "../../x.service", ".service", "a b.service", "user.slice"];
        assert!(!etc.units.drop_ins.install(units).unwrap());
        assert!(!etc.directory.path().join("system").exists());
    }

    #[test]
    fn a_state_dir_that_unit_files_cannot_name_is_refused() {
        let drop_ins = DropIns::new(Path::new("/var/lib/my meshd"));
        assert!(drop_ins.install(["web.service"]).unwrap_err().to_string().contains("state_dir"));
    }

    #[test]
    fn the_file_follows_the_hosts_and_stays_the_same_file() {
        let mut etc = Etc::new();
        etc.write("host.conf", "nameserver 10.0.0.2\nsearch a-very-long-domain.example another.example\n");
        etc.units.keep(&[]).unwrap();
        let inode = fs::metadata(etc.directory.path().join("resolv.conf")).unwrap().ino();
        assert!(etc.read("resolv.conf").contains("nameserver 127.0.0.1\nnameserver 10.0.0.2\nsearch a-very"));
        etc.write("new.conf", "nameserver 10.0.0.3\n");
        fs::rename(etc.directory.path().join("new.conf"), etc.directory.path().join("host.conf")).unwrap();
        etc.units.keep(&[]).unwrap();
        assert!(etc.read("resolv.conf").ends_with("nameserver 127.0.0.1\nnameserver 10.0.0.3\n"));
        let found = fs::metadata(etc.directory.path().join("resolv.conf")).unwrap();
        assert_eq!((found.ino(), found.mode() & 0o777), (inode, 0o644));
    }
}
