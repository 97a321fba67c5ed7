//! WHO calls: the process that made the connection, mapped to an enrolled workload by the same rules as a captured
//! connection (`proxy/identify.rs`).
//!
//! The kernel holds on to the process for us, so its number means nobody else while it lives; that it does is asked
//! last, after all that was read by number.

use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use meshd_identity::ProcessSelector;
use meshd_sys::peer::Peer;
use nix::errno::Errno;

use crate::attest::{Attestor, Program, user_of};
use crate::enrol::{self, Enrolment, Guard, Owner, PortWatch, ProcessFacts, Sight, Workload};

/// After the accept; later it may be another program than the one that connected.
const PROMPT: Duration = Duration::from_millis(50);

/// The caller of one connection. What it may have is asked anew for every answer.
#[derive(Debug)]
pub(super) struct Caller {
    peer: Peer,
    attestor: Arc<Attestor>,
    /// What it ran when it connected, where that can be seen.
    program: OnceLock<Arc<Program>>,
    /// What it was when it was looked at last. None: it could not be told by then.
    seen: Mutex<Option<Sighting>>,
}

#[derive(Clone, Debug)]
enum Sighting {
    Process(ProcessFacts),
    /// It runs another program than when it connected: whoever does lends nothing of either.
    Changed,
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
    /// Its program has to be looked at first.
    Unread,
}

impl Caller {
    pub(super) fn of(peer: Peer, attestor: Arc<Attestor>) -> Caller {
        Caller { peer, attestor, program: OnceLock::new(), seen: Mutex::default() }
    }

    /// Notes what it runs, before anything else is done for it. False: that was not to be seen in time, but may be on
    /// another connection.
    pub(super) async fn meet(&self, accepted: Instant) -> bool {
        if self.attestor.sight() != Sight::On {
            return true;
        }
        let Ok(owner) = self.owner() else { return false };
        let (subject, pid) = (owner.selector(), self.peer.pid);
        let look = move |_: &Attestor| Program::of(pid).map(|program| (program, accepted.elapsed()));
        let why = match self.attestor.look(&subject, look).await {
            Ok(Ok((program, after))) if after <= PROMPT => {
                // The first time only.
                _ = self.program.set(Arc::new(program));
                return true;
            }
            // Nor will it be seen another time: whose identity depends on it is refused, and nobody else.
            Ok(Err(error)) if !may_pass(&error) => return true,
            Ok(Ok((_, after))) => format!("its program was seen only {} ms after that", after.as_millis()),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::debug!(caller = subject, why, "a caller of the Workload API has to connect again");
        false
    }

    /// Looks at its program, where who it is depends on that.
    pub(super) async fn look(&self, enrolment: &ArcSwap<Enrolment>, ports: &PortWatch) {
        let Some((owner, guard)) = self.guarded(&enrolment.load(), ports, Instant::now()) else { return };
        let (subject, before) = (owner.selector(), self.program.get().cloned());
        let (pid, gid) = (self.peer.pid, self.peer.gid);
        let look = move |attestor: &Attestor| see(attestor, pid, gid, owner, before.as_deref(), &guard);
        let seen = self.attestor.look(&subject, look).await;
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = seen.unwrap_or_else(|error| {
            tracing::warn!(caller = subject, %error, "a caller of the Workload API has to wait");
            None
        });
    }

    fn guarded(&self, enrolment: &Enrolment, ports: &PortWatch, now: Instant) -> Option<(Owner, Arc<Guard>)> {
        let owner = self.owner().ok()?;
        let workload = owner.workload(enrolment, ports, now)?;
        let guard = enrolment.guard(&workload.identity).filter(|guard| guard.needs_program())?;
        Some((owner, guard.clone()))
    }

    /// By what was seen of it last.
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
            let facts = self.facts(guard, owner)?;
            if let Some(unmet) = guard.unmet(&facts).cloned() {
                return Err(Unattested::Unmet(facts.owner, unmet));
            }
        }
        Ok(workload)
    }

    fn facts(&self, guard: &Guard, owner: Owner) -> Result<ProcessFacts, Unattested> {
        if !guard.needs_program() {
            return Ok(ProcessFacts { owner, gid: self.peer.gid, program: None });
        }
        match self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            Some(Sighting::Process(seen)) => Ok(ProcessFacts { owner, gid: self.peer.gid, program: seen.program }),
            Some(Sighting::Changed) => Err(Unattested::Changed),
            None => Err(Unattested::Unread),
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

/// Whether it is we or the host who lack something for now, rather than the right to look.
fn may_pass(error: &io::Error) -> bool {
    let lacking = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::EINTR];
    error.raw_os_error().is_some_and(|code| lacking.contains(&Errno::from_raw(code)))
}

