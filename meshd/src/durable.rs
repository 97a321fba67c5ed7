//! Files that must be whole whatever happens meanwhile.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// Replaces a file, readable by everybody. After a crash or a power cut there is the old one or the new one, never
/// half; who may rename need not own it.
pub fn replace(path: &Path, text: impl AsRef<[u8]>) -> io::Result<()> {
    // Whatever the umask says: root and the daemon read each other's files, and there is nothing secret in them.
    put(path, text.as_ref(), |file| file.set_permissions(Permissions::from_mode(0o644)))
}

/// The same for a file of somebody else's: it stays theirs, for those who may read it.
pub fn replace_in_kind(path: &Path, text: &str) -> io::Result<()> {
    let was = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return replace(path, text),
        was => was?,
    };
    put(path, text.as_bytes(), |file| {
        let now = file.metadata()?;
        if (now.uid(), now.gid()) != (was.uid(), was.gid()) {
            fchown(file, Some(was.uid()), Some(was.gid()))?;
        }
        file.set_permissions(was.permissions())
    })
}

fn put(path: &Path, text: &[u8], dress: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    let temporary = beside(path);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    dress(&file)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    // Without this the new name may be lost; without the sync before, the contents behind it.
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

/// Never ends like the file itself, so nobody who lists the directory takes it for one.
fn beside(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".meshd-new");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_everybody_may_read_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        for text in ["one", "two, longer", "3"] {
            replace(&path, text).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "something is left behind");
    }

    #[test]
    fn somebody_elses_file_keeps_its_mode_and_a_new_one_is_for_everybody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("payments.yaml");
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        replace_in_kind(&path, "one").unwrap();
        assert_eq!(mode(), 0o644);
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        replace_in_kind(&path, "two").unwrap();
        assert_eq!((mode(), fs::read_to_string(&path).unwrap().as_str()), (0o640, "two"));
    }

    #[test]
    fn a_leftover_of_another_users_crash_does_not_stop_it_and_a_link_there_leads_nowhere() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("state.json"), directory.path().join("other"));
        fs::write(beside(&path), "half").unwrap();
        fs::set_permissions(beside(&path), Permissions::from_mode(0o400)).unwrap();
        replace(&path, "one").unwrap();
        fs::write(&other, "somebody's").unwrap();
        std::os::unix::fs::symlink(&other, beside(&path)).unwrap();
        replace(&path, "two").unwrap();
        assert_eq!(fs::read_to_string(&other).unwrap(), "somebody's");
        assert!(!beside(&path).exists() && !path.is_symlink());
    }

    #[test]
    fn what_cannot_be_written_leaves_the_old_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        replace(&path, "one").unwrap();
        fs::create_dir(beside(&path)).unwrap();
        replace(&path, "two").unwrap_err();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one");
    }
}
