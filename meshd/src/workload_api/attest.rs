//! WHO calls: the process that made the connection, mapped to an enrolled workload by the same rules as a captured
//! connection (`proxy/identify.rs`).
//!
//! The kernel holds on to the process for us, so its number means nobody else while it lives; that it does is asked
//! last, after all that was read by number.

use std::sync::Arc;
use std::time::Instant;

use meshd_identity::ProcessSelector;
use meshd_sys::peer::Peer;

use crate::attest::{Attestor, Program, user_of};
use crate::enrol::{self, Enrolment, Guard, Owner, PortWatch, ProcessFacts, Workload};

/// The caller of one connection. What it may have is asked anew for every answer.
#[derive(Debug)]
pub(super) struct Caller {
    peer: Peer,
    attestor: Arc<Attestor>,
    /// What it ran when it connected, where that can be seen.
    program: Option<Program>,
}

/// Why a caller is nobody.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unattested {
    /// It has ended, whoever holds its connection now.
    Gone,
    /// It is not who it was when it connected.
    Changed,
    Unenrolled(Owner),
    /// It is not what the PKI's entry for its workload asks for.
    Unmet(Owner, ProcessSelector),
    /// Its program has to be read first.
    Unread,
}

impl Caller {
    pub(super) fn of(peer: Peer, attestor: Arc<Attestor>) -> Caller {
        let program = attestor.program(peer.pid);
        Caller { peer, attestor, program }
    }

    pub(super) fn workload(
        &self,
        enrolment: &Enrolment,
        ports: &PortWatch,
        now: Instant,
    ) -> Result<Arc<Workload>, Unattested> {
        let owner = self.owner()?;
        let Some(workload) = owner.workload(enrolment, ports, now) else {
            return Err(Unattested::Unenrolled(owner));
        };
        if let Some(guard) = enrolment.guard(&workload.identity) {
            self.meet(guard, owner)?;
        }
        Ok(workload)
    }

    fn meet(&self, guard: &Guard, owner: Owner) -> Result<(), Unattested> {
        let (program, facts) = self.process(guard, owner)?;
        let is_unread = || program.as_ref().is_some_and(|program| !self.attestor.is_measured(program));
        match guard.unmet(&facts) {
            None => Ok(()),
            Some(_) if guard.needs_hash() && guard.unmet_but_hash(&facts).is_none() && is_unread() => {
                Err(Unattested::Unread)
            }
            Some(unmet) => Err(Unattested::Unmet(facts.owner, unmet.clone())),
        }
    }

    fn process(&self, guard: &Guard, owner: Owner) -> Result<(Option<Program>, ProcessFacts), Unattested> {
        let program = if guard.needs_program() { self.program()? } else { None };
        let told = program.as_ref().map(|program| self.attestor.facts(program));
        Ok((program, ProcessFacts { owner, gid: self.peer.gid, program: told }))
    }

    /// What it runs now, and ran when it connected: whoever runs another program since lends nothing of either.
    fn program(&self) -> Result<Option<Program>, Unattested> {
        let now = self.attestor.program(self.peer.pid);
        if !self.peer.lives() {
            return Err(Unattested::Gone);
        }
        match (&self.program, &now) {
            (Some(before), Some(program)) if !program.is(before) => Err(Unattested::Changed),
            (Some(_), _) => Ok(now),
            // It could not be seen then.
            (None, _) => Ok(None),
        }
    }

    /// What has to be read, off the reactor's threads, before it can be told who this is.
    pub(super) fn unread(&self, enrolment: &Enrolment, ports: &PortWatch, now: Instant) -> Option<Program> {
        match self.workload(enrolment, ports, now) {
            Err(Unattested::Unread) => self.program().ok().flatten(),
            _ => None,
        }
    }

