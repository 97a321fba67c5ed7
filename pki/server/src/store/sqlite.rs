//! Records in one SQLite file: WAL, every commit synced. The server and the command line share it.

use std::fs::OpenOptions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, params};

use super::sqlite_writer::{Writer, Writing};
use super::{Committed, DbError, Engine, Records, SCHEMA, Transaction, View, schema1, schema2};

/// The command line and the server share the file; either waits this long for the other's write.
const BUSY: Duration = Duration::from_secs(5);

/// `sum` because SQLite notices damage to its pages, not to what is in them.
const TABLE: &str = "CREATE TABLE IF NOT EXISTS record (key TEXT PRIMARY KEY, value TEXT NOT NULL, sum BLOB NOT NULL) \
     STRICT, WITHOUT ROWID";

/// What a later version may write: such a file is not for this one to judge.
const LAST_SCHEMA: i64 = 255;

pub(super) struct Sqlite {
    path: PathBuf,
    /// Two connections, so that reading never waits for another's sync.
    writer: Writer,
    reader: Mutex<Connection>,
}

impl Sqlite {
    pub(super) fn create(path: &Path) -> Result<Sqlite, DbError> {
        private_file(path)?;
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
        match version(&connection)? {
            SCHEMA => {}
            schema2::VERSION => schema2::convert(&mut connection, TABLE)?,
            0 if schema1::is_in(&connection)? => schema1::convert(&mut connection, TABLE)?,
            0 => return Ok(None),
            other => return Err(unreadable(path, other)),
        }
        if is_empty(&connection)? { Ok(None) } else { Sqlite::new(path, connection).map(Some) }
    }

    /// As `open`, without a trace: a copy may lie where nobody can write.
    pub(super) fn open_copy(path: &Path) -> Result<Option<Sqlite>, DbError> {
        if !path.exists() {
            return Ok(None);
        }
        let connection = connect_to_copy(path)?;
        match version(&connection)? {
            SCHEMA => {}
            0 if !schema1::is_in(&connection)? => return Ok(None),
            found @ (0 | schema2::VERSION) => return Err(DbError::OldCopy { path: path.to_owned(), found }),
            other => return Err(unreadable(path, other)),
        }
        if is_empty(&connection)? {
            return Ok(None);
        }
        let reader = Mutex::new(connect_to_copy(path)?);
        Ok(Some(Sqlite { path: path.to_owned(), writer: Writer::new(connection), reader }))
    }

    fn new(path: &Path, writer: Connection) -> Result<Sqlite, DbError> {
        let reader = Mutex::new(connect(path)?);
        Ok(Sqlite { path: path.to_owned(), writer: Writer::new(writer), reader })
    }
}

impl Engine for Sqlite {
    fn begin(&self) -> Result<Box<dyn Transaction + '_>, DbError> {
        Ok(Box::new(self.writer.begin()?))
    }

    fn view(&self) -> Result<Box<dyn View + '_>, DbError> {
        let connection = lock(&self.reader);
        connection.execute_batch("BEGIN DEFERRED")?;
        Ok(Box::new(Looking(connection)))
    }

    fn check(&self) -> Result<(), DbError> {
        let detail: String = lock(&self.reader).query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if detail != "ok" {
            return Err(DbError::Damaged { path: self.path.clone(), detail });
        }
        self.check_records()
    }

    fn copy_to(&self, path: &Path) -> Result<(), DbError> {
        private_file(path)?;
        let path = path
            .to_str()
            .ok_or_else(|| DbError::Damaged { path: path.to_owned(), detail: "its name is not text".to_owned() })?;
        // It takes seconds where there is much, and whoever reads does not wait for it.
        connect(&self.path)?.execute("VACUUM INTO ?1", [path])?;
        Ok(())
    }
}

