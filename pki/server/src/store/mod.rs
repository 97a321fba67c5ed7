//! What a PKI remembers: records under keys, changed in transactions. The same on SQLite (one server) and on etcd
//! (several): all knowledge of what a record means is in the files beside this one, all knowledge of an engine in its own.

pub(crate) mod bundles;
pub(crate) mod clones;
pub(crate) mod deny;
pub mod etcd;
pub(crate) mod federation;
pub(crate) mod grants;
pub(crate) mod hosts;
pub(crate) mod intermediates;
pub(crate) mod istio;
pub(crate) mod leaves;
pub(crate) mod replicas;
pub(crate) mod roles;
mod schema1;
mod schema2;
pub(crate) mod servers;
pub(crate) mod settings;
mod sqlite;
mod sqlite_writer;
pub(crate) mod tainted;
pub(crate) mod tokens;
pub(crate) mod trust;
pub(crate) mod upstream;

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use meshd_identity::TrustDomain;
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::etcd::Etcd;
use self::etcd::config::EtcdConfig;
use self::sqlite::Sqlite;
use crate::keeping::backups::Backups;

/// Of the SQLite file; 1 had tables, 2 records without checksums.
pub(crate) const SCHEMA: i64 = 3;
/// A transaction that lost a race this often would lose it for ever.
const ATTEMPTS: u32 = 10;

#[derive(Debug, thiserror::Error)]
pub enum DbError {
    #[error("database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// Several transactions were to be written at once, and another of them met the error.
    #[error("database: {0}")]
    Together(String),
    #[error("{} is not initialised; run `meshd-pki init --state {} --trust-domain TD` first", dir.display(), dir.display())]
    Missing { dir: PathBuf },
    #[error("cannot create {}: {source}", path.display())]
    Create { path: PathBuf, source: std::io::Error },
    #[error("{} has schema {found}, this meshd-pki reads schema 1 to {SCHEMA}; run the version that wrote it", path.display())]
    Schema { path: PathBuf, found: String },
    #[error("{} is of an earlier version (schema {found}); `meshd-pki restore --from` converts it", path.display())]
    OldCopy { path: PathBuf, found: i64 },
    #[error("{} is damaged ({detail}); stop the PKI and restore the newest backup", path.display())]
    Damaged { path: PathBuf, detail: String },
    #[error("the record `{key}` is unreadable ({detail}); stop the PKI and restore the newest backup")]
    Record { key: String, detail: String },
    #[error("{} holds no PKI although there are backups of one", path.display())]
    Empty { path: PathBuf },
    #[error("etcd: {0}")]
    Etcd(String),
    #[error("{}: {detail}", path.display())]
    Config { path: PathBuf, detail: String },
    #[error(
        "a change of {operations} parts is too large for one transaction of etcd, which takes 128; make it in parts"
    )]
    TooLarge { operations: usize },
    #[error("others changed the same records {ATTEMPTS} times in a row; try again")]
    Contended,
}

impl From<meshd_etcd::Error> for DbError {
    fn from(error: meshd_etcd::Error) -> DbError {
        DbError::Etcd(error.to_string())
    }
}

