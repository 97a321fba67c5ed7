//! `meshd-pki status`: what the PKI holds, from its state directory; no server needed.

use std::fmt::Write;
use std::path::Path;
use std::time::SystemTime;

use data_encoding::HEXLOWER;
use meshd_identity::sha256;
use serde::Serialize;

use crate::commands::CommandError;
use crate::db::{authorities, hosts, tokens};
use crate::issue::shorten;
use crate::state_dir::StateDir;
use crate::times::{rfc3339, unix};

/// Below this the root needs attention: replacing it takes weeks of overlap.
const ROOT_WARNING_S: i64 = 60 * 86_400;

#[derive(Debug, Serialize)]
pub struct Status {
    pub trust_domain: String,
    pub bundle_sequence: u64,
    pub bundle_sha256: String,
    pub recovery_key_ids: Vec<String>,
    pub authorities: Vec<AuthorityStatus>,
    pub hosts: Vec<HostStatus>,
    pub open_tokens: Vec<TokenStatus>,
    pub valid_certificates: u64,
    pub audit_lines: Option<u64>,
    /// What needs the operator; empty when all is well.
    pub problems: Vec<String>,
    /// What would be better, but hurts nobody yet.
    pub advice: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct AuthorityStatus {
    pub id: String,
    pub kind: String,
    pub state: String,
    pub parent: Option<String>,
    pub not_after: String,
}

#[derive(Debug, Serialize)]
pub struct HostStatus {
    pub id: String,
    pub state: String,
    pub enrolled_at: String,
    pub last_seen: String,
    pub bundle_sequence: i64,
    pub clock_offset_ms: i64,
    pub key_sha256: String,
    pub identities: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct TokenStatus {
    pub id: String,
    pub host: String,
    pub created_at: String,
    pub expires_at: String,
    pub identities: Vec<String>,
}

impl Status {
    pub fn read(dir: &Path, now: SystemTime) -> Result<Status, CommandError> {
        let state = StateDir::open(dir)?;
        let reader = state.database.reader();
        let bundle = state.latest_bundle()?;
        let now = unix(now);
        let mut problems = Vec::new();
        let all = authorities::list(reader)?;
        for row in all.iter().filter(|row| row.kind == "root" && row.not_after - now < ROOT_WARNING_S) {
            problems.push(format!("root {} ends at {}", row.id, rfc3339(row.not_after)));
        }
        let audit = state.audit.verify();
        if let Err(problem) = &audit {
            problems.push(problem.clone());
        }
        let mut advice = Vec::new();
        if dir.join("recovery.key").exists() {
            advice.push(format!("{} is still here; move it offline", dir.join("recovery.key").display()));
        }
        let kept = all.into_iter().filter(|row| row.state != "old" || row.not_after > now);
        Ok(Status {
            trust_domain: state.trust_domain.to_string(),
            bundle_sequence: bundle.sequence,
            bundle_sha256: HEXLOWER.encode(&bundle.digest()),
            recovery_key_ids: authorities::recovery_keys(reader)?.iter().map(|key| hex_id(key)).collect(),
            authorities: kept.map(authority_status).collect(),
            hosts: hosts::list(reader)?.into_iter().map(|row| host_status(reader, row)).collect::<Result<_, _>>()?,
            open_tokens: tokens::open(reader, now)?.into_iter().map(token_status).collect(),
            valid_certificates: authorities::count_valid_issued(reader, now)?,
            audit_lines: audit.ok(),
            problems,
            advice,
        })
    }

    pub fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "trust domain   {}", self.trust_domain)?;
        writeln!(text, "bundle         sequence {}, sha256 {}", self.bundle_sequence, self.bundle_sha256)?;
        writeln!(text, "certificates   {} valid", self.valid_certificates)?;
        writeln!(text, "\n{:<14} {:<10} {:<34} NOT AFTER", "AUTHORITY", "STATE", "ID")?;
        for one in &self.authorities {
            writeln!(text, "{:<14} {:<10} {:<34} {}", one.kind, one.state, one.id, one.not_after)?;
        }
        writeln!(text, "\n{:<20} {:<8} {:<22} {:>9}  IDENTITIES", "HOST", "STATE", "LAST SEEN", "CLOCK")?;
        for one in &self.hosts {
            let clock = format!("{:+.1} s", one.clock_offset_ms as f64 / 1000.0);
            let identities = one.identities.join(", ");
            writeln!(text, "{:<20} {:<8} {:<22} {:>9}  {}", one.id, one.state, one.last_seen, clock, identities)?;
        }
        if !self.open_tokens.is_empty() {
            writeln!(text, "\n{:<18} {:<20} {:<22} IDENTITIES", "OPEN TOKEN", "HOST", "EXPIRES")?;
        }
        for one in &self.open_tokens {
            let identities = one.identities.join(", ");
            writeln!(text, "{:<18} {:<20} {:<22} {}", one.id, one.host, one.expires_at, identities)?;
        }
        writeln!(text)?;
        if let Some(lines) = self.audit_lines {
            writeln!(text, "√ audit log: {lines} lines, chain whole")?;
        }
        for problem in self.problems.iter().chain(&self.advice) {
            writeln!(text, "‼ {problem}")?;
        }
        Ok(())
    }
}

fn hex_id(key: &[u8]) -> String {
    HEXLOWER.encode(&sha256(key))
}

fn authority_status(row: authorities::AuthorityRow) -> AuthorityStatus {
    let not_after = rfc3339(row.not_after);
    AuthorityStatus { id: row.id, kind: row.kind, state: row.state, parent: row.parent, not_after }
}

fn host_status(reader: &rusqlite::Connection, row: hosts::HostRow) -> Result<HostStatus, CommandError> {
    let permitted = hosts::permitted(reader, &row.id)?;
    Ok(HostStatus {
        state: row.state,
        enrolled_at: rfc3339(row.enrolled_at),
        last_seen: rfc3339(row.last_seen),
        bundle_sequence: row.acked_sequence,
        clock_offset_ms: row.clock_offset_ms,
        key_sha256: HEXLOWER.encode(&row.key_current),
        identities: permitted.iter().map(|id| shorten(id).to_owned()).collect(),
        id: row.id,
    })
}

fn token_status(row: tokens::TokenRow) -> TokenStatus {
    TokenStatus {
        identities: row.allow.split_whitespace().map(|id| shorten(id).to_owned()).collect(),
        id: row.id,
        host: row.host_id,
        created_at: rfc3339(row.created_at),
        expires_at: rfc3339(row.expires_at),
    }
}