impl Sqlite {
    /// Every record, not only those a range of keys finds: a damaged key hides all that sorts behind it.
    fn check_records(&self) -> Result<(), DbError> {
        let reader = lock(&self.reader);
        let mut query = reader.prepare("SELECT key, value, sum FROM record")?;
        let mut last = String::new();
        for row in query.query_map([], stored)? {
            let (key, _) = row?.whole()?;
            if key <= last {
                return Err(DbError::Record { key, detail: format!("it stands behind {last}") });
            }
            last = key;
        }
        Ok(())
    }
}

pub(super) fn version(connection: &Connection) -> Result<i64, DbError> {
    Ok(connection.pragma_query_value(None, "user_version", |row| row.get(0))?)
}

fn unreadable(path: &Path, version: i64) -> DbError {
    let path = path.to_owned();
    if (1..=LAST_SCHEMA).contains(&version) {
        return DbError::Schema { path, found: version.to_string() };
    }
    DbError::Damaged { path, detail: format!("its header names schema {version}, which no meshd-pki ever writes") }
}

fn is_empty(connection: &Connection) -> Result<bool, DbError> {
    let records: i64 = connection.query_row("SELECT count(*) FROM record", [], |row| row.get(0))?;
    Ok(records == 0)
}

/// A panic while it was held rolled its transaction back.
fn lock(connection: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One consistent view, until it is dropped.
struct Looking<'a>(MutexGuard<'a, Connection>);

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        // Fails only when SQLite has ended it already.
        _ = self.0.execute_batch("ROLLBACK");
    }
}

impl View for Looking<'_> {
    fn get(&mut self, key: &str) -> Result<Option<Vec<u8>>, DbError> {
        get(&self.0, key)
    }

    fn list(&mut self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, DbError> {
        list_from(&self.0, prefix, prefix)
    }

    fn list_from(&mut self, prefix: &str, first: &str) -> Result<Vec<(String, Vec<u8>)>, DbError> {
        list_from(&self.0, prefix, first)
    }
}

impl View for Writing<'_> {
    fn get(&mut self, key: &str) -> Result<Option<Vec<u8>>, DbError> {
        get(self.connection(), key)
    }

    fn list(&mut self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, DbError> {
        list_from(self.connection(), prefix, prefix)
    }

    fn list_from(&mut self, prefix: &str, first: &str) -> Result<Vec<(String, Vec<u8>)>, DbError> {
        list_from(self.connection(), prefix, first)
    }
}

fn get(connection: &Connection, key: &str) -> Result<Option<Vec<u8>>, DbError> {
    let mut query = connection.prepare_cached("SELECT key, value, sum FROM record WHERE key = ?1")?;
    let row = query.query_row([key], stored).optional()?;
    row.map(|row| row.whole().map(|(_, value)| value)).transpose()
}

fn list_from(connection: &Connection, prefix: &str, first: &str) -> Result<Vec<(String, Vec<u8>)>, DbError> {
    // Keys are ASCII, so nothing below the prefix sorts after this.
    let end = format!("{prefix}\u{7f}");
    let select = "SELECT key, value, sum FROM record WHERE key >= ?1 AND key < ?2 ORDER BY key";
    let mut query = connection.prepare_cached(select)?;
    let rows = query.query_map([first, &end], stored)?;
    rows.map(|row| row?.whole()).collect()
}

impl Records for Writing<'_> {
    fn put(&mut self, key: &str, value: &[u8]) -> Result<(), DbError> {
        let value = std::str::from_utf8(value)
            .map_err(|error| DbError::Record { key: key.to_owned(), detail: error.to_string() })?;
        put(self.connection(), key, value)
    }

    fn delete(&mut self, key: &str) -> Result<bool, DbError> {
        Ok(self.connection().prepare_cached("DELETE FROM record WHERE key = ?1")?.execute([key])? == 1)
    }
}

impl Transaction for Writing<'_> {
    fn commit(self: Box<Self>) -> Result<Committed, DbError> {
        Writing::commit(*self)?;
        Ok(Committed::Yes)
    }
}

