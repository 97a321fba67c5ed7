//! `meshd-pki status`: what the PKI holds, from its state directory; no server needed.

mod judge;
mod text;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::SystemTime;

use data_encoding::HEXLOWER;
use meshd_identity::sha256;
use serde::Serialize;

use crate::commands::CommandError;
use crate::federation::{self, commands::FederationStatus};
use crate::health::Health;
use crate::health::census::LeafState;
use crate::issue::shorten;
use crate::keeping::restored::Restored;
use crate::lifetimes::Lifetimes;
use crate::replicas::{self, ReplicaStatus};
use crate::state_dir::StateDir;
use crate::store::hosts::Host;
use crate::store::tokens::Token;
use crate::store::{View, hosts, intermediates, servers, settings, tokens, trust};
use crate::times::{rfc3339, unix};

#[derive(Debug, Serialize)]
pub struct Status {
    pub trust_domain: String,
    pub bundle_sequence: u64,
    pub bundle_sha256: String,
    pub recovery_key_ids: Vec<String>,
    pub authorities: Vec<AuthorityStatus>,
    pub hosts: Vec<HostStatus>,
    pub open_tokens: Vec<TokenStatus>,
    /// Every certificate and key the system uses, with its end.
    pub certificates: Vec<CertificateStatus>,
    pub valid_certificates: u64,
    /// The servers, where there are several.
    pub replicas: Vec<ReplicaStatus>,
    pub rotation: RotationStatus,
    /// Of hosts heard in the last 10 minutes.
    pub clocks: Option<ClockStatus>,
    pub servers: Vec<ServerStatus>,
    pub clone_alarms: Vec<CloneStatus>,
    pub federation: Vec<FederationStatus>,
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
pub struct CertificateStatus {
    /// `root`, `intermediate`, `bridge` (by the root it leads to), `jwt_key`, `endpoint`, `host`, `workload`.
    pub kind: String,
    /// Of an authority or key its identifier, else the serial of the certificate in hexadecimal.
    pub id: String,
    pub state: String,
    pub identity: Option<String>,
    /// Host or server that has it.
    pub host: Option<String>,
    /// Identifier of the authority that signed it.
    pub issuer: Option<String>,
    pub not_after: String,
}

#[derive(Debug, Serialize)]
pub struct RotationStatus {
    /// When the calendar wants the next root.
    pub next_root: Option<String>,
    /// What holds the rotation up and time alone does not cure.
    pub blocked: Vec<GateStatus>,
    pub waiting: Vec<GateStatus>,
}

#[derive(Debug, Serialize)]
pub struct GateStatus {
    /// None for the root to come.
    pub root: Option<String>,
    pub reason: String,
    pub text: String,
}

#[derive(Debug, Serialize)]
pub struct ClockStatus {
    pub lowest_ms: i64,
    pub median_ms: i64,
    pub highest_ms: i64,
}

/// One server of the PKI, as it last said.
#[derive(Debug, Serialize)]
pub struct ServerStatus {
    pub replica: String,
    pub seen: String,
    pub is_running: bool,
    /// Why it issues nothing now.
    pub clock_problem: Option<String>,
    /// Rotation waits until hosts agree with its clock.
    pub is_clock_unconfirmed: bool,
    /// Certificates asked for since it started, by whose and result.
    pub renewals: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
pub struct CloneStatus {
    pub host: String,
    pub at: String,
    pub remote: String,
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
        let (health, servers, authorities) = state.database.read(|view| -> Result<_, CommandError> {
            let servers = servers::servers(view)?;
            // What a server runs with is known only from itself.
            let newest = servers.iter().max_by_key(|server| server.at);
            let lifetimes = newest.map_or_else(Lifetimes::default, |server| server.lifetimes);
            let clock_is_good = newest.is_none_or(|server| server.distrust.is_none());
            let health = Health::look(view, &lifetimes, clock_is_good, now)?;
            Ok((health, servers, authorities(view, now)?))
        })?;
        let mut problems = judge::problems(&health, &servers);
        let audit = state.audit.verify();
        if let Err(problem) = &audit {
            problems.push(problem.clone());
        }
        problems.extend(Restored::read(dir).filter(|restored| !restored.seen).map(|restored| restored.problem()));
        let replicas = replicas::of(&state)?;
        for away in replicas.iter().filter(|one| !one.runs) {
            let id = &away.id;
            problems.push(format!("replica {id} is away; if it will not come back: `meshd-pki replica remove {id}`"));
        }
        if !replicas.is_empty() && !replicas.iter().any(|one| one.leads) {
            problems.push("no replica leads: nothing is rotated".to_owned());
        }
        let mut advice = judge::advice(&health);
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
            replicas,
            valid_certificates: health.leaves.iter().filter(|held| held.state != LeafState::Ended).count() as u64,
            certificates: judge::certificates(&health, &servers),
            rotation: judge::rotation(&health, &servers),
            clocks: judge::clocks(&health),
            servers: servers.iter().map(|server| judge::server(server, now)).collect(),
            federation: health.federation.iter().cloned().map(federation::commands::status).collect(),
            clone_alarms: health.clones.iter().map(judge::clone_alarm).collect(),
            audit_lines: audit.ok(),
            problems,
            advice,
        })
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
