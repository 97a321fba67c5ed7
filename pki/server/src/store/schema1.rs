//! Reads the tables of the first version once, and writes them as records.

use rusqlite::Connection;
use serde::Serialize;

use super::bundles::StoredBundle;
use super::hosts::{Entry, Host, HostState};
use super::intermediates::Intermediate;
use super::tokens::{Token, Use};
use super::{DbError, SCHEMA};
use crate::rotation::{Root, RootState, Trust};

pub(super) fn is_in(connection: &Connection) -> Result<bool, DbError> {
    let find = "SELECT count(*) FROM sqlite_master WHERE name = 'meta'";
    Ok(connection.query_row(find, [], |row| row.get::<_, i64>(0))? == 1)
}

/// All or nothing: a crash leaves the old tables as they were.
pub(super) fn convert(connection: &mut Connection, table: &str) -> Result<(), DbError> {
    let transaction = connection.transaction()?;
    transaction.execute_batch(table)?;
    convert_settings(&transaction)?;
    convert_trust(&transaction)?;
    convert_hosts(&transaction)?;
    convert_tokens(&transaction)?;
    let tables = ["meta", "authority", "bundle", "recovery_key", "host", "token", "entry", "issued"];
    for table in tables {
        transaction.execute_batch(&format!("DROP TABLE {table}"))?;
    }
    transaction.pragma_update(None, "user_version", SCHEMA)?;
    transaction.commit()?;
    tracing::info!("the database was converted to schema {SCHEMA}");
    Ok(())
}

fn put(connection: &Connection, key: &str, value: &impl Serialize) -> Result<(), DbError> {
    let value = serde_json::to_string(value)
        .map_err(|error| DbError::Record { key: key.to_owned(), detail: error.to_string() })?;
    super::sqlite::put(connection, key, &value)
}

fn rows<T>(
    connection: &Connection,
    query: &str,
    read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>, DbError> {
    let mut query = connection.prepare(query)?;
    let rows = query.query_map([], read)?.collect::<Result<_, _>>();
    Ok(rows?)
}

fn convert_settings(connection: &Connection) -> Result<(), DbError> {
    let pairs = rows(connection, "SELECT key, value FROM meta", |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
    })?;
    for (key, value) in pairs {
        match key.as_str() {
            "trust_domain" => put(connection, "setting/trust_domain", &value)?,
            "advertise" => {
                put(connection, "setting/advertise", &value.split_whitespace().collect::<Vec<_>>())?;
            }
            _ => {}
        }
    }
    let keys = rows(connection, "SELECT public_key FROM recovery_key ORDER BY position", |row| {
        Ok(data_encoding::BASE64.encode(&row.get::<_, Vec<u8>>(0)?))
    })?;
    put(connection, "setting/recovery_keys", &keys)
}

