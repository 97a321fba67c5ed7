//! Workloads known by the port they listen on: whose sockets those are, now and as long as they listen.
//!
//! A port is no proof of anything: whoever takes it first has it. So the owner is a unit, found by the cgroup the
//! kernel wrote down when the socket was made; login sessions never count unless the operator says so; and who was
//! first stays the owner until the port is enrolled anew, whoever else comes to listen there, which is logged and
//! counted (docs/enrolment.md).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use meshd_sys::sock_dump::{Listener, listeners};

use super::{CgroupUnits, Enrolment, PortMemory, Selector, UnitLookup, Workload};

/// How often the kernel is asked who listens, at most.
const REST: Duration = Duration::from_secs(1);

/// Who holds a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PortOwner {
    Unit(Arc<str>),
    /// On hosts without cgroup2.
    Uid(u32),
}

impl fmt::Display for PortOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PortOwner::Unit(unit) => f.write_str(unit),
            PortOwner::Uid(uid) => write!(f, "uid:{uid}"),
        }
    }
}

/// What is known of an enrolled port's owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ownership {
    Owned(PortOwner),
    /// Others listen where its owner did: none of them becomes it.
    Claimed {
        owner: PortOwner,
        by: BTreeSet<PortOwner>,
    },
    /// Nobody listens at the moment.
    Nobody,
    /// systemd listens for a socket unit: nobody knows for whom.
    SocketActivated,
    /// Somebody's login session, or what runs commands for whoever has an account.
    Session(Arc<str>),
    /// A process below no unit, or whose cgroup is gone: a user can remove one it was delegated.
    NoUnit,
    /// A root process outside of all units: it cannot be told from any other.
    Root,
    /// More than one unit, on different addresses or with SO_REUSEPORT.
    Several(BTreeSet<PortOwner>),
    /// It is a workload of its own already.
    Enrolled(PortOwner, Arc<str>),
}

impl Ownership {
    pub fn owner(&self) -> Option<&PortOwner> {
        match self {
            Ownership::Owned(owner) | Ownership::Claimed { owner, .. } => Some(owner),
            _ => None,
        }
    }

    /// Whether an operator has to decide something.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Ownership::Claimed { .. } | Ownership::Several(_) | Ownership::Enrolled(..))
    }
}

impl fmt::Display for Ownership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ownership::Owned(owner) => owner.fmt(f),
            Ownership::Claimed { owner, by } => write!(
                f,
                "{owner}, but {} there now and is not taken for it: if it should be, unenrol the port and enrol it again",
                listen(by)
            ),
            Ownership::Nobody => f.write_str("nobody listens yet"),
            Ownership::SocketActivated => f.write_str("owner unknown (systemd listens): enrol the unit"),
            Ownership::Session(session) => {
                write!(
                    f,
                    "{session} is a login session, or runs users' jobs: enrol the unit, or say user_sessions = true"
                )
            }
            Ownership::NoUnit => f.write_str("a process of no unit, or of one that has ended: enrol the unit"),
            Ownership::Root => f.write_str("a root process outside of all units: run it as a unit, and enrol that"),
            Ownership::Several(owners) => write!(f, "{} there: enrol the units, one each", listen(owners)),
            Ownership::Enrolled(owner, by) => write!(f, "{owner} is enrolled already, as {by}: keep one of the two"),
        }
    }
}

fn listen(owners: &BTreeSet<PortOwner>) -> String {
    let names: Vec<String> = owners.iter().map(ToString::to_string).collect();
    format!("{} {}", names.join(" and "), if names.len() == 1 { "listens" } else { "listen" })
}

