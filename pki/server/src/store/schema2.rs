//! Gives the records of the second version, which had none, their checksums.

use rusqlite::{Connection, TransactionBehavior};

use super::{DbError, SCHEMA, sqlite};

/// Of the file's header.
pub(super) const VERSION: i64 = 2;

/// All or nothing. Another process may have done it a moment ago.
pub(super) fn convert(connection: &mut Connection, table: &str) -> Result<(), DbError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    if sqlite::version(&transaction)? != VERSION {
        return Ok(());
    }
    transaction.execute_batch("ALTER TABLE record RENAME TO record_2")?;
    transaction.execute_batch(table)?;
    let mut query = transaction.prepare("SELECT key, value FROM record_2")?;
    let mut rows = query.query([])?;
    while let Some(row) = rows.next()? {
        sqlite::put(&transaction, &row.get::<_, String>(0)?, &row.get::<_, String>(1)?)?;
    }
    drop(rows);
    drop(query);
    transaction.execute_batch("DROP TABLE record_2")?;
    transaction.pragma_update(None, "user_version", SCHEMA)?;
    transaction.commit()?;
    tracing::info!("the database was converted to schema {SCHEMA}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use crate::store::{Database, DbError};

    const SECOND_VERSION: &str = "
        CREATE TABLE record (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
        INSERT INTO record VALUES ('host/web', '{\"state\":\"active\"}'), ('trust', '{}');
        PRAGMA user_version = 2;";

    #[test]
    fn records_of_the_second_version_get_checksums_and_stay_what_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pki.db");
        Connection::open(&path).unwrap().execute_batch(SECOND_VERSION).unwrap();
        // Twice: the second time it is a database like any other.
        for _ in 0..2 {
            let database = Database::open_file(&path).unwrap();
            database.check().unwrap();
            let records = database.read(|view| -> Result<_, DbError> { view.list("") }).unwrap();
            let expected = [("host/web", "{\"state\":\"active\"}"), ("trust", "{}")];
            assert_eq!(records, expected.map(|(key, value)| (key.to_owned(), value.as_bytes().to_vec())));
        }
        let tables = "SELECT count(*) FROM sqlite_master WHERE type = 'table'";
        let count: i64 = Connection::open(&path).unwrap().query_row(tables, [], |row| row.get(0)).unwrap();
        assert_eq!(count, 1);
    }
}
