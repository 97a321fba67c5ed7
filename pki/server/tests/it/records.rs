//! What no command does: looks into the PKI's database, and changes it.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use meshd_identity::sha256;
use meshd_identity::signed;
use meshd_identity::statements::RecoveryStatement;
use rcgen::KeyPair;
use rusqlite::{Connection, OptionalExtension, params};

pub(crate) fn unix(time: SystemTime) -> i64 {
    i64::try_from(time.duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap()
}

fn database(state: &Path) -> Connection {
    let database = Connection::open(state.join("pki.db")).unwrap();
    database.busy_timeout(Duration::from_secs(10)).unwrap();
    database
}

pub(crate) fn record(state: &Path, key: &str) -> Option<String> {
    let query = "SELECT value FROM record WHERE key = ?1";
    database(state).query_row(query, [key], |row| row.get(0)).optional().unwrap()
}

pub(crate) fn put_record(state: &Path, key: &str, value: &str) {
    let statement = "INSERT OR REPLACE INTO record VALUES (?1, ?2, ?3)";
    let sum = &sha256(format!("{key}\0{value}").as_bytes())[..8];
    assert_eq!(database(state).execute(statement, params![key, value, sum]).unwrap(), 1);
}

pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    let files = fs::read_dir(from).unwrap().map(Result::unwrap);
    for file in files.filter(|file| file.file_type().unwrap().is_file()) {
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

/// What the holder of the recovery key in a state directory says.
pub(crate) fn say(state: &Path, statement: &RecoveryStatement) -> String {
    let key = KeyPair::from_pem(&fs::read_to_string(state.join("recovery.key")).unwrap()).unwrap();
    signed::sign(&key.serialize_der(), statement).unwrap()
}