/// Who listens on `port`. Pure.
fn ownership(
    listeners: &[Listener],
    port: u16,
    user_sessions: bool,
    mut unit_of: impl FnMut(u64) -> UnitLookup,
) -> Ownership {
    let holders = listeners.iter().filter(|listener| listener.address.port() == port);
    let (mut owners, mut session, mut systemd, mut root, mut no_unit) = (BTreeSet::new(), None, false, false, false);
    for holder in holders {
        match holder.owner.cgroup.map(&mut unit_of) {
            Some(UnitLookup::Unit(unit)) if &*unit == "init.scope" => systemd = true,
            Some(UnitLookup::Unit(unit)) if is_session(&unit) && !user_sessions => session = Some(unit),
            Some(UnitLookup::Unit(unit)) => _ = owners.insert(PortOwner::Unit(unit)),
            Some(UnitLookup::NotLookedFor) => no_unit = true,
            Some(UnitLookup::Unknown) | None if holder.owner.uid == 0 => root = true,
            Some(UnitLookup::Unknown) => no_unit = true,
            None => _ = owners.insert(PortOwner::Uid(holder.owner.uid)),
        }
    }
    // On another address of the port anybody may listen: that must neither give the identity away (so what
    // only root can do decides first) nor take it from its owner (so sessions come last).
    match (systemd, root, owners.len()) {
        (true, ..) => Ownership::SocketActivated,
        (_, true, _) => Ownership::Root,
        (.., 0) if no_unit && session.is_none() => Ownership::NoUnit,
        (.., 0) => session.map_or(Ownership::Nobody, Ownership::Session),
        (.., 1) => owners.pop_first().map_or(Ownership::Nobody, Ownership::Owned),
        _ => Ownership::Several(owners),
    }
}

/// Where jobs of users run: Debian's cron opens no session for them, nor does a sshd without PAM.
const RUN_USERS_JOBS: [&str; 6] =
    ["cron.service", "crond.service", "anacron.service", "atd.service", "ssh.service", "sshd.service"];

/// What anybody who has an account can fill with processes of their choice.
fn is_session(unit: &str) -> bool {
    let any_of = |templates: &[&str]| templates.iter().any(|template| unit.starts_with(template));
    RUN_USERS_JOBS.contains(&unit)
        || unit.starts_with("session-") && unit.ends_with(".scope")
        || any_of(&["user@", "ssh@", "sshd@"]) && unit.ends_with(".service")
}

/// Whose each of `ports` is: whoever is remembered, or else listens at this moment, login sessions aside.
pub fn find_port_owners(ports: &BTreeSet<u16>, memory: &PortMemory) -> BTreeMap<u16, PortOwner> {
    if ports.is_empty() {
        return BTreeMap::new();
    }
    // Whoever took a port must not profit from it: nobody's, until somebody looks.
    let Some(mut known) = memory.known() else { return BTreeMap::new() };
    known.retain(|port, _| ports.contains(port));
    if known.len() < ports.len()
        && let Ok(listeners) = listeners()
    {
        let mut units = CgroupUnits::discover();
        for port in ports {
            let found = ownership(&listeners, *port, false, |cgroup| units.unit_of(cgroup));
            if let Some(owner) = found.owner() {
                known.entry(*port).or_insert_with(|| owner.clone());
            }
        }
    }
    known
}

/// The owners of all enrolled ports at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortOwners(BTreeMap<u16, Ownership>);

impl PortOwners {
    /// Asks the kernel now.
    pub fn look(enrolment: &Enrolment, memory: &PortMemory) -> io::Result<PortOwners> {
        if !enrolment.has_ports() {
            return Ok(PortOwners::default());
        }
        Ok(PortOwners::judge(enrolment, &listeners()?, &mut CgroupUnits::discover(), &memory.read()?))
    }

    fn judge(
        enrolment: &Enrolment,
        listeners: &[Listener],
        units: &mut CgroupUnits,
        remembered: &BTreeMap<u16, PortOwner>,
    ) -> PortOwners {
        let judge = |(port, workload): (u16, &Arc<Workload>)| {
            let found = ownership(listeners, port, workload.user_sessions, |cgroup| units.unit_of(cgroup));
            (port, unless_enrolled(enrolment, staying(remembered.get(&port), found)))
        };
        PortOwners(enrolment.ports().map(judge).collect())
    }

    pub fn of(&self, port: u16) -> &Ownership {
        self.0.get(&port).unwrap_or(&Ownership::Nobody)
    }

    /// The port whose owner this process belongs to; its uid counts only where the kernel tells no cgroup of it.
    pub fn port_of(&self, unit: Option<&Arc<str>>, uid: Option<u32>) -> Option<u16> {
        let owns = |owner: &PortOwner| match owner {
            PortOwner::Unit(owner) => unit == Some(owner),
            PortOwner::Uid(owner) => unit.is_none() && uid == Some(*owner),
        };
        self.0.iter().find(|(_, found)| found.owner().is_some_and(owns)).map(|(port, _)| *port)
    }
}

