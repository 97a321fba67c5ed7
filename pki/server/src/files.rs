//! Files others replace while we run, read level-triggered: again and again, compared by content. No watch can die
//! silently, a rename, a symbolic link that moves and a write in place are all the same, and what is worse than what
//! we have is not taken.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use meshd_identity::sha256;

/// A new file is in use within this time.
pub(crate) const READ_EVERY: Duration = Duration::from_secs(30);
/// Certificates and keys are a few KiB; a mistaken path may be anything.
const MAX_BYTES: u64 = 1024 * 1024;

/// Some files that make sense together only.
pub(crate) struct Files {
    paths: Vec<PathBuf>,
    /// Of the content that was last looked at, good or bad.
    seen: Option<[u8; 32]>,
}

impl Files {
    pub(crate) fn new(paths: &[&Path]) -> Files {
        Files { paths: paths.iter().map(|path| (*path).to_owned()).collect(), seen: None }
    }

    /// What was read last is to be judged again: what was wrong with it may pass by itself.
    pub(crate) fn forget(&mut self) {
        self.seen = None;
    }

    /// The contents, when they differ from those read last. Half of a replacement is read as an error of whoever judges
    /// it, and read again the next time.
    pub(crate) fn changed(&mut self) -> Result<Option<Vec<Vec<u8>>>, String> {
        let read = |path: &PathBuf| {
            let content = read_bounded(path).map_err(|error| format!("cannot read {}: {error}", path.display()));
            if content.is_err() {
                self.seen = None;
            }
            content
        };
        let contents = self.paths.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        let digests: Vec<u8> = contents.iter().flat_map(|content| sha256(content)).collect();
        let digest = sha256(&digests);
        if self.seen == Some(digest) {
            return Ok(None);
        }
        self.seen = Some(digest);
        Ok(Some(contents))
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut content = Vec::new();
    std::fs::File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_BYTES {
        return Err(io::Error::other("it has more than 1 MiB"));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_change_is_seen_once_however_it_was_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cert.pem");
        let mut files = Files::new(&[&path]);
        assert!(files.changed().unwrap_err().contains("cert.pem"));
        std::fs::write(&path, "one").unwrap();
        assert_eq!(files.changed().unwrap(), Some(vec![b"one".to_vec()]));
        assert_eq!(files.changed().unwrap(), None);
        std::fs::write(dir.path().join("new"), "two").unwrap();
        std::fs::rename(dir.path().join("new"), &path).unwrap();
        assert_eq!(files.changed().unwrap(), Some(vec![b"two".to_vec()]));
        std::fs::write(dir.path().join("three"), "three").unwrap();
        symlink("three", dir.path().join("..data")).unwrap();
        std::fs::remove_file(&path).unwrap();
        symlink("..data", &path).unwrap();
        assert_eq!(files.changed().unwrap(), Some(vec![b"three".to_vec()]));
        std::fs::write(&path, "in place").unwrap();
        assert!(files.changed().unwrap().is_some());
        std::fs::remove_file(dir.path().join("three")).unwrap();
        assert!(files.changed().is_err());
        std::fs::write(&path, "in place").unwrap();
        assert!(files.changed().unwrap().is_some(), "what came back is judged again");
    }

    #[test]
    fn a_file_that_cannot_be_what_we_want_is_not_read_whole() {
        assert!(Files::new(&[Path::new("/dev/zero")]).changed().unwrap_err().contains("1 MiB"));
    }
}
