//! The identity directory: two generations of one checksummed file, each written whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use meshd_identity::sha256;

use crate::state::State;

const SCHEMA: u64 = 1;
const SLOTS: [&str; 2] = ["identity.0", "identity.1"];
pub(crate) const MACHINE_ID: &str = "/etc/machine-id";

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{} holds no identity; run `meshd join --token-file PATH` on this host first", dir.display())]
    NotJoined { dir: PathBuf },
    #[error("cannot {action} {}: {source}; check owner, mode and free space", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "both generations of the identity in {} are damaged ({reason}); restore the directory from a backup, \
         or remove it and join again with a new token", dir.display()
    )]
    Damaged { dir: PathBuf, reason: String },
    #[error(
        "{} was written in schema {found}, this meshd reads schema 1; start the meshd version that wrote it, \
         or remove the directory and join again", path.display()
    )]
    Schema { path: PathBuf, found: u64 },
    #[error(
        "the identity in {} belongs to another machine (the machine-id differs), so this is probably a cloned image; \
         remove the directory and join with a token of its own", dir.display()
    )]
    OtherMachine { dir: PathBuf },
}

pub(crate) struct Store {
    dir: PathBuf,
    /// A hash of the machine-id; `None` on systems without one, which are then not bound.
    machine: Option<String>,
    generation: u64,
}

struct Generation {
    number: u64,
    machine: Option<String>,
    state: State,
}

/// Why one slot cannot be used.
enum Unusable {
    Absent,
    Damaged(String),
    Fatal(StoreError),
}

impl Store {
    pub(crate) fn new(dir: &Path, machine_id_file: &Path) -> Store {
        Store { dir: dir.to_owned(), machine: machine_binding(machine_id_file), generation: 0 }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The newest generation that is whole.
    pub(crate) fn load(&mut self) -> Result<State, StoreError> {
        let mut newest: Option<Generation> = None;
        let mut damage = Vec::new();
        for slot in SLOTS {
            match self.read(slot) {
                Ok(found) if newest.as_ref().is_none_or(|other| other.number < found.number) => newest = Some(found),
                Ok(_) | Err(Unusable::Absent) => {}
                Err(Unusable::Damaged(reason)) => damage.push(format!("{slot}: {reason}")),
                Err(Unusable::Fatal(error)) => return Err(error),
            }
        }
        let damage = damage.join("; ");
        let Some(found) = newest else {
            let dir = self.dir.clone();
            return Err(match damage.is_empty() {
                true => StoreError::NotJoined { dir },
                false => StoreError::Damaged { dir, reason: damage },
            });
        };
        if !damage.is_empty() {
            tracing::warn!(dir = %self.dir.display(), %damage, "a generation of the identity is damaged, using the other");
        }
        if found.machine.is_some() && self.machine.is_some() && found.machine != self.machine {
            return Err(StoreError::OtherMachine { dir: self.dir.clone() });
        }
        self.generation = found.number;
        Ok(found.state)
    }

    /// Writes the next generation over the older of the two.
    pub(crate) fn save(&mut self, state: &State) -> Result<(), StoreError> {
        let next = self.generation + 1;
        let body = state.to_json();
        let machine = self.machine.as_deref().unwrap_or("-");
        let covered = format!("schema={SCHEMA} generation={next} machine={machine}\n");
        let sum = HEXLOWER.encode(&sha256(&[covered.as_bytes(), &body].concat()));
        let file = [format!("sha256={sum} {covered}").as_bytes(), &body].concat();
        self.write(SLOTS[usize::from(next % 2 == 1)], &file)?;
        self.generation = next;
        Ok(())
    }

    /// Writes a private file whole or not at all.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> Result<(), StoreError> {
        let path = self.dir.join(name);
        let temporary = self.dir.join(format!("{name}.tmp"));
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io { action, path, source }
        };
        self.make_dir()?;
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&temporary).map_err(io("create", &temporary))?;
        file.write_all(content).map_err(io("write", &temporary))?;
        file.sync_all().map_err(io("sync", &temporary))?;
        fs::rename(&temporary, &path).map_err(io("replace", &path))?;
        self.sync_dir()
    }

    pub(crate) fn remove(&self, name: &str) -> Result<(), StoreError> {
        let path = self.dir.join(name);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::Io { action: "remove", path, source })
            }
            _ => self.sync_dir(),
        }
    }

    fn make_dir(&self) -> Result<(), StoreError> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.map_err(|source| StoreError::Io { action: "create", path: self.dir.clone(), source })
    }

    fn sync_dir(&self) -> Result<(), StoreError> {
        let synced = File::open(&self.dir).and_then(|dir| dir.sync_all());
        synced.map_err(|source| StoreError::Io { action: "sync", path: self.dir.clone(), source })
    }

    fn read(&self, slot: &str) -> Result<Generation, Unusable> {
        let path = self.dir.join(slot);
        match fs::read(&path) {
            Ok(bytes) => parse(&path, &bytes),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Unusable::Absent),
            Err(source) => Err(Unusable::Fatal(StoreError::Io { action: "read", path, source })),
        }
    }
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Generation, Unusable> {
    let damaged = |reason: &str| Unusable::Damaged(reason.to_owned());
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or_else(|| damaged("no header"))?;
    let header = std::str::from_utf8(&bytes[..end]).map_err(|_| damaged("header is not text"))?;
    let (sum, rest) = header.split_once(' ').ok_or_else(|| damaged("short header"))?;
    let covered = &bytes[sum.len() + 1..];
    if sum != format!("sha256={}", HEXLOWER.encode(&sha256(covered))) {
        return Err(damaged("the checksum does not match"));
    }
    let field = |name: &str| rest.split(' ').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
    let number = |name: &str| field(name).and_then(|value| value.parse::<u64>().ok());
    let schema = number("schema").ok_or_else(|| damaged("no schema"))?;
    if schema != SCHEMA {
        return Err(Unusable::Fatal(StoreError::Schema { path: path.to_owned(), found: schema }));
    }
    let generation = number("generation").ok_or_else(|| damaged("no generation"))?;
    let machine = field("machine").filter(|value| *value != "-").map(str::to_owned);
    let state = State::from_json(&bytes[end + 1..]).map_err(Unusable::Damaged)?;
    Ok(Generation { number: generation, machine, state })
}

