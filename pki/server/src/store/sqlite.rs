//! Records in one SQLite file: WAL, every commit synced. The server and the command line share it.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};

use super::{Committed, DbError, Engine, Records, SCHEMA, Transaction, View, schema1};

/// The command line and the server share the file; either waits this long for the other's write.
const BUSY: Duration = Duration::from_secs(5);

const TABLE: &str =
    "CREATE TABLE IF NOT EXISTS record (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID";

pub(super) struct Sqlite {
    path: PathBuf,
    /// Two connections, so that reading never waits for another's sync.
    writer: Mutex<Connection>,
    reader: Mutex<Connection>,
}

impl Sqlite {
    pub(super) fn create(path: &Path) -> Result<Sqlite, DbError> {
        // Made beforehand for its mode; SQLite gives its side files the same.
        let mut options = OpenOptions::new();
        let made = options.write(true).create(true).truncate(false).mode(0o600).open(path);
        made.map_err(|source| DbError::Create { path: path.to_owned(), source })?;
        let connection = connect(path)?;
        connection.execute_batch(TABLE)?;
        connection.pragma_update(None, "user_version", SCHEMA)?;
        Sqlite::new(path, connection)
    }

    /// `None` when there is no finished PKI in the file.
    pub(super) fn open(path: &Path) -> Result<Option<Sqlite>, DbError> {
        if !path.exists() {
            return Ok(None);
        }
        let mut connection = connect(path)?;
        let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let unknown = |found: String| DbError::Schema { path: path.to_owned(), found };
        match version {
            SCHEMA => {}
            0 if schema1::is_in(&connection)? => schema1::convert(&mut connection, TABLE)?,
            0 => return Ok(None),
            other => return Err(unknown(other.to_string())),
        }
        let records: i64 = connection.query_row("SELECT count(*) FROM record", [], |row| row.get(0))?;
        if records == 0 { Ok(None) } else { Sqlite::new(path, connection).map(Some) }
    }

    fn new(path: &Path, writer: Connection) -> Result<Sqlite, DbError> {
        let reader = Mutex::new(connect(path)?);
        Ok(Sqlite { path: path.to_owned(), writer: Mutex::new(writer), reader })
    }
}

impl Engine for Sqlite {
    fn begin(&self) -> Result<Box<dyn Transaction + '_>, DbError> {
        let connection = lock(&self.writer);
        // The write lock from the start: what is read stays true until the commit.
        connection.execute_batch("BEGIN IMMEDIATE")?;
        Ok(Box::new(Open { connection, over: false }))
    }

    fn view(&self) -> Result<Box<dyn View + '_>, DbError> {
        let connection = lock(&self.reader);
        connection.execute_batch("BEGIN DEFERRED")?;
        Ok(Box::new(Open { connection, over: false }))
    }

    fn check(&self) -> Result<(), DbError> {
        let detail: String = lock(&self.reader).query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if detail == "ok" { Ok(()) } else { Err(DbError::Damaged { path: self.path.clone(), detail }) }
    }
}

/// A panic while it was held rolled its transaction back.
fn lock(connection: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Open<'a> {
    connection: MutexGuard<'a, Connection>,
    over: bool,
}

impl View for Open<'_> {
    fn get(&mut self, key: &str) -> Result<Option<Vec<u8>>, DbError> {
        let mut query = self.connection.prepare_cached("SELECT value FROM record WHERE key = ?1")?;
        let value: Option<String> = query.query_row([key], |row| row.get(0)).optional()?;
        Ok(value.map(String::into_bytes))
    }

    fn list(&mut self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, DbError> {
        // Keys are ASCII, so nothing below the prefix sorts after this.
        let end = format!("{prefix}\u{7f}");
        let select = "SELECT key, value FROM record WHERE key >= ?1 AND key < ?2 ORDER BY key";
        let mut query = self.connection.prepare_cached(select)?;
        let rows = query.query_map([prefix, &end], |row| Ok((row.get(0)?, row.get::<_, String>(1)?.into_bytes())))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

impl Records for Open<'_> {
    fn put(&mut self, key: &str, value: &[u8]) -> Result<(), DbError> {
        let insert = "INSERT INTO record VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = excluded.value";
        let value = std::str::from_utf8(value)
            .map_err(|error| DbError::Record { key: key.to_owned(), detail: error.to_string() })?;
        self.connection.prepare_cached(insert)?.execute(params![key, value])?;
        Ok(())
    }

    fn delete(&mut self, key: &str) -> Result<bool, DbError> {
        Ok(self.connection.prepare_cached("DELETE FROM record WHERE key = ?1")?.execute([key])? == 1)
    }
}

impl Transaction for Open<'_> {
    fn commit(mut self: Box<Self>) -> Result<Committed, DbError> {
        self.connection.execute_batch("COMMIT")?;
        self.over = true;
        Ok(Committed::Yes)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if !self.over {
            // Fails only when SQLite has rolled back already.
            _ = self.connection.execute_batch("ROLLBACK");
        }
    }
}

fn connect(path: &Path) -> Result<Connection, DbError> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY)?;
    // NORMAL would lose acknowledged commits at a power cut.
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled() -> (tempfile::TempDir, Sqlite) {
        let dir = tempfile::tempdir().unwrap();
        let sqlite = Sqlite::create(&dir.path().join("pki.db")).unwrap();
        let mut transaction = sqlite.begin().unwrap();
        for key in ["host/a", "host/b", "hostile", "token/a"] {
            transaction.put(key, b"1").unwrap();
        }
        assert_eq!(transaction.commit().unwrap(), Committed::Yes);
        (dir, sqlite)
    }

    #[test]
    fn a_list_holds_what_is_below_its_prefix_in_order() {
        let (_dir, sqlite) = filled();
        let keys: Vec<String> = sqlite.view().unwrap().list("host/").unwrap().into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["host/a", "host/b"]);
    }

    #[test]
    fn a_transaction_that_is_dropped_changes_nothing_and_its_own_changes_are_seen_inside() {
        let (_dir, sqlite) = filled();
        let mut transaction = sqlite.begin().unwrap();
        assert!(transaction.delete("host/a").unwrap());
        assert!(!transaction.delete("host/a").unwrap());
        transaction.put("host/b", b"2").unwrap();
        assert_eq!(transaction.get("host/b").unwrap().unwrap(), b"2");
        assert_eq!(sqlite.view().unwrap().get("host/b").unwrap().unwrap(), b"1");
        drop(transaction);
        let mut view = sqlite.view().unwrap();
        assert_eq!(view.get("host/a").unwrap().unwrap(), b"1");
        assert_eq!(view.get("host/b").unwrap().unwrap(), b"1");
    }

    #[test]
    fn an_empty_or_foreign_file_is_no_pki() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pki.db");
        assert!(Sqlite::open(&path).unwrap().is_none());
        drop(Sqlite::create(&path).unwrap());
        assert!(Sqlite::open(&path).unwrap().is_none());
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 9).unwrap();
        assert!(matches!(Sqlite::open(&path), Err(DbError::Schema { .. })));
    }
}
