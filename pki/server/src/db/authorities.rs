//! Authorities, bundles, recovery keys, and what was issued.

use rusqlite::{Connection, OptionalExtension, params};

use super::DbError;

/// A crash must never make the time of the last issue look earlier than it was, so it is written this far ahead.
const LAST_ISSUE_AHEAD_S: i64 = 600;

#[derive(Debug, Clone)]
pub(crate) struct AuthorityRow {
    pub(crate) id: String,
    pub(crate) kind: String,
    pub(crate) state: String,
    pub(crate) parent: Option<String>,
    pub(crate) certificate: Vec<u8>,
    pub(crate) wrapped_key: Option<Vec<u8>>,
    pub(crate) activated_at: i64,
    pub(crate) not_after: i64,
}

#[derive(Debug, Clone)]
pub(crate) struct BundleRow {
    pub(crate) sequence: u64,
    pub(crate) jwks: Vec<u8>,
}

pub(crate) struct IssuedRow<'a> {
    pub(crate) serial: &'a str,
    pub(crate) spiffe_id: &'a str,
    pub(crate) host_id: &'a str,
    pub(crate) authority: &'a str,
    pub(crate) issued_at: i64,
    pub(crate) not_after: i64,
}

pub(crate) fn insert_active(connection: &Connection, row: &AuthorityRow) -> Result<(), DbError> {
    connection.execute(
        "INSERT INTO authority (id, kind, state, parent, certificate, wrapped_key, published_at, activated_at, not_after)
         VALUES (?1, ?2, 'active', ?3, ?4, ?5, ?6, ?6, ?7)",
        params![row.id, row.kind, row.parent, row.certificate, row.wrapped_key, row.activated_at, row.not_after],
    )?;
    Ok(())
}

/// Ends the use of all active intermediates and destroys their keys: what they signed verifies without them.
pub(crate) fn retire_intermediates(connection: &Connection) -> Result<(), DbError> {
    let retire =
        "UPDATE authority SET state = 'old', wrapped_key = NULL WHERE kind = 'intermediate' AND state = 'active'";
    connection.execute(retire, [])?;
    Ok(())
}

pub(crate) fn active(connection: &Connection, kind: &str) -> Result<Option<AuthorityRow>, DbError> {
    let all = list(connection)?;
    Ok(all.into_iter().rev().find(|row| row.kind == kind && row.state == "active"))
}

/// Oldest first.
pub(crate) fn list(connection: &Connection) -> Result<Vec<AuthorityRow>, DbError> {
    let mut query = connection.prepare_cached(
        "SELECT id, kind, state, parent, certificate, wrapped_key, activated_at, not_after
         FROM authority ORDER BY activated_at, rowid",
    )?;
    let rows = query.query_map([], |row| {
        Ok(AuthorityRow {
            id: row.get(0)?,
            kind: row.get(1)?,
            state: row.get(2)?,
            parent: row.get(3)?,
            certificate: row.get(4)?,
            wrapped_key: row.get(5)?,
            activated_at: row.get(6)?,
            not_after: row.get(7)?,
        })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

pub(crate) fn insert_bundle(
    connection: &Connection,
    bundle: &BundleRow,
    digest: &[u8],
    now: i64,
) -> Result<(), DbError> {
    let sequence = i64::try_from(bundle.sequence).unwrap_or(i64::MAX);
    connection.execute("INSERT INTO bundle VALUES (?1, ?2, ?3, ?4)", params![sequence, digest, bundle.jwks, now])?;
    Ok(())
}

pub(crate) fn latest_bundle(connection: &Connection) -> Result<Option<BundleRow>, DbError> {
    let query = "SELECT sequence, jwks FROM bundle ORDER BY sequence DESC LIMIT 1";
    Ok(connection.query_row(query, [], bundle_row).optional()?)
}

pub(crate) fn bundle_by_digest(connection: &Connection, digest: &[u8]) -> Result<Option<BundleRow>, DbError> {
    let query = "SELECT sequence, jwks FROM bundle WHERE digest = ?1";
    Ok(connection.query_row(query, [digest], bundle_row).optional()?)
}

fn bundle_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<BundleRow> {
    Ok(BundleRow { sequence: row.get::<_, i64>(0)?.unsigned_abs(), jwks: row.get(1)? })
}

pub(crate) fn insert_recovery_key(connection: &Connection, public_key: &[u8], now: i64) -> Result<(), DbError> {
    let insert = "INSERT INTO recovery_key SELECT ?1, coalesce(max(position), 0) + 1, ?2 FROM recovery_key";
    connection.execute(insert, params![public_key, now])?;
    Ok(())
}

/// Current first.
pub(crate) fn recovery_keys(connection: &Connection) -> Result<Vec<Vec<u8>>, DbError> {
    let mut query = connection.prepare_cached("SELECT public_key FROM recovery_key ORDER BY position LIMIT 2")?;
    let rows = query.query_map([], |row| row.get(0))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

pub(crate) fn insert_issued(connection: &Connection, row: &IssuedRow<'_>) -> Result<(), DbError> {
    connection.execute(
        "INSERT INTO issued VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![row.serial, row.spiffe_id, row.host_id, row.authority, row.issued_at, row.not_after],
    )?;
    connection.execute(
        "UPDATE authority SET last_issue_at = ?2 WHERE id = ?1 AND last_issue_at < ?3",
        params![row.authority, row.issued_at + LAST_ISSUE_AHEAD_S, row.issued_at],
    )?;
    Ok(())
}

/// Forgets certificates and tokens that ended before `before`.
pub(crate) fn prune(connection: &Connection, before: i64) -> Result<usize, DbError> {
    let tokens = connection.execute("DELETE FROM token WHERE expires_at < ?1", [before])?;
    Ok(tokens + connection.execute("DELETE FROM issued WHERE not_after < ?1", [before])?)
}

pub(crate) fn count_valid_issued(connection: &Connection, now: i64) -> Result<u64, DbError> {
    let count: i64 =
        connection.query_row("SELECT count(*) FROM issued WHERE not_after > ?1", [now], |row| row.get(0))?;
    Ok(count.unsigned_abs())
}