/// Records at one moment.
pub(crate) trait View {
    fn get(&mut self, key: &str) -> Result<Option<Vec<u8>>, DbError>;
    /// All records whose key starts so, in the order of keys.
    fn list(&mut self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, DbError>;
    /// As `list`, from this key on.
    fn list_from(&mut self, prefix: &str, first: &str) -> Result<Vec<(String, Vec<u8>)>, DbError> {
        let mut all = self.list(prefix)?;
        all.retain(|(key, _)| key.as_str() >= first);
        Ok(all)
    }
    /// As `list`, for what may change before the commit without harm to it: of a large fleet, some host does always.
    fn glance(&mut self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, DbError> {
        self.list(prefix)
    }
}

/// Records as one transaction sees them: its own changes included, nobody else's until it is over.
pub(crate) trait Records: View {
    fn put(&mut self, key: &str, value: &[u8]) -> Result<(), DbError>;
    /// Whether there was one.
    fn delete(&mut self, key: &str) -> Result<bool, DbError>;
}

/// A transaction under way; dropping it changes nothing.
pub(crate) trait Transaction: Records {
    fn commit(self: Box<Self>) -> Result<Committed, DbError>;
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Committed {
    Yes,
    /// Somebody changed what was read. Nothing was written; another attempt may succeed.
    LostRace,
    /// It was to be done by the leader only, and another leads by now. Nothing was written.
    NotLeading,
}

pub(crate) trait Engine: Send + Sync {
    fn begin(&self) -> Result<Box<dyn Transaction + '_>, DbError>;
    /// One consistent view, without hindering who writes.
    fn view(&self) -> Result<Box<dyn View + '_>, DbError>;
    /// Whether what is stored is whole; quick enough for every start.
    fn check(&self) -> Result<(), DbError>;
    /// Writes all records as they are at one moment into a new SQLite file, 0600.
    fn copy_to(&self, path: &Path) -> Result<(), DbError>;

    // What follows is of engines that several servers share.

    /// A transaction that commits only while this server leads; `None` when it does not.
    fn begin_leading(&self) -> Result<Option<Box<dyn Transaction + '_>>, DbError> {
        self.begin().map(Some)
    }
    /// Asks whether others have changed anything that is not known here yet, and takes it over. Whether they had.
    fn catch_up(&self) -> bool {
        false
    }
    /// From now on this server is one that hosts can use, and may lead.
    fn join_replicas(&self) {}
    fn leads(&self) -> bool {
        true
    }
    fn leader(&self) -> Option<String> {
        None
    }
    fn live_replicas(&self) -> Vec<String> {
        Vec::new()
    }
    /// Whether what is read here is what is stored, as far as can be known.
    fn is_current(&self) -> bool {
        true
    }
    /// Why nothing can be written now.
    fn trouble(&self) -> Option<String> {
        None
    }
}

pub(crate) struct Database {
    engine: Box<dyn Engine>,
}

impl Database {
    /// A new database, filled in one transaction: either all of it exists afterwards or nothing.
    pub(crate) fn create<E: From<DbError>>(
        path: &Path,
        domain: &TrustDomain,
        mut fill: impl FnMut(&mut dyn Records) -> Result<(), E>,
    ) -> Result<(), E> {
        let database = Database { engine: Box::new(Sqlite::create(path)?) };
        database.transaction(|records| {
            settings::set_trust_domain(records, domain)?;
            fill(records)
        })
    }

    /// The database of a state directory: in its file, or in etcd where it says so.
    pub(crate) fn open(dir: &Path) -> Result<Database, DbError> {
        match EtcdConfig::read(dir)? {
            Some(config) => Database::open_etcd(&config, || None),
            None => Database::open_file(&dir.join("pki.db")),
        }
    }

    /// As a server does: without etcd, from the newest good backup.
    pub(crate) fn open_to_serve(dir: &Path) -> Result<Database, DbError> {
        match EtcdConfig::read(dir)? {
            Some(config) => Database::open_etcd(&config, || newest_records(dir)),
            None => Database::open(dir),
        }
    }

    fn open_etcd(
        config: &EtcdConfig,
        fallback: impl FnOnce() -> Option<Vec<(String, Vec<u8>)>>,
    ) -> Result<Database, DbError> {
        Ok(Database { engine: Box::new(Etcd::open(config, fallback)?) })
    }

    pub(crate) fn open_file(path: &Path) -> Result<Database, DbError> {
        let dir = path.parent().unwrap_or(path).to_owned();
        match Sqlite::open(path)? {
            Some(engine) => Ok(Database { engine: Box::new(engine) }),
            None => Err(DbError::Missing { dir }),
        }
    }

    /// For a copy, wherever it lies: nothing is written, not even beside it.
    pub(crate) fn open_copy(path: &Path) -> Result<Database, DbError> {
        match Sqlite::open_copy(path)? {
            Some(engine) => Ok(Database { engine: Box::new(engine) }),
            None => Err(DbError::Empty { path: path.to_owned() }),
        }
    }

    /// Whether the file holds a finished PKI; an `init` that was cut short leaves one that does not.
    pub(crate) fn is_initialised(path: &Path) -> Result<bool, DbError> {
        Ok(Sqlite::open(path)?.is_some())
    }

    pub(crate) fn check(&self) -> Result<(), DbError> {
        self.engine.check()
    }

    pub(crate) fn engine(&self) -> &dyn Engine {
        self.engine.as_ref()
    }

    pub(crate) fn copy_to(&self, path: &Path) -> Result<(), DbError> {
        self.engine.copy_to(path)
    }

    pub(crate) fn read<T, E: From<DbError>>(&self, look: impl FnOnce(&mut dyn View) -> Result<T, E>) -> Result<T, E> {
        look(self.engine.view()?.as_mut())
    }

    /// As `read`; before it fails, what other servers changed a moment ago is taken over and looked at: a host may come
    /// here right after another server enrolled it.
    pub(crate) fn read_latest<T, E: From<DbError>>(
        &self,
        mut look: impl FnMut(&mut dyn View) -> Result<T, E>,
    ) -> Result<T, E> {
        match self.read(&mut look) {
            Err(_) if self.engine.catch_up() => self.read(look),
            result => result,
        }
    }

    /// Runs `act` until its changes are written as a whole, or it fails. It may run more than once.
    pub(crate) fn transaction<T, E: From<DbError>>(
        &self,
        act: impl FnMut(&mut dyn Records) -> Result<T, E>,
    ) -> Result<T, E> {
        let done = commit(self.engine(), || self.engine.begin().map(Some), act)?;
        done.ok_or_else(|| DbError::Contended.into())
    }

    /// As `transaction`, for what only the leader may do; `None` when that is another server.
    pub(crate) fn lead<T, E: From<DbError>>(
        &self,
        act: impl FnMut(&mut dyn Records) -> Result<T, E>,
    ) -> Result<Option<T>, E> {
        commit(self.engine(), || self.engine.begin_leading(), act)
    }
}

fn commit<'a, T, E: From<DbError>>(
    engine: &dyn Engine,
    mut begin: impl FnMut() -> Result<Option<Box<dyn Transaction + 'a>>, DbError>,
    mut act: impl FnMut(&mut dyn Records) -> Result<T, E>,
) -> Result<Option<T>, E> {
    let mut has_caught_up = false;
    for _ in 0..ATTEMPTS {
        let Some(mut transaction) = begin()? else { return Ok(None) };
        let result = match act(transaction.as_mut()) {
            // It may have missed what another server wrote a moment ago: a token, a host.
            Err(_) if !has_caught_up && engine.catch_up() => {
                has_caught_up = true;
                continue;
            }
            result => result?,
        };
        match transaction.commit()? {
            Committed::Yes => return Ok(Some(result)),
            Committed::LostRace => {}
            Committed::NotLeading => return Ok(None),
        }
    }
    Err(DbError::Contended.into())
}

/// A new SQLite file with these records.
pub(crate) fn write_copy(path: &Path, records: &[(String, Vec<u8>)]) -> Result<(), DbError> {
    sqlite::write_copy(path, records)
}

fn newest_records(dir: &Path) -> Option<Vec<(String, Vec<u8>)>> {
    let backup = Backups::new(dir).newest_whole(SystemTime::now())?;
    let database = Database::open_copy(&backup.path).ok()?;
    database.read(|view| view.list("")).ok()
}

/// Reads one record of a known form.
pub(crate) fn get<T: DeserializeOwned>(records: &mut dyn View, key: &str) -> Result<Option<T>, DbError> {
    records.get(key)?.map(|value| decode(key, &value)).transpose()
}

/// As `list`, of what may change meanwhile.
pub(crate) fn glance<T: DeserializeOwned>(records: &mut dyn View, prefix: &str) -> Result<Vec<(String, T)>, DbError> {
    let found = records.glance(prefix)?.into_iter();
    found.map(|(key, value)| Ok((key[prefix.len()..].to_owned(), decode(&key, &value)?))).collect()
}

/// Reads all records below a prefix, with what follows the prefix in their keys.
pub(crate) fn list<T: DeserializeOwned>(records: &mut dyn View, prefix: &str) -> Result<Vec<(String, T)>, DbError> {
    decode_all(records.list(prefix)?, prefix)
}

/// As `list`, from this key on.
pub(crate) fn list_from<T: DeserializeOwned>(
    records: &mut dyn View,
    prefix: &str,
    first: &str,
) -> Result<Vec<(String, T)>, DbError> {
    decode_all(records.list_from(prefix, first)?, prefix)
}

fn decode_all<T: DeserializeOwned>(found: Vec<(String, Vec<u8>)>, prefix: &str) -> Result<Vec<(String, T)>, DbError> {
    found.into_iter().map(|(key, value)| Ok((key[prefix.len()..].to_owned(), decode(&key, &value)?))).collect()
}

pub(crate) fn put<T: Serialize>(records: &mut dyn Records, key: &str, value: &T) -> Result<(), DbError> {
    let value = encode(key, value)?;
    records.put(key, &value)
}

fn encode<T: Serialize>(key: &str, value: &T) -> Result<Vec<u8>, DbError> {
    serde_json::to_vec(value).map_err(|error| DbError::Record { key: key.to_owned(), detail: error.to_string() })
}

fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, DbError> {
    serde_json::from_slice(value).map_err(|error| DbError::Record { key: key.to_owned(), detail: error.to_string() })
}

/// Bytes in a record: base64 in its JSON.
pub(crate) mod base64 {
    use data_encoding::BASE64;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64.decode(text.as_bytes()).map_err(serde::de::Error::custom)
    }
}
