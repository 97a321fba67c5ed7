//! Join tokens. Only a hash of each secret is stored.

use rusqlite::{Connection, OptionalExtension, params};

use super::DbError;

#[derive(Debug, Clone)]
pub(crate) struct TokenRow {
    pub(crate) id: String,
    pub(crate) secret_hash: Vec<u8>,
    pub(crate) host_id: String,
    /// SPIFFE IDs, separated by blanks (they contain none).
    pub(crate) allow: String,
    pub(crate) created_at: i64,
    pub(crate) expires_at: i64,
    pub(crate) used_key: Option<Vec<u8>>,
    pub(crate) used_at: Option<i64>,
}

const SELECT: &str = "SELECT id, secret_hash, host_id, allow, created_at, expires_at, used_key, used_at FROM token";

pub(crate) fn insert(connection: &Connection, token: &TokenRow) -> Result<(), DbError> {
    connection.execute(
        "INSERT INTO token (id, secret_hash, host_id, allow, created_at, expires_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![token.id, token.secret_hash, token.host_id, token.allow, token.created_at, token.expires_at],
    )?;
    Ok(())
}

pub(crate) fn get(connection: &Connection, id: &str) -> Result<Option<TokenRow>, DbError> {
    let query = format!("{SELECT} WHERE id = ?1");
    Ok(connection.query_row(&query, [id], token_row).optional()?)
}

/// Tokens that can still enrol a new host.
pub(crate) fn open(connection: &Connection, now: i64) -> Result<Vec<TokenRow>, DbError> {
    let mut query =
        connection.prepare(&format!("{SELECT} WHERE used_key IS NULL AND expires_at > ?1 ORDER BY created_at"))?;
    let rows = query.query_map([now], token_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Binds a token to the key that used it first.
pub(crate) fn bind(connection: &Connection, id: &str, key: &[u8], now: i64) -> Result<(), DbError> {
    let bind = "UPDATE token SET used_key = ?2, used_at = ?3 WHERE id = ?1 AND used_key IS NULL";
    connection.execute(bind, params![id, key, now])?;
    Ok(())
}

fn token_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<TokenRow> {
    Ok(TokenRow {
        id: row.get(0)?,
        secret_hash: row.get(1)?,
        host_id: row.get(2)?,
        allow: row.get(3)?,
        created_at: row.get(4)?,
        expires_at: row.get(5)?,
        used_key: row.get(6)?,
        used_at: row.get(7)?,
    })
}
