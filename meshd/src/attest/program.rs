//! The program a process runs, held by a descriptor.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::time::{Duration, SystemTime};

use nix::fcntl::OFlag;

/// Which file it is, and which version of it: whatever changes the content changes this, once a tick of the file system
/// has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileId {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl FileId {
    pub(super) fn of(found: &Metadata) -> FileId {
        FileId {
            dev: found.dev(),
            ino: found.ino(),
            size: found.size(),
            mtime: (found.mtime(), found.mtime_nsec()),
            ctime: (found.ctime(), found.ctime_nsec()),
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// When anything of it was changed.
    pub(super) fn changed(&self) -> SystemTime {
        let (seconds, nanoseconds) = self.ctime;
        let since = Duration::new(seconds.max(0).cast_unsigned(), u32::try_from(nanoseconds).unwrap_or(0));
        SystemTime::UNIX_EPOCH + since
    }

    /// Whether a later change shows: it gets the time of then. That of this one may be yet to come, where the clock was
    /// ahead.
    pub(super) fn is_settled(&self, now: SystemTime, tick: Duration) -> bool {
        let apart = now.duration_since(self.changed()).unwrap_or_else(|ahead| ahead.duration());
        apart >= tick
    }
}

#[derive(Debug)]
pub struct Program {
    /// For naming it only: whether it may be read is its owner's to say.
    file: File,
    id: FileId,
}

impl Program {
    /// Fails without the right to look at other users' processes.
    pub fn of(pid: i32) -> io::Result<Program> {
        let file = OpenOptions::new().read(true).custom_flags(OFlag::O_PATH.bits()).open(format!("/proc/{pid}/exe"))?;
        let id = FileId::of(&file.metadata()?);
        Ok(Program { file, id })
    }

    pub(super) fn id(&self) -> FileId {
        self.id
    }

    /// Whether both are one file, in whatever version.
    pub fn is(&self, other: &Program) -> bool {
        (self.id.dev, self.id.ino) == (other.id.dev, other.id.ino)
    }

    /// Where this host has it. In another mount namespace the same path may lead to another file, and a file that was
    /// replaced has none any more.
    pub fn path(&self) -> Option<String> {
        let path = fs::read_link(self.link()).ok()?;
        let there = fs::metadata(&path).ok()?;
        if (there.dev(), there.ino()) != (self.id.dev, self.id.ino) {
            return None;
        }
        path.to_str().map(str::to_owned)
    }

    /// For reading; the same file, also when another one has its name by now.
    pub(super) fn open(&self) -> io::Result<File> {
        File::open(self.link())
    }

    fn link(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A program of our own that waits for the end of its input.
    fn started(program: &std::path::Path) -> Child {
        Command::new(program).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    }

    #[test]
    fn a_program_is_known_by_its_path_until_another_has_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(dir.path()).unwrap().join("cat");
        fs::copy("/bin/cat", &path).unwrap();
        let mut child = started(&path);
        let program = Program::of(child.id().cast_signed()).unwrap();
        assert_eq!(program.path().as_deref(), path.to_str());
        assert!(program.is(&Program::of(child.id().cast_signed()).unwrap()));
        assert!(!program.is(&Program::of(std::process::id().cast_signed()).unwrap()));
        fs::rename(&path, path.with_extension("old")).unwrap();
        fs::copy("/bin/cat", &path).unwrap();
        assert_ne!(program.path().as_deref(), path.to_str());
        fs::remove_file(path.with_extension("old")).unwrap();
        assert_eq!(program.path(), None);
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
