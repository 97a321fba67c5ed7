//! What a PKI remembers: records under keys, changed in transactions. The same on SQLite (one server) and on etcd
//! (several): all knowledge of what a record means is in the files beside this one, all knowledge of an engine in its own.

pub(crate) mod bundles;
pub(crate) mod clones;
pub(crate) mod deny;
pub(crate) mod federation;
pub(crate) mod grants;
pub(crate) mod hosts;
pub(crate) mod intermediates;
pub(crate) mod leaves;
pub(crate) mod roles;
mod schema1;
pub(crate) mod servers;
pub(crate) mod settings;
mod sqlite;
pub(crate) mod tainted;
pub(crate) mod tokens;
pub(crate) mod trust;
pub(crate) mod upstream;

use std::path::{Path, PathBuf};

use meshd_identity::TrustDomain;
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::sqlite::Sqlite;

/// Of the records, whatever engine keeps them.
pub(crate) const SCHEMA: i64 = 2;
/// A transaction that lost a race this often would lose it for ever.
const ATTEMPTS: u32 = 10;

#[derive(Debug, thiserror::Error)]
pub enum DbError {
    #[error("database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error("{} is not initialised; run `meshd-pki init --state {} --trust-domain TD` first", dir.display(), dir.display())]
    Missing { dir: PathBuf },
    #[error("cannot create {}: {source}", path.display())]
    Create { path: PathBuf, source: std::io::Error },
    #[error("{} has schema {found}, this meshd-pki reads schema 1 and {SCHEMA}; run the version that wrote it", path.display())]
    Schema { path: PathBuf, found: String },
    #[error("{} is damaged ({detail}); stop the PKI and restore the newest backup", path.display())]
    Damaged { path: PathBuf, detail: String },
    #[error("the record `{key}` is unreadable ({detail}); stop the PKI and restore the newest backup")]
    Record { key: String, detail: String },
    #[error("others changed the same records {ATTEMPTS} times in a row; try again")]
    Contended,
}

/// Records at one moment.
pub(crate) trait View {
    fn get(&mut self, key: &str) -> Result<Option<Vec<u8>>, DbError>;
    /// All records whose key starts so, in the order of keys.
    fn list(&mut self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, DbError>;
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
    #[allow(dead_code, reason = "SQLite takes its lock first and never loses a race")]
    LostRace,
}

pub(crate) trait Engine: Send + Sync {
    fn begin(&self) -> Result<Box<dyn Transaction + '_>, DbError>;
    /// One consistent view, without hindering who writes.
    fn view(&self) -> Result<Box<dyn View + '_>, DbError>;
    /// Whether what is stored is whole; quick enough for every start.
    fn check(&self) -> Result<(), DbError>;
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

    pub(crate) fn open(path: &Path) -> Result<Database, DbError> {
        let dir = path.parent().unwrap_or(path).to_owned();
        match Sqlite::open(path)? {
            Some(engine) => Ok(Database { engine: Box::new(engine) }),
            None => Err(DbError::Missing { dir }),
        }
    }

    /// Whether the file holds a finished PKI; an `init` that was cut short leaves one that does not.
    pub(crate) fn is_initialised(path: &Path) -> Result<bool, DbError> {
        Ok(Sqlite::open(path)?.is_some())
    }

    pub(crate) fn check(&self) -> Result<(), DbError> {
        self.engine.check()
    }

    pub(crate) fn read<T, E: From<DbError>>(&self, look: impl FnOnce(&mut dyn View) -> Result<T, E>) -> Result<T, E> {
        look(self.engine.view()?.as_mut())
    }

    /// Runs `act` until its changes are written as a whole, or it fails. It may run more than once.
    pub(crate) fn transaction<T, E: From<DbError>>(
        &self,
        mut act: impl FnMut(&mut dyn Records) -> Result<T, E>,
    ) -> Result<T, E> {
        for _ in 0..ATTEMPTS {
            let mut transaction = self.engine.begin()?;
            let result = act(transaction.as_mut())?;
            if transaction.commit()? == Committed::Yes {
                return Ok(result);
            }
        }
        Err(DbError::Contended.into())
    }
}

/// Reads one record of a known form.
pub(crate) fn get<T: DeserializeOwned>(records: &mut dyn View, key: &str) -> Result<Option<T>, DbError> {
    records.get(key)?.map(|value| decode(key, &value)).transpose()
}

/// Reads all records below a prefix, with what follows the prefix in their keys.
pub(crate) fn list<T: DeserializeOwned>(records: &mut dyn View, prefix: &str) -> Result<Vec<(String, T)>, DbError> {
    let found = records.list(prefix)?.into_iter();
    found.map(|(key, value)| Ok((key[prefix.len()..].to_owned(), decode(&key, &value)?))).collect()
}

pub(crate) fn put<T: Serialize>(records: &mut dyn Records, key: &str, value: &T) -> Result<(), DbError> {
    let value = serde_json::to_vec(value)
        .map_err(|error| DbError::Record { key: key.to_owned(), detail: error.to_string() })?;
    records.put(key, &value)
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
