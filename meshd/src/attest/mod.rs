//! What this host can tell of a process beyond its unit and user: group, program, and the content of that. Only entries of
//! the PKI ask for it. docs/pki.md, "Which processes of a host", is for operators.
//!
//! A process is held by a descriptor (`meshd_sys::peer::Process`) while it is looked at, its program by another: neither
//! a number used again nor another program in its place can pass for it.

mod hashes;
mod holders;
mod process;
mod program;

use tokio::sync::Semaphore;

pub use holders::{Socket, Unproven};
pub use process::user_of;
pub use program::Program;

use crate::enrol::ProgramFacts;
use hashes::Hashes;

/// Sockets whose holders are looked for at once: each look goes through the processes of a unit.
const AT_ONCE: usize = 4;
/// linux/capability.h
const CAP_SYS_PTRACE: u32 = 19;

/// Whether programs of other users' processes can be seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sight {
    /// `[workload_api] path_selectors` is off.
    #[default]
    Off,
    /// It is on, and the capability is missing.
    Blind,
    On,
}

impl Sight {
    /// Of this process.
    pub fn of(path_selectors: bool) -> Sight {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        Sight::judge(path_selectors, crate::host::effective_capabilities(&status))
    }

    fn judge(path_selectors: bool, capabilities: Option<u64>) -> Sight {
        match capabilities {
            _ if !path_selectors => Sight::Off,
            Some(bits) if bits & (1 << CAP_SYS_PTRACE) != 0 => Sight::On,
            _ => Sight::Blind,
        }
    }

    pub fn label(self) -> &'static str {
        match self {
            Sight::Off => "off",
            Sight::Blind => "no CAP_SYS_PTRACE",
            Sight::On => "on",
        }
    }

    /// What to do for programs to be seen; None if they are.
    pub fn remedy(self) -> Option<&'static str> {
        match self {
            Sight::Off => Some(
                "set `path_selectors = true` in [workload_api] of meshd.toml, give meshd CAP_SYS_PTRACE, and restart it",
            ),
            Sight::Blind => Some(
                "give meshd CAP_SYS_PTRACE: in a drop-in of its unit, AmbientCapabilities=CAP_SYS_PTRACE and \
                 CapabilityBoundingSet=CAP_SYS_PTRACE, and restart it",
            ),
            Sight::On => None,
        }
    }
}

/// The host's means of telling programs apart, with what was found lately.
#[derive(Debug)]
pub struct Attestor {
    sight: Sight,
    hashes: Hashes,
    looks: Semaphore,
}

impl Attestor {
    pub fn new(sight: Sight) -> Attestor {
        Attestor { sight, hashes: Hashes::default(), looks: Semaphore::new(AT_ONCE) }
    }

    pub fn sight(&self) -> Sight {
        self.sight
    }

    /// The program of a process, held; None where it cannot be seen. The process must be held while this is asked.
    pub fn program(&self, pid: i32) -> Option<Program> {
        (self.sight == Sight::On).then(|| Program::of(pid).ok()).flatten()
    }

    /// Without reading its content: None for a hash that is not known yet.
    pub fn facts(&self, program: &Program) -> ProgramFacts {
        ProgramFacts { path: program.path(), sha256: self.hashes.known(program).flatten() }
    }

    pub fn is_measured(&self, program: &Program) -> bool {
        self.hashes.known(program).is_some()
    }

    /// Reads the program, unless that was done already. Takes as long as that takes: never on a thread of the reactor.
    pub fn measure(&self, program: &Program) {
        self.hashes.measure(program);
    }
}

impl Default for Attestor {
    fn default() -> Attestor {
        Attestor::new(Sight::Off)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_seen_where_it_is_switched_on_and_the_capability_is_there() {
        let ptrace = Some(1 << CAP_SYS_PTRACE);
        assert_eq!(Sight::judge(false, ptrace), Sight::Off);
        assert_eq!(Sight::judge(true, ptrace), Sight::On);
        assert_eq!((Sight::judge(true, Some(1 << 12)), Sight::judge(true, None)), (Sight::Blind, Sight::Blind));
        assert!(Sight::Blind.remedy().unwrap().contains("CAP_SYS_PTRACE") && Sight::On.remedy().is_none());
    }
}
