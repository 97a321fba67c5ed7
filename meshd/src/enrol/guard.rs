//! What the PKI's entry asks of the processes of a workload beyond what enrol.d claims it by. Pure.

use meshd_identity::ProcessSelector;

use super::{Owner, Selector};

/// All of it must hold for a process to have the identity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guard(Vec<ProcessSelector>);

/// What is known of one process.
#[derive(Clone, Debug)]
pub struct ProcessFacts {
    pub owner: Owner,
    pub gid: u32,
    pub program: Option<ProgramFacts>,
}

/// What is known of the program it runs.
#[derive(Clone, Debug, Default)]
pub struct ProgramFacts {
    /// None: this host has another file there, or none.
    pub path: Option<String>,
    /// None: not read, or not readable.
    pub sha256: Option<[u8; 32]>,
}

impl Guard {
    /// Empty when the claim says all of it itself.
    pub(crate) fn of(claim: &Selector, wanted: Vec<ProcessSelector>) -> Guard {
        let is_said = |one: &ProcessSelector| match (claim, one) {
            (Selector::Unit(unit), ProcessSelector::Unit(wanted)) => **unit == **wanted,
            (Selector::Uid(uid), ProcessSelector::Uid(wanted)) => uid == wanted,
            _ => false,
        };
        if wanted.iter().all(is_said) { Guard::default() } else { Guard(wanted) }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the owner of a socket alone does not answer it.
    pub fn needs_process(&self) -> bool {
        self.needs_program() || self.0.iter().any(|one| matches!(one, ProcessSelector::Gid(_)))
    }

    pub fn needs_program(&self) -> bool {
        self.0.iter().any(ProcessSelector::is_of_program)
    }

    pub fn needs_hash(&self) -> bool {
        self.0.iter().any(is_hash)
    }

    /// What of it, as far as the owner of a socket answers it, does not hold.
    pub fn unmet_by_owner(&self, owner: &Owner) -> Option<&ProcessSelector> {
        self.0.iter().find(|one| !may_be_met_by(one, owner))
    }

    /// What of it does not hold.
    pub fn unmet(&self, process: &ProcessFacts) -> Option<&ProcessSelector> {
        self.0.iter().find(|one| !is_met(one, process))
    }

    /// The same, whatever the program's content: who does not meet the rest is not worth reading it.
    pub fn unmet_but_hash(&self, process: &ProcessFacts) -> Option<&ProcessSelector> {
        self.0.iter().find(|one| !is_hash(one) && !is_met(one, process))
    }
}

fn is_hash(one: &ProcessSelector) -> bool {
    matches!(one, ProcessSelector::Sha256(_))
}

/// Whether the owner says nothing against it.
fn may_be_met_by(one: &ProcessSelector, owner: &Owner) -> bool {
    match one {
        ProcessSelector::Unit(unit) => owner.unit.as_deref() == Some(&**unit),
        ProcessSelector::Uid(uid) => owner.uid == *uid,
        ProcessSelector::Gid(_) | ProcessSelector::Path(_) | ProcessSelector::Sha256(_) => true,
    }
}

fn is_met(one: &ProcessSelector, process: &ProcessFacts) -> bool {
    let program = process.program.as_ref();
    match one {
        ProcessSelector::Gid(gid) => process.gid == *gid,
        ProcessSelector::Path(path) => program.and_then(|program| program.path.as_deref()) == Some(&**path),
        ProcessSelector::Sha256(hash) => program.and_then(|program| program.sha256) == Some(*hash),
        ProcessSelector::Unit(_) | ProcessSelector::Uid(_) => may_be_met_by(one, &process.owner),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(wanted: &[&str]) -> Guard {
        let wanted: Vec<String> = wanted.iter().map(|one| (*one).to_owned()).collect();
        Guard::of(&Selector::Unit("web.service".into()), ProcessSelector::parse_all(&wanted).unwrap())
    }

    fn process() -> ProcessFacts {
        let owner = Owner { unit: Some("web.service".into()), has_cgroup: true, uid: 7 };
        let program = ProgramFacts { path: Some("/usr/bin/web".to_owned()), sha256: Some([0xab; 32]) };
        ProcessFacts { owner, gid: 8, program: Some(program) }
    }

    #[test]
    fn what_the_claim_says_is_not_asked_again() {
        assert!(guard(&["systemd:unit:web.service"]).is_empty());
        assert!(!guard(&["unix:uid:7"]).needs_process());
        assert!(guard(&["unix:gid:7"]).needs_process() && !guard(&["unix:gid:7"]).needs_program());
    }

    #[test]
    fn all_selectors_must_hold() {
        let hash = format!("unix:sha256:{}", "ab".repeat(32));
        let all = ["systemd:unit:web.service", "unix:uid:7", "unix:gid:8", "unix:path:/usr/bin/web", &hash];
        assert_eq!(guard(&all).unmet(&process()), None);
        let other_hash = format!("unix:sha256:{}", "cd".repeat(32));
        for (place, other) in [(1, "unix:uid:9"), (2, "unix:gid:7"), (3, "unix:path:/usr/bin/other"), (4, &other_hash)]
        {
            let mut wanted = all;
            wanted[place] = other;
            let guard = guard(&wanted);
            assert_eq!(guard.unmet(&process()).map(ToString::to_string).as_deref(), Some(other));
            assert_eq!(guard.unmet_but_hash(&process()).is_none(), place == 4);
        }
    }

    #[test]
    fn a_program_that_cannot_be_seen_meets_nothing() {
        let hidden = ProcessFacts { program: None, ..process() };
        let elsewhere = ProcessFacts { program: Some(ProgramFacts::default()), ..process() };
        for wanted in ["unix:path:/usr/bin/web", &format!("unix:sha256:{}", "00".repeat(32))] {
            assert!(guard(&[wanted]).unmet(&hidden).is_some() && guard(&[wanted]).unmet(&elsewhere).is_some());
        }
    }
}
