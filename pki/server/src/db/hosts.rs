//! Hosts and the identities they may hold.

use rusqlite::{Connection, OptionalExtension, params};

use super::DbError;

#[derive(Debug, Clone)]
pub(crate) struct HostRow {
    pub(crate) id: String,
    pub(crate) state: String,
    pub(crate) key_current: Vec<u8>,
    pub(crate) key_next: Option<Vec<u8>>,
    pub(crate) enrolled_at: i64,
    pub(crate) last_seen: i64,
    pub(crate) acked_sequence: i64,
    pub(crate) clock_offset_ms: i64,
}

/// What a host's message tells about it.
pub(crate) struct Sighting<'a> {
    pub(crate) host_id: &'a str,
    pub(crate) now: i64,
    pub(crate) acked_sequence: u64,
    pub(crate) clock_offset_ms: i64,
}

pub(crate) fn get(connection: &Connection, id: &str) -> Result<Option<HostRow>, DbError> {
    let query = format!("{SELECT} WHERE id = ?1");
    Ok(connection.query_row(&query, [id], host_row).optional()?)
}

pub(crate) fn list(connection: &Connection) -> Result<Vec<HostRow>, DbError> {
    let mut query = connection.prepare(&format!("{SELECT} ORDER BY id"))?;
    let rows = query.query_map([], host_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

const SELECT: &str = "SELECT id, state, key_current, key_next, enrolled_at, last_seen, acked_sequence, clock_offset_ms
    FROM host";

fn host_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<HostRow> {
    Ok(HostRow {
        id: row.get(0)?,
        state: row.get(1)?,
        key_current: row.get(2)?,
        key_next: row.get(3)?,
        enrolled_at: row.get(4)?,
        last_seen: row.get(5)?,
        acked_sequence: row.get(6)?,
        clock_offset_ms: row.get(7)?,
    })
}

/// A new host, or a known one enrolled again with a new key.
pub(crate) fn enrol(connection: &Connection, id: &str, key: &[u8], now: i64) -> Result<(), DbError> {
    connection.execute(
        "INSERT INTO host (id, state, key_current, enrolled_at, last_seen) VALUES (?1, 'active', ?2, ?3, ?3)
         ON CONFLICT (id) DO UPDATE SET key_current = excluded.key_current, key_next = NULL,
           enrolled_at = excluded.enrolled_at, last_seen = excluded.last_seen",
        params![id, key, now],
    )?;
    Ok(())
}

pub(crate) fn seen(connection: &Connection, sighting: &Sighting<'_>) -> Result<(), DbError> {
    let acked = i64::try_from(sighting.acked_sequence).unwrap_or(i64::MAX);
    connection.execute(
        "UPDATE host SET last_seen = ?2, acked_sequence = max(acked_sequence, ?3), clock_offset_ms = ?4 WHERE id = ?1",
        params![sighting.host_id, sighting.now, acked, sighting.clock_offset_ms],
    )?;
    Ok(())
}

/// A key was issued to the host; the one before stays enrolled until the new one is used.
pub(crate) fn set_next_key(connection: &Connection, id: &str, key: &[u8]) -> Result<(), DbError> {
    connection.execute("UPDATE host SET key_next = ?2 WHERE id = ?1", params![id, key])?;
    Ok(())
}

pub(crate) fn promote_next_key(connection: &Connection, id: &str) -> Result<(), DbError> {
    let promote = "UPDATE host SET key_current = key_next, key_next = NULL WHERE id = ?1 AND key_next IS NOT NULL";
    connection.execute(promote, [id])?;
    Ok(())
}

pub(crate) fn permitted(connection: &Connection, host: &str) -> Result<Vec<String>, DbError> {
    let mut query = connection.prepare_cached("SELECT spiffe_id FROM entry WHERE host_id = ?1 ORDER BY spiffe_id")?;
    let rows = query.query_map([host], |row| row.get(0))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Whether the entry is new.
pub(crate) fn permit(connection: &Connection, host: &str, spiffe_id: &str, now: i64) -> Result<bool, DbError> {
    let insert = "INSERT INTO entry VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING";
    Ok(connection.execute(insert, params![host, spiffe_id, now])? == 1)
}

/// Whether there was one.
pub(crate) fn forbid(connection: &Connection, host: &str, spiffe_id: &str) -> Result<bool, DbError> {
    let delete = "DELETE FROM entry WHERE host_id = ?1 AND spiffe_id = ?2";
    Ok(connection.execute(delete, params![host, spiffe_id])? == 1)
}

/// `(host, identity)` pairs.
pub(crate) fn entries(connection: &Connection) -> Result<Vec<(String, String)>, DbError> {
    let mut query = connection.prepare("SELECT host_id, spiffe_id FROM entry ORDER BY host_id, spiffe_id")?;
    let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}
