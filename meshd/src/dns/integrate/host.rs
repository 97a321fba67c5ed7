//! Only when asked: /etc/resolv.conf itself names us first. The original is kept beside it and comes back.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::super::resolv_conf::{MARK, ResolvConf, with_ours_first};
use super::IntegrationError;
use crate::durable;

pub(super) struct HostFile {
    ours: IpAddr,
    path: PathBuf,
}

impl HostFile {
    pub(super) fn new(ours: IpAddr, path: PathBuf) -> HostFile {
        HostFile { ours, path }
    }

    /// Whoever writes the file anew (DHCP, NetworkManager) has written a new original.
    pub(super) fn keep(&self) -> Result<(), IntegrationError> {
        let fail = |doing| IntegrationError::file(doing, &self.path);
        let found = fs::read_to_string(&self.path).map_err(fail("read"))?;
        let saved = self.beside("meshd-saved");
        let text = if found.starts_with(MARK) {
            // Ours, perhaps from before the address was changed.
            let original = fs::read_to_string(&saved).unwrap_or_else(|_| found.clone());
            with_ours_first(self.ours, &ResolvConf::parse(&original))
        } else {
            remove_if_there(&saved)
                .and_then(|()| duplicate(&self.path, &saved))
                .map_err(IntegrationError::file("write", &saved))?;
            with_ours_first(self.ours, &ResolvConf::parse(&found))
        };
        if text == found {
            return Ok(());
        }
        durable::replace(&self.path, text).map_err(fail("replace"))?;
        tracing::info!(path = %self.path.display(), saved = %saved.display(), "the host's resolv.conf names meshd first");
        Ok(())
    }

    /// The original comes back, unless somebody has written another since.
    pub(super) fn restore(&self) -> Result<(), IntegrationError> {
        let saved = self.beside("meshd-saved");
        if fs::symlink_metadata(&saved).is_err() {
            return Ok(());
        }
        // One that is not there is nobody's: better the saved one than none.
        let theirs = fs::read_to_string(&self.path).is_ok_and(|text| !text.starts_with(MARK));
        let done = if theirs { fs::remove_file(&saved) } else { fs::rename(&saved, &self.path) };
        done.map_err(IntegrationError::file("restore", &self.path))
    }

    pub(super) fn is_ours(&self) -> bool {
        fs::read_to_string(&self.path).is_ok_and(|text| text.starts_with(MARK))
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(".");
        name.push(suffix);
        name.into()
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A link stays a link: to resolved's file, say.
fn duplicate(from: &Path, to: &Path) -> io::Result<()> {
    match fs::read_link(from) {
        Ok(target) => symlink(target, to),
        Err(_) => fs::hard_link(from, to),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn file() -> (tempfile::TempDir, HostFile) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("resolv.conf");
        fs::write(&path, "nameserver 10.0.0.2\n").unwrap();
        (directory, HostFile::new(OURS, path))
    }

    fn names(directory: &tempfile::TempDir) -> Vec<String> {
        let entries = fs::read_dir(directory.path()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn ours_comes_first_and_the_original_comes_back() {
        let (directory, file) = file();
        file.keep().unwrap();
        file.keep().unwrap();
        assert!(fs::read_to_string(&file.path).unwrap().ends_with("nameserver 127.0.0.1\nnameserver 10.0.0.2\n"));
        file.restore().unwrap();
        file.restore().unwrap();
        assert_eq!(fs::read_to_string(&file.path).unwrap(), "nameserver 10.0.0.2\n");
        assert_eq!(names(&directory), ["resolv.conf"]);
    }

    #[test]
    fn another_address_of_ours_is_written_and_a_lost_file_comes_back() {
        let (directory, file) = file();
        file.keep().unwrap();
        let file = HostFile::new([127, 0, 0, 2].into(), file.path);
        file.keep().unwrap();
        assert!(fs::read_to_string(&file.path).unwrap().ends_with("nameserver 127.0.0.2\nnameserver 10.0.0.2\n"));
        fs::remove_file(&file.path).unwrap();
        file.restore().unwrap();
        assert_eq!(fs::read_to_string(&file.path).unwrap(), "nameserver 10.0.0.2\n");
        assert_eq!(names(&directory), ["resolv.conf"]);
    }

    #[test]
    fn a_link_is_a_link_again_afterwards() {
        let (directory, file) = file();
        fs::rename(&file.path, directory.path().join("stub.conf")).unwrap();
        symlink("stub.conf", &file.path).unwrap();
        file.keep().unwrap();
        assert!(fs::read_link(&file.path).is_err());
        assert_eq!(fs::read_to_string(directory.path().join("stub.conf")).unwrap(), "nameserver 10.0.0.2\n");
        file.restore().unwrap();
        assert_eq!(fs::read_link(&file.path).unwrap(), Path::new("stub.conf"));
    }

    #[test]
    fn a_file_written_anew_by_others_is_the_new_original() {
        let (directory, file) = file();
        file.keep().unwrap();
        let lease = directory.path().join("lease");
        fs::write(&lease, "nameserver 10.0.0.9\n").unwrap();
        fs::rename(&lease, &file.path).unwrap();
        file.keep().unwrap();
        assert!(fs::read_to_string(&file.path).unwrap().contains("nameserver 127.0.0.1\nnameserver 10.0.0.9\n"));
        file.restore().unwrap();
        assert_eq!(fs::read_to_string(&file.path).unwrap(), "nameserver 10.0.0.9\n");
    }

    #[test]
    fn what_others_wrote_since_is_not_overwritten_by_restoring() {
        let (directory, file) = file();
        file.keep().unwrap();
        fs::write(&file.path, "nameserver 10.0.0.9\n").unwrap();
        file.restore().unwrap();
        assert_eq!(fs::read_to_string(&file.path).unwrap(), "nameserver 10.0.0.9\n");
        assert_eq!(names(&directory), ["resolv.conf"]);
    }
}