/// A unit that stops listening, say to restart, is still who it was; and whoever listens in its stead, or beside it
/// on another address of its port, which anybody can, takes nothing from it.
fn staying(known: Option<&PortOwner>, found: Ownership) -> Ownership {
    let Some(known) = known else { return found };
    let owner = known.clone();
    match found {
        Ownership::Owned(other) if other != owner => Ownership::Claimed { owner, by: [other].into() },
        Ownership::Several(others) if !others.contains(known) => Ownership::Claimed { owner, by: others },
        Ownership::Several(_) | Ownership::Nobody | Ownership::Session(_) | Ownership::NoUnit => {
            Ownership::Owned(owner)
        }
        found => found,
    }
}

/// Whom every enrolled port belongs to from now on: who was first, until the port is enrolled no more.
fn remembering(known: &BTreeMap<u16, PortOwner>, found: &PortOwners) -> BTreeMap<u16, PortOwner> {
    let whose = |(port, found): (&u16, &Ownership)| {
        let owner = known.get(port).or(match found {
            Ownership::Owned(owner) => Some(owner),
            _ => None,
        });
        Some((*port, owner?.clone()))
    };
    found.0.iter().filter_map(whose).collect()
}

/// One process, one workload: an owner that is enrolled by itself stays that.
fn unless_enrolled(enrolment: &Enrolment, found: Ownership) -> Ownership {
    let enrolled = match found.owner() {
        Some(PortOwner::Unit(unit)) => enrolment.workload_of_unit(unit),
        Some(PortOwner::Uid(uid)) => enrolment.workload_of(None, *uid),
        None => None,
    };
    match (enrolled.map(|workload| workload.unit.clone()), found) {
        (Some(by), Ownership::Owned(owner) | Ownership::Claimed { owner, .. }) => Ownership::Enrolled(owner, by),
        (_, found) => found,
    }
}

/// Follows the owners of enrolled ports; shared by all workers.
#[derive(Default)]
pub struct PortWatch {
    owners: ArcSwap<PortOwners>,
    asked: Mutex<Asked>,
    claims: AtomicU64,
    memory: Option<PortMemory>,
}

/// When the kernel was last asked, and what helps asking it again.
#[derive(Default)]
struct Asked {
    at: Option<Instant>,
    units: Option<CgroupUnits>,
    remembered: BTreeMap<u16, PortOwner>,
}

impl PortWatch {
    /// One that remembers owners there.
    pub fn open(memory: PortMemory) -> io::Result<PortWatch> {
        let asked = Asked { remembered: memory.read()?, ..Asked::default() };
        Ok(PortWatch { asked: Mutex::new(asked), memory: Some(memory), ..PortWatch::default() })
    }

    pub fn owners(&self) -> Arc<PortOwners> {
        self.owners.load_full()
    }

    /// Times others came to listen on an enrolled port whose owner does not.
    pub fn claims(&self) -> u64 {
        self.claims.load(Ordering::Relaxed)
    }

