//! The programs meshd runs, and systemd.

use std::io;

use super::finding::Finding;
use crate::capture::BackendKind;
use crate::{host, tool};

/// RHEL 9, Ubuntu 22.04 and Debian 12 have newer ones.
const SYSTEMD_MIN: u32 = 249;

/// Runs a program that only looks; what it printed, or None if it is missing or complained.
pub(super) fn look(program: &str, arguments: &[&str]) -> Option<String> {
    match try_look(program, arguments) {
        Look::Said(text) => Some(text),
        Look::Missing | Look::Complained(_) => None,
    }
}

/// What became of running a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Look {
    Said(String),
    Complained(String),
    Missing,
}

pub(super) fn try_look(program: &str, arguments: &[&str]) -> Look {
    try_look_with_input(program, arguments, "")
}

pub(super) fn try_look_with_input(program: &str, arguments: &[&str], input: &str) -> Look {
    match tool::output(program, arguments, input) {
        Ok(output) if output.status.success() => Look::Said(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => Look::Complained(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Look::Missing,
        Err(error) => Look::Complained(error.to_string()),
    }
}

pub(super) struct ToolFacts {
    nft: Look,
    ip: Look,
    iptables: Look,
    systemctl: Look,
    /// systemd is process 1.
    systemd_runs: bool,
}

impl ToolFacts {
    pub(super) fn gather() -> ToolFacts {
        ToolFacts {
            nft: try_look("nft", &["--version"]),
            ip: try_look("ip", &["-V"]),
            iptables: try_look("iptables", &["--version"]),
            systemctl: try_look("systemctl", &["--version"]),
            systemd_runs: host::systemd_runs(),
        }
    }
}

/// `backend`: the one this host gets, if there is any.
pub(super) fn judge(facts: &ToolFacts, backend: Option<BackendKind>) -> Vec<Finding> {
    let needed = |check, look: &Look, package: &str, why: &str| match look {
        Look::Said(version) => Finding::ok(check, version.trim()),
        Look::Missing | Look::Complained(_) => {
            Finding::failed(check, format!("{why} needs it"), format!("install the package {package}"))
        }
    };
    let iptables = "iptables is installed";
    vec![
        systemd(facts),
        nft(&facts.nft, backend),
        needed("ip is installed", &facts.ip, "iproute2 (iproute on RHEL)", "every capture backend"),
        match &facts.iptables {
            Look::Said(version) => Finding::ok(iptables, version.trim()),
            _ => Finding::ok("iptables is not installed", "only the iptables backend would need it"),
        },
    ]
}

fn nft(look: &Look, backend: Option<BackendKind>) -> Finding {
    let (check, install) = ("nft is installed", "install the package nftables");
    match (look, backend) {
        (Look::Said(version), _) => Finding::ok(check, version.trim()),
        (_, None | Some(BackendKind::NftTproxy | BackendKind::NftRedirect)) => {
            Finding::failed(check, "capture with nftables needs it", install)
        }
        (_, Some(other)) => Finding::warning(check, format!("{} does without it", other.label()), install),
    }
}

fn systemd(facts: &ToolFacts) -> Finding {
    let check = "systemd is 249 or newer";
    let Look::Said(text) = &facts.systemctl else {
        let detail = "there is no systemctl: nothing starts meshd, and workloads have no units";
        return Finding::warning(check, detail, "enrol workloads by uid, and supervise `meshd run` yourself");
    };
    let version: Option<u32> =
        text.split_whitespace().nth(1).and_then(|word| word.split(['.', '~', '-']).next()?.parse().ok());
    match version {
        Some(version) if version >= SYSTEMD_MIN && facts.systemd_runs => Finding::ok(check, version.to_string()),
        Some(version) if version >= SYSTEMD_MIN => Finding::warning(
            check,
            format!("systemd {version} is installed, but did not boot this host"),
            "enrol workloads by uid, and supervise `meshd run` yourself",
        ),
        Some(version) => Finding::failed(
            check,
            format!("this is systemd {version}"),
            "use a distribution with systemd 249 or newer (RHEL 9, Ubuntu 22.04, Debian 12)",
        ),
        None => Finding::warning(check, "systemctl does not tell its version", "run `systemctl --version`"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    fn facts() -> ToolFacts {
        ToolFacts {
            nft: Look::Said("nftables v1.0.6 (Lester Gooch #5)\n".into()),
            ip: Look::Said("ip utility, iproute2-6.1.0\n".into()),
            iptables: Look::Said("iptables v1.8.9 (nf_tables)\n".into()),
            systemctl: Look::Said("systemd 252 (252.39-1~deb12u2)\n+PAM\n".into()),
            systemd_runs: true,
        }
    }

    fn verdicts(facts: &ToolFacts) -> Vec<Verdict> {
        judge(facts, Some(BackendKind::NftTproxy)).iter().map(|finding| finding.verdict).collect()
    }

    #[test]
    fn a_host_with_everything_is_ready() {
        assert_eq!(verdicts(&facts()), [Verdict::Ok; 4]);
    }

    #[test]
    fn iptables_may_be_missing_and_nft_where_another_backend_is_used() {
        let facts = ToolFacts { iptables: Look::Missing, nft: Look::Missing, ..facts() };
        assert_eq!(verdicts(&facts), [Verdict::Ok, Verdict::Failed, Verdict::Ok, Verdict::Ok]);
        assert!(judge(&facts, None)[1].remedy.contains("nftables"));
        assert_eq!(judge(&facts, Some(BackendKind::Tun))[1].verdict, Verdict::Warning);
    }

    #[test]
    fn an_old_systemd_fails_and_an_absent_one_warns() {
        let with = |text: &str| ToolFacts { systemctl: Look::Said(text.into()), ..facts() };
        assert_eq!(systemd(&with("systemd 239 (239-82.el8)\n")).verdict, Verdict::Failed);
        assert_eq!(systemd(&with("systemd 256~rc3-1 (256)\n")).verdict, Verdict::Ok);
        assert_eq!(systemd(&ToolFacts { systemd_runs: false, ..facts() }).verdict, Verdict::Warning);
        assert_eq!(systemd(&ToolFacts { systemctl: Look::Missing, ..facts() }).verdict, Verdict::Warning);
    }
}
