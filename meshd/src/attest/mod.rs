//! What this host can tell of a process beyond its unit and user: group, program, and the content of that. Only entries of
//! the PKI ask for it. docs/pki.md, "Which processes of a host", is for operators.
//!
//! A process is held by a descriptor (`meshd_sys::peer::Process`) while it is looked at, its program by another: neither
//! a number used again nor another program in its place can pass for it.

mod descriptors;
mod hashes;
mod holders;
mod lookouts;
mod process;
mod program;

pub use holders::{Socket, Unproven};
pub use lookouts::TooSlow;
pub use process::user_of;
pub use program::Program;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::enrol::{Cgroup, Guard, Owner, ProcessFacts, ProgramFacts, Sight};
use hashes::Hashes;
use lookouts::Lookouts;

/// The host's means of telling programs apart, with what was found lately.
#[derive(Debug)]
pub struct Attestor {
    sight: Sight,
    hashes: Hashes,
    lookouts: Lookouts,
    /// Where units were found.
    cgroups: Mutex<HashMap<Arc<str>, Cgroup>>,
}

impl Attestor {
    pub fn new(sight: Sight) -> Attestor {
        Attestor { sight, hashes: Hashes::default(), lookouts: Lookouts::default(), cgroups: Mutex::default() }
    }

    pub fn sight(&self) -> Sight {
        self.sight
    }

    /// Looks at processes or programs on a thread of its own, as whatever file system they are on may not answer. Those
    /// of one `subject` wait for each other, not for those of others.
    pub async fn look<T: Send + 'static>(
        self: &Arc<Attestor>,
        subject: &str,
        look: impl FnOnce(&Attestor) -> T + Send + 'static,
    ) -> Result<T, TooSlow> {
        let attestor = self.clone();
        self.lookouts.run(subject, move || look(&attestor)).await
    }

    /// The program of a process, held; None where it cannot be seen. The process must be held while this is asked.
    pub fn program(&self, pid: i32) -> Option<Program> {
        (self.sight == Sight::On).then(|| Program::of(pid).ok()).flatten()
    }

    /// Of a process with this program, with its content where the guard asks for that: who does not meet the rest is not
    /// worth reading.
    pub fn process_facts(&self, owner: Owner, gid: u32, program: Option<&Program>, guard: &Guard) -> ProcessFacts {
        let mut facts = ProcessFacts { owner, gid, program: program.map(|program| self.facts(program)) };
        let is_worth_it = guard.needs_hash() && guard.unmet_but_hash(&facts).is_none();
        if let (true, Some(program), Some(told)) = (is_worth_it, program, &mut facts.program) {
            told.sha256 = self.measure(program);
        }
        facts
    }

    /// Without reading its content: None for a hash that is not known.
    pub fn facts(&self, program: &Program) -> ProgramFacts {
        ProgramFacts { path: program.path(), sha256: self.hashes.known(program).flatten() }
    }

    /// Whether all that can be known of its content is known.
    pub fn is_measured(&self, program: &Program) -> bool {
        self.hashes.known(program).is_some()
    }

    /// Reads the program, unless that was done already. None: it cannot be read, or not now. Takes as long as that
    /// takes: never on a thread of the reactor.
    pub fn measure(&self, program: &Program) -> Option<[u8; 32]> {
        self.hashes.measure(program)
    }
}

impl Default for Attestor {
    fn default() -> Attestor {
        Attestor::new(Sight::Off)
    }
}