    /// The workload of a process that is enrolled by no unit or uid of its own, but perhaps by a port it holds.
    /// `uid`: of one whose cgroup the kernel does not tell.
    pub fn workload_of<'a>(
        &self,
        enrolment: &'a Enrolment,
        unit: Option<&Arc<str>>,
        uid: Option<u32>,
        now: Instant,
    ) -> Option<&'a Arc<Workload>> {
        if !enrolment.has_ports() {
            return None;
        }
        let known = || enrolment.workload_of_port(self.owners.load().port_of(unit, uid)?);
        known().or_else(|| {
            self.refresh_if_due(enrolment, now);
            known()
        })
    }

    /// Asks the kernel unless somebody just did.
    pub fn refresh_if_due(&self, enrolment: &Enrolment, now: Instant) {
        // Whoever holds the lock is asking for us.
        let Ok(mut asked) = self.asked.try_lock() else { return };
        if asked.at.is_some_and(|at| now.saturating_duration_since(at) < REST) {
            return;
        }
        asked.at = Some(now);
        self.ask(enrolment, &mut asked);
    }

    /// Asks the kernel now: the enrolment is another one.
    pub fn refresh(&self, enrolment: &Enrolment) {
        if let Ok(mut asked) = self.asked.lock() {
            self.ask(enrolment, &mut asked);
        }
    }

    fn ask(&self, enrolment: &Enrolment, asked: &mut Asked) {
        if !enrolment.has_ports() {
            self.owners.store(Arc::default());
            return self.remember(asked, BTreeMap::new());
        }
        let found = match listeners() {
            Ok(found) => found,
            Err(error) => {
                return tracing::warn!(%error, "the kernel does not answer who listens; owners of ports stay as known");
            }
        };
        let units = asked.units.get_or_insert_with(CgroupUnits::discover);
        let now = PortOwners::judge(enrolment, &found, units, &asked.remembered);
        let remembered = remembering(&asked.remembered, &now);
        self.remember(asked, remembered);
        let before = self.owners.load_full();
        if now != *before {
            self.tell(&before, &now);
            self.owners.store(Arc::new(now));
        }
    }

    fn remember(&self, asked: &mut Asked, owners: BTreeMap<u16, PortOwner>) {
        if asked.remembered == owners {
            return;
        }
        if let Some(memory) = &self.memory
            && let Err(error) = memory.write(&owners)
        {
            let path = memory.path().display();
            tracing::error!(%path, %error, "cannot keep whose the enrolled ports are; it is known until meshd restarts");
        }
        asked.remembered = owners;
    }

    fn tell(&self, before: &PortOwners, now: &PortOwners) {
        for (port, found) in &now.0 {
            let earlier = before.of(*port);
            if found == earlier {
                continue;
            }
            match (earlier.owner(), found) {
                (_, Ownership::Claimed { .. }) => {
                    self.claims.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(port, owner = %found, "others listen on an enrolled port");
                }
                (_, Ownership::Owned(owner)) => {
                    tracing::info!(port, %owner, "the owner of an enrolled port is known");
                }
                (_, Ownership::Nobody) => {}
                (_, problem) => {
                    tracing::warn!(port, %problem, "an enrolled port has no owner: its outbound connections are nobody's");
                }
            }
        }
    }
}

impl Enrolment {
    fn has_ports(&self) -> bool {
        !self.by_port.is_empty()
    }