fn convert_trust(connection: &Connection) -> Result<(), DbError> {
    let mut bundles =
        rows(connection, "SELECT sequence, digest, jwks, created_at FROM bundle ORDER BY sequence", |row| {
            let jwks = String::from_utf8_lossy(&row.get::<_, Vec<u8>>(2)?).into_owned();
            let (sequence, created_at) = (row.get::<_, i64>(0)?.unsigned_abs(), row.get(3)?);
            let (roots, signatures) = (Vec::new(), Vec::new());
            Ok((row.get::<_, Vec<u8>>(1)?, StoredBundle { sequence, jwks, roots, signatures, created_at }))
        })?;
    let root_ids = rows(connection, "SELECT id FROM authority WHERE kind = 'root'", |row| row.get::<_, String>(0))?;
    for (digest, bundle) in &mut bundles {
        // There was never more than one.
        bundle.roots.clone_from(&root_ids);
        let hex = data_encoding::HEXLOWER.encode(digest);
        put(connection, &format!("bundle_digest/{hex}"), &bundle.sequence)?;
        put(connection, &format!("bundle/{:020}", bundle.sequence), bundle)?;
    }
    let sequence = bundles.last().map_or(0, |(_, bundle)| bundle.sequence);
    let columns = "SELECT id, certificate, wrapped_key, published_at, activated_at, not_after FROM authority";
    let roots = rows(connection, &format!("{columns} WHERE kind = 'root' ORDER BY published_at"), |row| {
        Ok(Root {
            id: row.get(0)?,
            state: RootState::Active,
            certificate: row.get(1)?,
            wrapped_key: row.get::<_, Option<_>>(2)?.unwrap_or_default(),
            published_sequence: sequence,
            published_at: row.get(3)?,
            activated_at: row.get(4)?,
            removed_at: None,
            tainted_at: None,
            upstream: None,
            bridge: None,
            not_after: row.get(5)?,
        })
    })?;
    put(connection, "trust", &Trust { sequence, refresh_hint_s: 300, roots, ..Trust::default() })?;
    let columns = "SELECT id, parent, certificate, wrapped_key, activated_at, not_after, state FROM authority";
    let intermediates = rows(connection, &format!("{columns} WHERE kind = 'intermediate'"), |row| {
        let activated_at: i64 = row.get(4)?;
        let is_old = row.get::<_, String>(6)? != "active";
        Ok(Intermediate {
            id: row.get(0)?,
            replica: crate::state_dir::LOCAL_REPLICA.to_owned(),
            root: row.get::<_, Option<_>>(1)?.unwrap_or_default(),
            certificate: row.get(2)?,
            wrapped_key: row.get::<_, Option<_>>(3)?.unwrap_or_default(),
            activated_at,
            // When exactly is not known; it had a successor after three days.
            replaced_at: is_old.then_some(activated_at + 3 * 86_400),
            not_after: row.get(5)?,
            // The longest that was ever allowed.
            longest_leaf_s: 475_200,
            bundle_sequence: sequence,
            joined_bundle_at: activated_at,
            from_outside: false,
        })
    })?;
    for one in intermediates {
        put(connection, &format!("intermediate/{}/{}", one.replica, one.id), &one)?;
    }
    Ok(())
}

fn convert_hosts(connection: &Connection) -> Result<(), DbError> {
    let columns = "SELECT id, state, key_current, enrolled_at, last_seen, acked_sequence, clock_offset_ms FROM host";
    let hosts = rows(connection, columns, |row| {
        Ok(Host {
            id: row.get(0)?,
            state: if row.get::<_, String>(1)? == "banned" { HostState::Banned } else { HostState::Active },
            key_current: row.get(2)?,
            public_key: vec![],
            enrolled_key: vec![],
            next: None,
            enrolled_at: row.get(3)?,
            last_seen: row.get(4)?,
            acked_sequence: row.get::<_, i64>(5)?.unsigned_abs(),
            clock_offset_ms: row.get(6)?,
            roots_in_use: vec![],
            labels: Default::default(),
            enrolled_by: String::new(),
            adopted_until: None,
            unrecorded_until: None,
        })
    })?;
    for host in hosts {
        put(connection, &format!("host/{}", host.id), &host)?;
    }
    let entries = rows(connection, "SELECT host_id, spiffe_id, created_at FROM entry", |row| {
        Ok(Entry { host: row.get(0)?, spiffe_id: row.get(1)?, created_at: row.get(2)?, terms: Default::default() })
    })?;
    for entry in entries {
        put(connection, &format!("entry/{}/{}", entry.host, entry.spiffe_id), &entry)?;
    }
    Ok(())
}

