//! What operators do. Each command is written once, over a state directory; it may be called on it directly, through
//! the server's Unix socket, or over mutual TLS ([`crate::admin`] has no idea which).

mod authority;
mod deny;
mod entries;
mod error;
mod gates;
mod host;
mod recovery;
mod role;
mod service;
mod socket;
mod unrecorded;

use std::path::Path;
use std::time::{Duration, SystemTime};

use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{self as wire};

pub(crate) use self::authority::key_sha256;
pub use self::error::AdminError;
pub(crate) use self::service::AdminService;
pub use self::socket::{Readers, bind, serve_socket};
use crate::audit::Event;
use crate::deny::Floor;
use crate::keys::Kek;
use crate::lifetimes::Lifetimes;
use crate::pki::Pki;
use crate::rotation::step::Rotator;
use crate::start::{Standing, Start};
use crate::state_dir::{StateDir, StateError};
pub use crate::store::roles::Role;
use crate::store::{DbError, Records, settings};
use crate::times::{rfc3339, unix};

/// The name of the socket, in the state directory unless told otherwise.
pub const SOCKET: &str = "admin.sock";

/// Who asks, as the kernel or TLS has it; never what the caller says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// For the audit log.
    pub name: String,
    pub role: Role,
}

impl Actor {
    /// Whoever runs this process: the files of the PKI are open to them, so everything is.
    pub fn local() -> Actor {
        Actor { name: user(nix::unistd::getuid()), role: Role::Admin }
    }
}

/// `uid 1000 (alice)`
fn user(uid: nix::unistd::Uid) -> String {
    match nix::unistd::User::from_uid(uid) {
        Ok(Some(user)) => format!("uid {uid} ({})", user.name),
        _ => format!("uid {uid}"),
    }
}

/// Carries a command out on a state directory. A server may run on it meanwhile: it notices within a second.
pub fn run_on(dir: &Path, actor: &Actor, command: Command, now: SystemTime) -> Result<Reply, AdminError> {
    let state = StateDir::open(dir)?;
    // The server's own may be shorter. What is on record of its certificates counts besides, so waits can only be longer.
    let lifetimes = Lifetimes::default();
    let clock_doubt = clock_doubt(&state, &lifetimes, now)?;
    let desk = Desk { state: &state, lifetimes: &lifetimes, clock_doubt, kek: None, actor, now };
    desk.carry_out(command)
}

/// No server runs that could have heard what time it is: only the time on record tells.
fn clock_doubt(state: &StateDir, lifetimes: &Lifetimes, now: SystemTime) -> Result<Option<String>, DbError> {
    let last_good = state.database.read(settings::last_good)?;
    let standing = Start::new(last_good, Duration::ZERO, &[]).judge(unix(now), Duration::ZERO, &[], lifetimes);
    let doubt = "no server of this PKI has run lately that could vouch for this machine's clock; start it";
    Ok((standing != Standing::Confirmed).then(|| doubt.to_owned()))
}

impl Pki {
    /// Carries a command out on the running PKI, with effect when it returns.
    pub fn command(&self, actor: &Actor, command: Command) -> Result<Reply, AdminError> {
        let (clock_doubt, lifetimes) = (self.clock_doubt(), &self.lifetimes);
        let desk = Desk { state: &self.state, lifetimes, clock_doubt, kek: Some(&self.kek), actor, now: self.now() };
        let reply = desk.carry_out(command);
        if let Err(AdminError::Forbidden(why)) = &reply {
            let (by, detail) = (Some(actor.name.clone()), Some(why.clone()));
            self.record_refusal(Event { event: "admin", result: "refused", by, detail, ..Event::default() });
        }
        let reply = reply?;
        self.refresh()?;
        Ok(reply)
    }
}

/// Where a command is carried out, and for whom.
struct Desk<'a> {
    state: &'a StateDir,
    lifetimes: &'a Lifetimes,
    /// Why nothing is done now that depends on the clock.
    clock_doubt: Option<String>,
    /// `None`: it is in the state directory, and loaded by the commands that need it.
    kek: Option<&'a Kek>,
    actor: &'a Actor,
    now: SystemTime,
}

