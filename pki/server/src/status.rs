//! `meshd-pki status`: what the PKI holds, from its state directory; no server needed.

use std::fmt::Write;
use std::path::Path;
use std::time::SystemTime;

use data_encoding::HEXLOWER;
use meshd_identity::sha256;
use serde::Serialize;

use crate::commands::CommandError;
use crate::issue::shorten;
use crate::state_dir::StateDir;
use crate::store::hosts::Host;
use crate::store::tokens::Token;
use crate::store::{View, hosts, intermediates, settings, tokens, trust};
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
    #[serde(skip)]
    ends_at: i64,
}

#[derive(Debug, Serialize)]
pub struct HostStatus {
    pub id: String,
    pub state: String,
    pub enrolled_at: String,
    pub last_seen: String,
    pub bundle_sequence: u64,
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
        let bundle = state.latest_bundle()?;
        let now = unix(now);
        let mut problems = Vec::new();
        let authorities = state.database.read(|view| authorities(view, now))?;
        for one in authorities.iter().filter(|one| one.kind == "root" && one.ends_at - now < ROOT_WARNING_S) {
            problems.push(format!("root {} ends at {}", one.id, one.not_after));
        }
        let audit = state.audit.verify();
        if let Err(problem) = &audit {
            problems.push(problem.clone());
        }
        let mut advice = Vec::new();
        if dir.join("recovery.key").exists() {
            advice.push(format!("{} is still here; move it offline", dir.join("recovery.key").display()));
        }
        let database = &state.database;
        Ok(Status {
            trust_domain: state.trust_domain.to_string(),
            bundle_sequence: bundle.sequence,
            bundle_sha256: HEXLOWER.encode(&bundle.digest()),
            recovery_key_ids: database.read(settings::recovery_keys)?.iter().map(|key| hex_id(key)).collect(),
            authorities,
            hosts: database.read(|view| {
                hosts::hosts(view)?.into_iter().map(|host| host_status(view, host)).collect::<Result<_, CommandError>>()
            })?,
            open_tokens: database.read(|view| tokens::open(view, now))?.into_iter().map(token_status).collect(),
            valid_certificates: database.read(|view| hosts::valid_issued(view, now))?.len() as u64,
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

/// Roots first, each with what it signed.
fn authorities(view: &mut dyn View, now: i64) -> Result<Vec<AuthorityStatus>, CommandError> {
    let roots = trust::trust(view)?.roots.into_iter().map(|root| AuthorityStatus {
        state: root.state.name().to_owned(),
        kind: "root".to_owned(),
        parent: None,
        not_after: rfc3339(root.not_after),
        ends_at: root.not_after,
        id: root.id,
    });
    let intermediates = intermediates::all(view)?.into_iter().map(|one| AuthorityStatus {
        state: if one.replaced_at.is_none() { "active" } else { "old" }.to_owned(),
        kind: "intermediate".to_owned(),
        parent: Some(one.root),
        not_after: rfc3339(one.not_after),
        ends_at: one.not_after,
        id: one.id,
    });
    Ok(roots.chain(intermediates).filter(|one| one.ends_at > now || one.state == "active").collect())
}

fn host_status(view: &mut dyn View, host: Host) -> Result<HostStatus, CommandError> {
    let permitted = hosts::permitted(view, &host.id)?;
    Ok(HostStatus {
        state: host.state.name().to_owned(),
        enrolled_at: rfc3339(host.enrolled_at),
        last_seen: rfc3339(host.last_seen),
        bundle_sequence: host.acked_sequence,
        clock_offset_ms: host.clock_offset_ms,
        key_sha256: HEXLOWER.encode(&host.key_current),
        identities: permitted.iter().map(|id| shorten(id).to_owned()).collect(),
        id: host.id,
    })
}

fn token_status(token: Token) -> TokenStatus {
    TokenStatus {
        identities: token.allow.iter().map(|id| shorten(id).to_owned()).collect(),
        id: token.id,
        host: match token.max_uses {
            1 => token.host_id,
            most => format!("{}-* ({} of {most})", token.host_id, token.uses),
        },
        created_at: rfc3339(token.created_at),
        expires_at: rfc3339(token.expires_at),
    }
}
