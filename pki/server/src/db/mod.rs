//! The database of a PKI: SQLite, WAL, every commit synced. All SQL is below this module.

pub(crate) mod authorities;
pub(crate) mod hosts;
pub(crate) mod tokens;

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use meshd_identity::TrustDomain;
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

const SCHEMA: i64 = 1;
/// The command line and the server share the file; either waits this long for the other's write.
const BUSY: Duration = Duration::from_secs(5);

const TABLES: &str = "
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE authority (
  id TEXT PRIMARY KEY, kind TEXT NOT NULL CHECK (kind IN ('root', 'intermediate')),
  state TEXT NOT NULL CHECK (state IN ('prepared', 'active', 'old')), parent TEXT,
  certificate BLOB NOT NULL, wrapped_key BLOB,
  published_at INTEGER NOT NULL, activated_at INTEGER, last_issue_at INTEGER NOT NULL DEFAULT 0,
  not_after INTEGER NOT NULL) STRICT;
CREATE TABLE bundle (
  sequence INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, jwks BLOB NOT NULL, created_at INTEGER NOT NULL) STRICT;
CREATE TABLE recovery_key (
  public_key BLOB PRIMARY KEY, position INTEGER NOT NULL UNIQUE, added_at INTEGER NOT NULL) STRICT;
CREATE TABLE host (
  id TEXT PRIMARY KEY, state TEXT NOT NULL CHECK (state IN ('active', 'banned')),
  key_current BLOB NOT NULL, key_next BLOB, enrolled_at INTEGER NOT NULL, last_seen INTEGER NOT NULL,
  acked_sequence INTEGER NOT NULL DEFAULT 0, clock_offset_ms INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE token (
  id TEXT PRIMARY KEY, secret_hash BLOB NOT NULL, host_id TEXT NOT NULL, allow TEXT NOT NULL,
  created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, used_key BLOB, used_at INTEGER) STRICT;
CREATE TABLE entry (
  host_id TEXT NOT NULL, spiffe_id TEXT NOT NULL, created_at INTEGER NOT NULL,
  PRIMARY KEY (host_id, spiffe_id)) STRICT;
CREATE TABLE issued (
  serial TEXT PRIMARY KEY, spiffe_id TEXT NOT NULL, host_id TEXT NOT NULL, authority TEXT NOT NULL,
  issued_at INTEGER NOT NULL, not_after INTEGER NOT NULL) STRICT;
CREATE INDEX issued_by_end ON issued (not_after);
";

#[derive(Debug, thiserror::Error)]
pub enum DbError {
    #[error("database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error("{} is not initialised; run `meshd-pki init --state {} --trust-domain TD` first", dir.display(), dir.display())]
    Missing { dir: PathBuf },
    #[error("cannot create {}: {source}", path.display())]
    Create { path: PathBuf, source: std::io::Error },
    #[error("{} has schema {found}, this meshd-pki reads schema {SCHEMA}; run the version that wrote it", path.display())]
    Schema { path: PathBuf, found: String },
    #[error("{} is damaged ({detail}); stop the PKI and restore the newest backup", path.display())]
    Damaged { path: PathBuf, detail: String },
}

pub(crate) struct Database {
    connection: Connection,
}

impl Database {
    /// A new database with its tables, inside `fill`'s transaction: either all of it exists afterwards or nothing.
    pub(crate) fn create<E: From<DbError>>(
        path: &Path,
        domain: &TrustDomain,
        fill: impl FnOnce(&Transaction<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        // Made beforehand for its mode; SQLite gives its side files the same.
        let mut options = std::fs::OpenOptions::new();
        let made = options.write(true).create(true).truncate(false).mode(0o600).open(path);
        made.map_err(|source| DbError::Create { path: path.to_owned(), source })?;
        let mut database = Database { connection: connect(path)? };
        database.transaction(|transaction| {
            transaction.execute_batch(TABLES).map_err(DbError::from)?;
            set_meta(transaction, "schema", &SCHEMA.to_string())?;
            set_meta(transaction, "trust_domain", domain.as_str())?;
            fill(transaction)
        })
    }

    pub(crate) fn open(path: &Path) -> Result<Database, DbError> {
        let dir = path.parent().unwrap_or(path).to_owned();
        if !is_initialised(path)? {
            return Err(DbError::Missing { dir });
        }
        let database = Database { connection: connect(path)? };
        let found = get_meta(&database.connection, "schema")?.unwrap_or_default();
        if found != SCHEMA.to_string() {
            return Err(DbError::Schema { path: path.to_owned(), found });
        }
        Ok(database)
    }

    /// SQLite's own check of its pages; quick enough for every start.
    pub(crate) fn check(&self, path: &Path) -> Result<(), DbError> {
        let detail: String = self.connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if detail == "ok" { Ok(()) } else { Err(DbError::Damaged { path: path.to_owned(), detail }) }
    }

    pub(crate) fn reader(&self) -> &Connection {
        &self.connection
    }

    /// Runs `act` in one transaction that has the write lock from its start.
    pub(crate) fn transaction<T, E: From<DbError>>(
        &mut self,
        act: impl FnOnce(&Transaction<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(DbError::from)?;
        let result = act(&transaction)?;
        transaction.commit().map_err(DbError::from)?;
        Ok(result)
    }
}

/// Whether the file holds a finished PKI; an `init` that was cut short leaves one that does not.
pub(crate) fn is_initialised(path: &Path) -> Result<bool, DbError> {
    if !path.exists() {
        return Ok(false);
    }
    let tables = connect(path)?
        .query_row("SELECT count(*) FROM sqlite_master WHERE name = 'meta'", [], |row| row.get::<_, i64>(0));
    Ok(tables? == 1)
}

fn connect(path: &Path) -> Result<Connection, DbError> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY)?;
    // NORMAL would lose acknowledged commits at a power cut.
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection)
}

pub(crate) fn get_meta(connection: &Connection, key: &str) -> Result<Option<String>, DbError> {
    let query = "SELECT value FROM meta WHERE key = ?1";
    Ok(connection.query_row(query, [key], |row| row.get(0)).optional()?)
}

pub(crate) fn set_meta(connection: &Connection, key: &str, value: &str) -> Result<(), DbError> {
    let insert = "INSERT INTO meta VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = excluded.value";
    connection.execute(insert, params![key, value])?;
    Ok(())
}