    /// The workloads known by their port.
    pub fn ports(&self) -> impl Iterator<Item = (u16, &Arc<Workload>)> {
        self.workloads().iter().filter_map(|workload| match workload.selector {
            Selector::Port(port) => Some((port, workload)),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use meshd_sys::sock_diag::SocketOwner;

    fn listener(address: &str, uid: u32, cgroup: u64) -> Listener {
        let owner = SocketOwner { uid, inode: 1, cgroup: Some(cgroup) };
        Listener { address: address.parse().unwrap(), owner }
    }

    /// Cgroups of a made-up host.
    fn unit_of(cgroup: u64) -> UnitLookup {
        match cgroup {
            1 => UnitLookup::Unit("db.service".into()),
            2 => UnitLookup::Unit("web.service".into()),
            3 => UnitLookup::Unit("init.scope".into()),
            4 => UnitLookup::Unit("session-7.scope".into()),
            5 => UnitLookup::Unit("user@1000.service".into()),
            6 => UnitLookup::Unit("cron.service".into()),
            7 => UnitLookup::Unit("sshd@3-10.0.0.1:22-10.0.0.9:5.service".into()),
            _ => UnitLookup::Unknown,
        }
    }

    fn owner_of_5432(listeners: &[Listener]) -> Ownership {
        ownership(listeners, 5432, false, unit_of)
    }

    #[test]
    fn the_unit_that_listens_on_every_family_owns_the_port() {
        let listeners = [listener("0.0.0.0:5432", 26, 1), listener("[::]:5432", 26, 1), listener("0.0.0.0:80", 33, 2)];
        assert_eq!(owner_of_5432(&listeners), Ownership::Owned(PortOwner::Unit("db.service".into())));
        assert_eq!(ownership(&listeners, 99, false, unit_of), Ownership::Nobody);
    }

    #[test]
    fn login_sessions_and_systemd_itself_own_nothing() {
        for cgroup in [4, 5, 6, 7] {
            let found = owner_of_5432(&[listener("0.0.0.0:5432", 1000, cgroup)]);
            assert!(matches!(found, Ownership::Session(_)), "{found:?}");
        }
        assert_eq!(owner_of_5432(&[listener("[::]:5432", 0, 3)]), Ownership::SocketActivated);
        let told = ownership(&[listener("0.0.0.0:5432", 1000, 5)], 5432, true, unit_of);
        assert_eq!(told, Ownership::Owned(PortOwner::Unit("user@1000.service".into())));
    }

    #[test]
    fn two_units_behind_one_port_are_a_conflict_that_names_both() {
        let found = owner_of_5432(&[listener("10.0.0.1:5432", 26, 1), listener("127.0.0.1:5432", 33, 2)]);
        assert!(found.is_conflict() && found.owner().is_none());
        assert_eq!(found.to_string(), "db.service and web.service listen there: enrol the units, one each");
    }

    #[test]
    fn without_units_the_uid_owns_it_but_root_never_does() {
        let without_cgroup = |uid| {
            let listener = listener("0.0.0.0:5432", uid, 9);
            Listener { owner: SocketOwner { cgroup: None, ..listener.owner }, ..listener }
        };
        let owned = owner_of_5432(&[without_cgroup(26)]);
        assert_eq!(owned, Ownership::Owned(PortOwner::Uid(26)));
        let owners = PortOwners([(5432, owned)].into());
        assert_eq!((owners.port_of(None, Some(26)), owners.port_of(None, None)), (Some(5432), None));
        assert_eq!(owner_of_5432(&[without_cgroup(0)]), Ownership::Root);
        assert_eq!(owner_of_5432(&[listener("0.0.0.0:5432", 0, 9)]), Ownership::Root);
    }

    fn owned(unit: &str) -> Ownership {
        Ownership::Owned(PortOwner::Unit(unit.into()))
    }

    /// What becomes of db's port when it is found like this.
    fn after_db(found: Ownership) -> Ownership {
        staying(Some(&PortOwner::Unit("db.service".into())), found)
    }

    #[test]
    fn a_cgroup_that_is_gone_makes_nobody_the_owner_of_a_port_whose_unit_restarts() {
        let squatted = owner_of_5432(&[listener("0.0.0.0:5432", 1000, 9)]);
        assert_eq!(squatted, Ownership::NoUnit);
        assert_eq!(after_db(squatted), owned("db.service"));
    }

    #[test]
    fn an_owner_that_restarts_stays_the_owner_whoever_is_quicker() {
        for found in [Ownership::Nobody, Ownership::Session("session-7.scope".into()), owned("db.service")] {
            assert_eq!(after_db(found), owned("db.service"));
        }
        let web = listener("0.0.0.0:5432", 33, 2);
        let claimed = after_db(owner_of_5432(&[web]));
        assert!(claimed.is_conflict() && claimed.to_string().contains("web.service listens there"), "{claimed}");
        let owners = PortOwners([(5432, claimed)].into());
        let port_of = |unit: &str| owners.port_of(Some(&unit.into()), None);
        assert_eq!((port_of("db.service"), port_of("web.service")), (Some(5432), None));
        // What only root can do ends it, for then nobody knows whose it is.
        assert_eq!(after_db(Ownership::SocketActivated), Ownership::SocketActivated);
    }

    #[test]
    fn who_was_first_is_remembered_until_the_port_is_enrolled_no_more() {
        let found = |found| PortOwners([(5432, found)].into());
        let first = remembering(&BTreeMap::new(), &found(owned("db.service")));
        assert_eq!(first, [(5432, PortOwner::Unit("db.service".into()))].into());
        for later in [Ownership::Nobody, Ownership::SocketActivated, after_db(owned("web.service"))] {
            assert_eq!(remembering(&first, &found(later)), first);
        }
        assert_eq!(remembering(&first, &PortOwners::default()), BTreeMap::new());
        assert_eq!(remembering(&BTreeMap::new(), &found(Ownership::Nobody)), BTreeMap::new());
    }

    #[test]
    fn listening_on_another_address_of_a_port_neither_wins_nor_takes_an_identity() {
        let (owner, session) = (listener("0.0.0.0:5432", 26, 1), listener("127.0.0.3:5432", 1000, 4));
        assert_eq!(owner_of_5432(&[session, owner]), owned("db.service"));
        let systemd = listener("0.0.0.0:5432", 0, 3);
        assert_eq!(owner_of_5432(&[listener("127.0.0.3:5432", 33, 2), systemd]), Ownership::SocketActivated);
        let both = owner_of_5432(&[owner, listener("127.0.0.3:5432", 33, 2)]);
        assert_eq!(after_db(both), owned("db.service"));
    }
}