/// The machine-id itself is confidential (machine-id(5)), so only a hash of it is stored.
fn machine_binding(file: &Path) -> Option<String> {
    let id = fs::read_to_string(file).ok()?;
    let id = id.trim();
    (!id.is_empty()).then(|| HEXLOWER.encode(&sha256(format!("meshd identity\0{id}").as_bytes())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tempfile::TempDir;

    use super::*;
    use crate::state::tests::sample;

    struct Host {
        dir: TempDir,
    }

    impl Host {
        fn new() -> Host {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("machine-id"), "aaaa\n").unwrap();
            Host { dir }
        }

        fn identity(&self) -> PathBuf {
            self.dir.path().join("identity")
        }

        fn store(&self) -> Store {
            Store::new(&self.identity(), &self.dir.path().join("machine-id"))
        }

        fn loaded_host(&self) -> String {
            self.store().load().unwrap().credentials.host_id
        }
    }

    #[test]
    fn a_fresh_directory_says_how_to_join() {
        let error = Host::new().store().load().err().unwrap().to_string();
        assert!(error.contains("meshd join"), "{error}");
    }

    #[test]
    fn the_newest_generation_wins_and_files_are_private() {
        let host = Host::new();
        let mut store = host.store();
        for name in ["first", "second", "third"] {
            store.save(&sample(name)).unwrap();
            assert_eq!(host.loaded_host(), name);
        }
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&host.identity()), 0o700);
        assert_eq!(mode(&host.identity().join("identity.0")), 0o600);
    }

    #[test]
    fn a_reopened_store_continues_the_count() {
        let host = Host::new();
        host.store().save(&sample("first")).unwrap();
        let mut store = host.store();
        store.load().unwrap();
        store.save(&sample("second")).unwrap();
        assert_eq!(host.loaded_host(), "second");
    }

    #[test]
    fn a_damaged_generation_falls_back_to_the_other() {
        let host = Host::new();
        let mut store = host.store();
        store.save(&sample("first")).unwrap();
        store.save(&sample("second")).unwrap();
        let newest = host.identity().join("identity.0");
        let whole = fs::read(&newest).unwrap();
        for cut in [0, 10, whole.len() / 2, whole.len() - 1] {
            fs::write(&newest, &whole[..cut]).unwrap();
            assert_eq!(host.loaded_host(), "first", "cut at {cut}");
        }
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 1;
        fs::write(&newest, &flipped).unwrap();
        assert_eq!(host.loaded_host(), "first");
        fs::write(host.identity().join("identity.1"), "x").unwrap();
        let error = host.store().load().err().unwrap().to_string();
        assert!(error.contains("damaged") && error.contains("join again"), "{error}");
    }

    #[test]
    fn a_leftover_temporary_file_does_no_harm() {
        let host = Host::new();
        host.store().save(&sample("first")).unwrap();
        fs::write(host.identity().join("identity.0.tmp"), "half").unwrap();
        assert_eq!(host.loaded_host(), "first");
    }

    #[test]
    fn a_cloned_image_is_refused_with_the_remedy() {
        let host = Host::new();
        host.store().save(&sample("web")).unwrap();
        fs::write(host.dir.path().join("machine-id"), "bbbb\n").unwrap();
        let error = host.store().load().err().unwrap();
        assert!(matches!(error, StoreError::OtherMachine { .. }));
        assert!(error.to_string().contains("token of its own"));
    }

    #[test]
    fn a_future_schema_is_not_guessed_at() {
        let host = Host::new();
        host.store().save(&sample("web")).unwrap();
        let covered = "schema=9 generation=8 machine=-\n{}";
        let sum = HEXLOWER.encode(&sha256(covered.as_bytes()));
        fs::write(host.identity().join("identity.0"), format!("sha256={sum} {covered}")).unwrap();
        assert!(matches!(host.store().load(), Err(StoreError::Schema { found: 9, .. })));
    }
}