    pub(super) fn owner(&self) -> Result<Owner, Unattested> {
        // Both fail once the process is gone.
        let (unit, has_cgroup) = enrol::unit_of_process(self.peer.pid).map_err(|_| Unattested::Gone)?;
        let user = user_of(self.peer.pid).map_err(|_| Unattested::Gone)?;
        if !self.peer.lives() {
            return Err(Unattested::Gone);
        }
        // Also whoever took the number over before kernels gave us a handle of the process (before 6.5).
        if user != (self.peer.uid, self.peer.gid) {
            return Err(Unattested::Changed);
        }
        Ok(Owner { unit, has_cgroup, uid: self.peer.uid })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::attest::Sight;
    use crate::enrol::Reserved;

    fn enrolled(text: &str) -> Enrolment {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.toml"), text).unwrap();
        let reserved = Reserved { listeners: Vec::new(), virtual_ips: Vec::new() };
        enrol::load(dir.path(), &"mesh.example".parse().unwrap(), &reserved).unwrap()
    }

    fn this_process() -> Caller {
        let (here, _there) = UnixStream::pair().unwrap();
        Caller::of(Peer::of(&here).unwrap(), Arc::new(Attestor::new(Sight::On)))
    }

    #[test]
    fn the_caller_is_the_workload_its_unit_or_user_is_enrolled_as() {
        let caller = this_process();
        let facts = caller.owner().unwrap();
        assert_eq!((facts.uid, &facts.unit), (nix::unistd::getuid().as_raw(), &enrol::own_unit()));
        let by_user = format!("[[workload]]\nuid = {}\nnamespace = \"shop\"\nname = \"web\"\n", facts.uid);
        let found = caller.workload(&enrolled(&by_user), &PortWatch::default(), Instant::now()).unwrap();
        assert_eq!(found.identity.short(), "ns/shop/sa/web");
        let nobody = caller.workload(&Enrolment::default(), &PortWatch::default(), Instant::now());
        assert_eq!(nobody.unwrap_err(), Unattested::Unenrolled(facts));
    }

    #[test]
    fn whoever_changed_its_user_since_it_connected_is_nobody() {
        let mut caller = this_process();
        caller.peer.gid += 1;
        assert_eq!(caller.owner(), Err(Unattested::Changed));
    }

    fn guarded(caller: &Caller, selectors: Vec<String>) -> Enrolment {
        let uid = caller.owner().unwrap().uid;
        let mut enrolment = enrolled(&format!("[[workload]]\nuid = {uid}\nnamespace = \"shop\"\nname = \"web\"\n"));
        let identity = enrolment.workloads()[0].identity.clone();
        enrolment.withhold("web", &[(identity, selectors)].into(), Sight::On);
        enrolment
    }

    #[test]
    fn the_program_is_read_before_its_content_is_judged_and_only_if_all_else_holds() {
        let caller = this_process();
        let (ports, now) = (PortWatch::default(), Instant::now());
        let own = caller.program().unwrap().unwrap();
        let path = format!("unix:path:{}", own.path().unwrap());
        let content = std::fs::read("/proc/self/exe").unwrap();
        let hash = ProcessSelector::Sha256(meshd_identity::sha256(&content)).to_string();
        let both = guarded(&caller, vec![path, hash.clone()]);
        assert_eq!(caller.workload(&both, &ports, now).unwrap_err(), Unattested::Unread);
        let elsewhere = guarded(&caller, vec!["unix:path:/bin/other".to_owned(), hash]);
        assert!(matches!(caller.workload(&elsewhere, &ports, now), Err(Unattested::Unmet(..))));
        assert!(caller.unread(&elsewhere, &ports, now).is_none());
        caller.attestor.measure(&caller.unread(&both, &ports, now).unwrap());
        assert_eq!(caller.workload(&both, &ports, now).unwrap().identity.name(), "web");
        let other = guarded(&caller, vec![format!("unix:sha256:{}", "00".repeat(32))]);
        assert!(matches!(caller.workload(&other, &ports, now), Err(Unattested::Unmet(..))));
        let group = guarded(&caller, vec![format!("unix:gid:{}", caller.peer.gid + 1)]);
        assert!(matches!(caller.workload(&group, &ports, now), Err(Unattested::Unmet(..))));
    }

    #[test]
    fn a_program_unseen_at_the_start_or_another_since_meets_nothing() {
        let mut caller = this_process();
        let (ports, now) = (PortWatch::default(), Instant::now());
        let path = format!("unix:path:{}", caller.program().unwrap().unwrap().path().unwrap());
        let enrolment = guarded(&caller, vec![path]);
        assert!(caller.workload(&enrolment, &ports, now).is_ok());
        let mut child = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        caller.program = Some(Program::of(child.id().cast_signed()).unwrap());
        assert_eq!(caller.workload(&enrolment, &ports, now).unwrap_err(), Unattested::Changed);
        caller.program = None;
        assert!(matches!(caller.workload(&enrolment, &ports, now), Err(Unattested::Unmet(..))));
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