fn convert_tokens(connection: &Connection) -> Result<(), DbError> {
    let columns = "SELECT id, secret_hash, host_id, allow, created_at, expires_at, used_key, used_at FROM token";
    let tokens = rows(connection, columns, |row| {
        let allow: String = row.get(3)?;
        let used: Option<(Vec<u8>, i64)> = row.get::<_, Option<_>>(6)?.zip(row.get(7)?);
        Ok(Token {
            id: row.get(0)?,
            secret_hash: row.get(1)?,
            host_id: row.get(2)?,
            allow: allow.split_whitespace().map(str::to_owned).collect(),
            created_at: row.get(4)?,
            expires_at: row.get(5)?,
            used: used.map(|(key_id, at)| Use { key_id, at }),
            max_uses: 1,
            uses: 0,
            from: vec![],
            labels: Default::default(),
        })
    })?;
    for token in tokens {
        put(connection, &format!("token/{}", token.id), &token)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use meshd_identity::TrustDomain;

    use crate::store::{Database, hosts, settings, trust};

    const FIRST_VERSION: &str = "
        CREATE TABLE meta (key TEXT, value TEXT);
        CREATE TABLE authority (id TEXT, kind TEXT, state TEXT, parent TEXT, certificate BLOB, wrapped_key BLOB,
          published_at INTEGER, activated_at INTEGER, last_issue_at INTEGER, not_after INTEGER);
        CREATE TABLE bundle (sequence INTEGER, digest BLOB, jwks BLOB, created_at INTEGER);
        CREATE TABLE recovery_key (public_key BLOB, position INTEGER, added_at INTEGER);
        CREATE TABLE host (id TEXT, state TEXT, key_current BLOB, key_next BLOB, enrolled_at INTEGER,
          last_seen INTEGER, acked_sequence INTEGER, clock_offset_ms INTEGER);
        CREATE TABLE token (id TEXT, secret_hash BLOB, host_id TEXT, allow TEXT, created_at INTEGER,
          expires_at INTEGER, used_key BLOB, used_at INTEGER);
        CREATE TABLE entry (host_id TEXT, spiffe_id TEXT, created_at INTEGER);
        CREATE TABLE issued (serial TEXT);
        INSERT INTO meta VALUES ('schema', '1'), ('trust_domain', 'prod.example.org'), ('advertise', 'a:1 b:2');
        INSERT INTO authority VALUES ('r', 'root', 'active', NULL, x'01', x'02', 10, 10, 0, 1000),
          ('i', 'intermediate', 'active', 'r', x'03', x'04', 20, 20, 0, 500);
        INSERT INTO bundle VALUES (7, x'aa', x'7b7d', 10);
        INSERT INTO recovery_key VALUES (x'09', 1, 10);
        INSERT INTO host VALUES ('web', 'active', x'05', NULL, 30, 40, 7, -3);
        INSERT INTO token VALUES ('t', x'06', 'web', 'spiffe://a spiffe://b', 30, 60, x'05', 31);
        INSERT INTO entry VALUES ('web', 'spiffe://prod.example.org/ns/a/sa/b', 30);";

    #[test]
    fn what_the_first_version_knew_is_there_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pki.db");
        rusqlite::Connection::open(&path).unwrap().execute_batch(FIRST_VERSION).unwrap();
        let domain: TrustDomain = "prod.example.org".parse().unwrap();
        // Twice: the second time it is a database like any other.
        for _ in 0..2 {
            let database = Database::open_file(&path).unwrap();
            let checked = database.read(|view| -> Result<(), crate::store::DbError> {
                assert_eq!(settings::trust_domain(view)?, Some(domain.clone()));
                assert_eq!(settings::advertise(view)?, ["a:1", "b:2"]);
                assert_eq!(settings::recovery_keys(view)?, [[9]]);
                let trust = trust::trust(view)?;
                assert_eq!((trust.sequence, trust.active().unwrap().id.as_str()), (7, "r"));
                let active = crate::store::intermediates::active(view, crate::state_dir::LOCAL_REPLICA)?.unwrap();
                assert_eq!((active.id.as_str(), active.wrapped_key), ("i", vec![4]));
                let host = hosts::host(view, "web")?.unwrap();
                assert_eq!((host.acked_sequence, host.clock_offset_ms, host.last_seen), (7, -3, 40));
                assert_eq!(hosts::permitted(view, "web")?, ["spiffe://prod.example.org/ns/a/sa/b"]);
                assert_eq!(crate::store::tokens::token(view, "t")?.unwrap().used.unwrap().at, 31);
                assert_eq!(crate::store::bundles::by_digest(view, &[0xaa])?.unwrap().jwks, "{}");
                Ok(())
            });
            checked.unwrap();
        }
    }
}