/// By number: whoever asks holds the process, and asks whether it lives afterwards. None: its content cannot be told yet.
fn see(
    attestor: &Attestor,
    pid: i32,
    gid: u32,
    owner: Owner,
    before: Option<&Program>,
    guard: &Guard,
) -> Option<Sighting> {
    // What could not be seen when it connected is not believed now.
    let now = before.and_then(|_| attestor.program(pid));
    if let (Some(before), Some(now)) = (before, &now)
        && !now.is(before)
    {
        return Some(Sighting::Changed);
    }
    let facts = attestor.process_facts(owner, gid, now.as_ref(), guard);
    let is_read = now.as_ref().is_none_or(|program| attestor.is_measured(program));
    let is_known = facts.program.as_ref().is_none_or(|program| program.sha256.is_some());
    let lacks_content = guard.needs_hash() && guard.unmet_but_hash(&facts).is_none() && !is_known;
    (!lacks_content || is_read).then_some(Sighting::Process(facts))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;

    use tokio::sync::oneshot;

    use super::*;
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

    /// What becomes of the caller after a look at it.
    async fn judged(caller: &Caller, enrolment: &Enrolment) -> Result<Arc<Workload>, Unattested> {
        let enrolment = ArcSwap::from_pointee(enrolment.clone());
        let ports = PortWatch::default();
        caller.look(&enrolment, &ports).await;
        caller.workload(&enrolment.load(), &ports, Instant::now())
    }

    fn path_of(caller: &Caller) -> String {
        format!("unix:path:{}", caller.program.get().unwrap().path().unwrap())
    }

    /// However slow this machine is.
    fn in_time() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_whose_program_was_not_seen_in_time_is_to_be_made_again() {
        let caller = this_process();
        let subject = caller.owner().unwrap().selector();
        let mut hanging = Vec::new();
        // As many as look at one subject at once.
        for _ in 0..2 {
            let ((release, hung), (begin, begun)) = (mpsc::channel::<()>(), oneshot::channel());
            let look = move |_: &Attestor| {
                begin.send(()).unwrap();
                hung.recv().is_err()
            };
            tokio::select! {
                _ = caller.attestor.look(&subject, look) => panic!("it hangs"),
                started = begun => started.unwrap(),
            }
            hanging.push(release);
        }
        // Time stands still while threads of this kind run.
        let (met, ()) = tokio::join!(caller.meet(in_time()), tokio::time::advance(Duration::from_secs(11)));
        assert!(!met && caller.program.get().is_none(), "it is never refused for good");
        hanging.clear();
        let long_ago = Instant::now().checked_sub(2 * PROMPT).unwrap();
        assert!(!caller.meet(long_ago).await && caller.program.get().is_none(), "it may run another one by now");
        assert!(caller.meet(in_time()).await && caller.program.get().is_some());
    }

    #[test]
    fn what_is_lacking_for_now_is_told_from_a_right_that_is_lacking() {
        let passes = |errno: Errno| may_pass(&errno.into());
        assert!(passes(Errno::EMFILE) && passes(Errno::ENFILE));
        assert!(!passes(Errno::EACCES) && !passes(Errno::ENOENT));
    }

    #[tokio::test]
    async fn all_selectors_must_hold_and_nothing_is_judged_before_a_look() {
        let caller = this_process();
        assert!(caller.meet(in_time()).await);
        let content = std::fs::read("/proc/self/exe").unwrap();
        let hash = ProcessSelector::Sha256(meshd_identity::sha256(&content)).to_string();
        let both = guarded(&caller, vec![path_of(&caller), hash.clone()]);
        let unseen = caller.workload(&both, &PortWatch::default(), Instant::now());
        assert_eq!(unseen.unwrap_err(), Unattested::Unread);
        assert_eq!(judged(&caller, &both).await.unwrap().identity.name(), "web");
        let elsewhere = vec!["unix:path:/bin/other".to_owned(), hash];
        let other = vec![format!("unix:sha256:{}", "00".repeat(32))];
        let group = vec![format!("unix:gid:{}", caller.peer.gid + 1)];
        for selectors in [elsewhere, other, group] {
            let enrolment = guarded(&caller, selectors);
            assert!(matches!(judged(&caller, &enrolment).await, Err(Unattested::Unmet(..))));
        }
    }

    #[tokio::test]
    async fn a_program_unseen_at_the_start_or_another_since_meets_nothing() {
        let caller = this_process();
        assert!(caller.meet(in_time()).await);
        let enrolment = guarded(&caller, vec![path_of(&caller)]);
        assert!(judged(&caller, &enrolment).await.is_ok());
        let mut child = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let changed = this_process();
        changed.program.set(Arc::new(Program::of(child.id().cast_signed()).unwrap())).unwrap();
        assert_eq!(judged(&changed, &enrolment).await.unwrap_err(), Unattested::Changed);
        let unseen = this_process();
        assert!(matches!(judged(&unseen, &enrolment).await, Err(Unattested::Unmet(..))));
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
