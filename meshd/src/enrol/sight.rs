//! Whether this host's claims can be judged by what programs its processes run.

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