impl Desk<'_> {
    fn carry_out(&self, command: Command) -> Result<Reply, AdminError> {
        self.check_role(&command)?;
        match command {
            Command::AuthorityList(_) => self.authority_list().map(Reply::Authorities),
            Command::AuthorityPrepare(_) => self.authority_prepare().map(Reply::Done),
            Command::AuthorityActivate(_) => self.authority_activate().map(Reply::Done),
            Command::AuthorityRemove(asked) => self.authority_remove(&asked.id).map(Reply::Done),
            Command::AuthorityTaint(asked) => self.authority_taint(&asked.id).map(Reply::Done),
            Command::AuthorityRotate(asked) => self.authority_rotate(asked.force).map(Reply::Done),
            Command::HostList(asked) => self.host_list(&asked.after).map(Reply::Hosts),
            Command::HostShow(asked) => self.host_show(&asked.host).map(Reply::Host),
            Command::HostBan(asked) => self.host_ban(&asked.host, &asked.reason).map(Reply::Done),
            Command::HostUnban(asked) => self.host_unban(&asked.host).map(Reply::Done),
            Command::HostEvict(asked) => self.host_evict(&asked.host, &asked.reason).map(Reply::Done),
            Command::HostBlastRadius(asked) => self.host_blast_radius(&asked.host).map(Reply::BlastRadius),
            Command::DenyList(_) => self.deny_list().map(Reply::DenySet),
            Command::DenyAdd(asked) => self.deny_add(&asked).map(Reply::Done),
            Command::DenyRemove(asked) => self.deny_remove(&asked).map(Reply::Done),
            Command::RoleList(_) => self.role_list().map(Reply::Roles),
            Command::RoleGrant(asked) => self.role_grant(&asked).map(Reply::Done),
            Command::RoleRevoke(asked) => self.role_revoke(&asked.identity).map(Reply::Done),
            Command::TokenCreate(asked) => self.token_create(&asked).map(Reply::Token),
            Command::EntryList(asked) => self.entry_list(&asked.host).map(Reply::Entries),
            Command::EntryAdd(asked) => self.entry_add(&asked).map(Reply::Done),
            Command::EntryRemove(asked) => self.entry_remove(&asked).map(Reply::Done),
            Command::RecoveryShow(_) => self.recovery_show().map(Reply::Recovery),
            Command::RecoveryRequest(_) => self.recovery_request().map(Reply::RecoveryWish),
            Command::RecoveryImport(asked) => self.recovery_import(&asked).map(Reply::Done),
        }
    }

    /// Writes to the audit log, with who asked for it.
    fn record(&self, event: Event) -> Result<(), StateError> {
        let by = Some(self.actor.name.clone());
        self.state.record(self.now, &[Event { by, ..event }])
    }

    /// Changes records, and tells the audit log of it with who asked for it.
    fn change<T>(
        &self,
        mut act: impl FnMut(&mut dyn Records, &mut Vec<Event>) -> Result<T, AdminError>,
    ) -> Result<T, AdminError> {
        self.state.change(self.now, |records, told| self.signed(records, told, &mut act))
    }

    /// As `change`, for what only the leader may do; `None` when that is another server.
    fn lead<T>(
        &self,
        mut act: impl FnMut(&mut dyn Records, &mut Vec<Event>) -> Result<T, AdminError>,
    ) -> Result<Option<T>, AdminError> {
        self.state.lead(self.now, |records, told| self.signed(records, told, &mut act))
    }

    fn signed<T>(
        &self,
        records: &mut dyn Records,
        told: &mut Vec<Event>,
        act: &mut impl FnMut(&mut dyn Records, &mut Vec<Event>) -> Result<T, AdminError>,
    ) -> Result<T, AdminError> {
        let done = act(records, told)?;
        told.iter_mut().for_each(|event| event.by = Some(self.actor.name.clone()));
        Ok(done)
    }

    fn with_rotator<T>(&self, act: impl FnOnce(&Rotator<'_>) -> Result<T, AdminError>) -> Result<T, AdminError> {
        let loaded;
        let kek = match self.kek {
            Some(kek) => kek,
            None => {
                loaded = self.state.kek()?;
                &loaded
            }
        };
        act(&Rotator {
            domain: &self.state.trust_domain,
            kek,
            lifetimes: self.lifetimes,
            clock_is_good: self.clock_doubt.is_none(),
            deny_floor: Floor::new(self.state).get(),
            now: self.now,
        })
    }
}

fn done(what: String, follows: Vec<String>) -> wire::Done {
    wire::Done { what, follows }
}

fn time(seconds: i64) -> String {
    rfc3339(seconds)
}