pub(super) fn put(connection: &Connection, key: &str, value: &str) -> Result<(), DbError> {
    let insert = "INSERT INTO record VALUES (?1, ?2, ?3) \
         ON CONFLICT (key) DO UPDATE SET value = excluded.value, sum = excluded.sum";
    connection.prepare_cached(insert)?.execute(params![key, value, sum(key, value)])?;
    Ok(())
}

/// A new file with these records.
pub(super) fn write_copy(path: &Path, records: &[(String, Vec<u8>)]) -> Result<(), DbError> {
    let sqlite = Sqlite::create(path)?;
    let mut transaction = sqlite.begin()?;
    for (key, value) in records {
        transaction.put(key, value)?;
    }
    transaction.commit()?;
    // A copy is one file, without a log of changes beside it.
    drop(sqlite.reader);
    sqlite.writer.into_connection().pragma_update(None, "journal_mode", "DELETE")?;
    Ok(())
}

/// A record as it is on disk.
struct Stored {
    key: String,
    value: String,
    sum: Vec<u8>,
}

fn stored(row: &Row<'_>) -> rusqlite::Result<Stored> {
    Ok(Stored { key: row.get(0)?, value: row.get(1)?, sum: row.get(2)? })
}

impl Stored {
    fn whole(self) -> Result<(String, Vec<u8>), DbError> {
        if self.sum == sum(&self.key, &self.value) {
            return Ok((self.key, self.value.into_bytes()));
        }
        Err(DbError::Record { key: self.key, detail: "its checksum is wrong".to_owned() })
    }
}

/// Finds damage, not malice: 64 bits of SHA-256 are plenty.
fn sum(key: &str, value: &str) -> Vec<u8> {
    meshd_identity::sha256(format!("{key}\0{value}").as_bytes())[..8].to_vec()
}

/// Made beforehand for its mode; SQLite gives its side files the same.
fn private_file(path: &Path) -> Result<(), DbError> {
    let mut options = OpenOptions::new();
    let made = options.write(true).create(true).truncate(false).mode(0o600).open(path);
    made.map(drop).map_err(|source| DbError::Create { path: path.to_owned(), source })
}

fn connect(path: &Path) -> Result<Connection, DbError> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY)?;
    // NORMAL would lose acknowledged commits at a power cut.
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    Ok(connection)
}

fn connect_to_copy(path: &Path) -> Result<Connection, DbError> {
    let mut uri = "file:".to_owned();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' => uri.push(char::from(*byte)),
            byte if byte.is_ascii_alphanumeric() => uri.push(char::from(*byte)),
            byte => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    // Without this SQLite makes files beside one that was ever in WAL mode.
    uri.push_str("?immutable=1");
    Ok(Connection::open_with_flags(uri, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI)?)
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
    fn a_bit_that_flips_inside_a_record_is_noticed() {
        let (_dir, sqlite) = filled();
        connect(&sqlite.path).unwrap().execute("UPDATE record SET value = '2' WHERE key = 'host/b'", []).unwrap();
        assert!(matches!(sqlite.check(), Err(DbError::Record { key, .. }) if key == "host/b"));
        assert!(sqlite.view().unwrap().get("host/b").is_err());
        assert_eq!(sqlite.view().unwrap().get("host/a").unwrap().unwrap(), b"1");
    }

    #[test]
    fn a_copy_is_private_and_holds_the_same_records() {
        let (dir, sqlite) = filled();
        let path = dir.path().join("copy.db");
        sqlite.copy_to(&path).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        let copy = Sqlite::open(&path).unwrap().unwrap();
        copy.check().unwrap();
        assert_eq!(copy.view().unwrap().list("").unwrap(), sqlite.view().unwrap().list("").unwrap());
    }

    #[test]
    fn a_copy_is_made_while_somebody_reads() {
        let (dir, sqlite) = filled();
        let mut view = sqlite.view().unwrap();
        sqlite.copy_to(&dir.path().join("copy.db")).unwrap();
        assert_eq!(view.get("host/a").unwrap().unwrap(), b"1");
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
