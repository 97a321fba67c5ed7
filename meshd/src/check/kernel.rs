//! Kernel features, each tried and not guessed from a version.

use std::fs::OpenOptions;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use meshd_sys::conntrack::Conntrack;
use meshd_sys::sock_diag::{Lookup, SocketDiag, SocketOwner};

use super::finding::Finding;
use super::tools::{Look, look, try_look_with_input};
use crate::enrol::cgroup2_mount;

/// RHEL 9 has 5.14; what meshd asks of the kernel is not tested on older ones.
const KERNEL_MIN: (u32, u32) = (5, 14);

/// `nft --check` judges these without a trace.
const TPROXY: &str = "table inet meshd_probe {
  chain c {
    type filter hook prerouting priority mangle; policy accept;
    meta l4proto tcp tproxy ip to 127.0.0.1:15001 accept
  }
}
";
const REDIRECT: &str = "table inet meshd_probe {
  chain c {
    type nat hook output priority -105; policy accept;
    meta l4proto tcp redirect to :15001
  }
}
";

/// A firewall may drop what comes from the loopback device, too.
const LOOPBACK_MAX: Duration = Duration::from_secs(1);

/// Why something does not work.
type Tried = Result<(), String>;

pub(super) struct KernelFacts {
    release: String,
    tproxy: Tried,
    redirect: Tried,
    /// None: there is no cgroup to try it with.
    socket_cgroup: Option<Tried>,
    conntrack: Tried,
    owner: Result<SocketOwner, String>,
    tun: Tried,
    /// Where cgroup2 is mounted.
    cgroup2: Option<String>,
    policy_routing: bool,
    ipv6: bool,
}

impl KernelFacts {
    pub(super) fn gather() -> KernelFacts {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let cgroup2 = cgroup2_mount(&mounts).map(|mount| mount.display().to_string());
        KernelFacts {
            release: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            tproxy: nft_takes(TPROXY),
            redirect: nft_takes(REDIRECT),
            socket_cgroup: cgroup2.as_deref().and_then(any_cgroup).map(|path| nft_takes(&socket_cgroup(&path))),
            conntrack: Conntrack::open().map(drop).map_err(|error| error.to_string()),
            owner: own_socket_owner(),
            tun: OpenOptions::new().read(true).write(true).open("/dev/net/tun").map(drop).map_err(|e| e.to_string()),
            cgroup2,
            policy_routing: look("ip", &["rule", "show"]).is_some(),
            ipv6: crate::host::has_ipv6(),
        }
    }
}

fn nft_takes(rules: &str) -> Tried {
    match try_look_with_input("nft", &["--check", "-f", "-"], rules) {
        Look::Said(_) => Ok(()),
        Look::Complained(why) => Err(why.lines().next().unwrap_or_default().to_owned()),
        Look::Missing => Err("nft is not installed".into()),
    }
}

fn socket_cgroup(path: &str) -> String {
    let rule = format!("socket cgroupv2 level 1 \"{path}\" accept");
    format!("table inet meshd_probe {{\n  chain c {{\n    type filter hook output priority 0;\n    {rule}\n  }}\n}}\n")
}

/// As nft wants it: below /sys/fs/cgroup.
fn any_cgroup(mount: &str) -> Option<String> {
    let cgroups = std::fs::read_dir(mount).ok()?.filter_map(Result::ok);
    let path = cgroups.map(|entry| entry.path()).find(|path| path.is_dir())?;
    Some(path.strip_prefix("/sys/fs/cgroup").ok()?.to_str()?.to_owned())
}

/// Asks the kernel for a connection of our own whether it can tell owners.
fn own_socket_owner() -> Result<SocketOwner, String> {
    let ask = || -> std::io::Result<Lookup> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let client = TcpStream::connect_timeout(&listener.local_addr()?, LOOPBACK_MAX)?;
        SocketDiag::open()?.owner(client.local_addr()?, client.peer_addr()?)
    };
    match ask() {
        Ok(Lookup::Owned(owner)) => Ok(owner),
        Ok(other) => Err(format!("it does not find a socket of ours ({other:?})")),
        Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {
            Err("this host cannot connect to itself: a firewall drops what comes from lo; accept that first".into())
        }
        Err(error) => Err(error.to_string()),
    }
}

pub(super) fn judge(facts: &KernelFacts) -> Vec<Finding> {
    let mut findings = vec![version(&facts.release), owners(facts), units(facts)];
    findings.push(needed(
        "policy routing works",
        if facts.policy_routing { Ok(()) } else { Err("`ip rule` does not work".into()) },
        "use a kernel with CONFIG_IP_MULTIPLE_TABLES",
    ));
    for (check, tried, remedy) in [
        ("nftables can hand connections over (nft_tproxy)", &facts.tproxy, "load it: modprobe nft_tproxy"),
        ("nftables can redirect (nft_redir)", &facts.redirect, "load it: modprobe nft_redir"),
        ("connection tracking answers (ctnetlink)", &facts.conntrack, "load it: modprobe nf_conntrack_netlink"),
        ("there is a TUN device", &facts.tun, "load it: modprobe tun; only the tun backend needs it"),
    ] {
        findings.push(helpful(check, tried.clone(), remedy));
    }
    if let Some(tried) = &facts.socket_cgroup {
        let remedy = "load it: modprobe nft_socket; without it, strict ports tell callers by uid only";
        findings.push(helpful("rules can tell units (nft_socket cgroupv2)", tried.clone(), remedy));
    }
    findings.push(match facts.ipv6 {
        true => Finding::ok("IPv6 is there", ""),
        false => Finding::ok("IPv6 is off", "only IPv4 is captured"),
    });
    findings
}

fn needed(check: &'static str, tried: Tried, remedy: &str) -> Finding {
    tried.map_or_else(|why| Finding::failed(check, why, remedy), |()| Finding::ok(check, ""))
}

/// Some backend does without it.
fn helpful(check: &'static str, tried: Tried, remedy: &str) -> Finding {
    tried.map_or_else(|why| Finding::warning(check, why, remedy), |()| Finding::ok(check, ""))
}

fn version(release: &str) -> Finding {
    let check = "the kernel is 5.14 or newer";
    let mut numbers = release.split(|character: char| !character.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= KERNEL_MIN => Finding::ok(check, release),
        (Some(Ok(_)), Some(Ok(_))) => Finding::failed(
            check,
            format!("this is {release}"),
            "boot a newer kernel (RHEL 9, Ubuntu 22.04, Debian 12)",
        ),
        _ => Finding::warning(check, format!("`{release}` is no version"), "see `uname -r`"),
    }
}

fn owners(facts: &KernelFacts) -> Finding {
    let check = "the kernel tells who owns a connection (sock_diag)";
    match &facts.owner {
        Ok(_) => Finding::ok(check, ""),
        Err(why) => {
            Finding::failed(check, why.clone(), "use a kernel with CONFIG_INET_DIAG: modprobe inet_diag tcp_diag")
        }
    }
}

fn units(facts: &KernelFacts) -> Finding {
    let check = "units can be told apart (cgroup2)";
    let remedy = "mount cgroup2 (systemd.unified_cgroup_hierarchy=1), or enrol workloads by uid";
    match (&facts.cgroup2, &facts.owner) {
        (None, _) => Finding::warning(check, "cgroup2 is not mounted", remedy),
        (Some(_), Ok(SocketOwner { cgroup: None, .. })) => {
            Finding::warning(check, "sock_diag does not tell the cgroup of this process", remedy)
        }
        (Some(mount), _) => Finding::ok(check, mount.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::{Verdict, worst};
    use super::*;

    fn facts() -> KernelFacts {
        KernelFacts {
            release: "6.1.0-18-amd64".into(),
            tproxy: Ok(()),
            redirect: Ok(()),
            socket_cgroup: Some(Ok(())),
            conntrack: Ok(()),
            owner: Ok(SocketOwner { uid: 0, inode: 7, cgroup: Some(99) }),
            tun: Ok(()),
            cgroup2: Some("/sys/fs/cgroup".into()),
            policy_routing: true,
            ipv6: true,
        }
    }

    #[test]
    fn a_current_kernel_is_fine() {
        assert_eq!(worst(&judge(&facts())), Verdict::Ok);
    }

    #[test]
    fn old_kernels_are_refused() {
        assert_eq!(version("5.14.0-427.el9.x86_64").verdict, Verdict::Ok);
        assert_eq!(version("5.10.0-28-amd64").verdict, Verdict::Failed);
        assert_eq!(version("4.18.0").verdict, Verdict::Failed);
        assert_eq!(version("").verdict, Verdict::Warning);
    }

    #[test]
    fn what_another_backend_does_without_is_a_warning() {
        let without = |change: fn(&mut KernelFacts)| {
            let mut facts = facts();
            change(&mut facts);
            worst(&judge(&facts))
        };
        assert_eq!(without(|facts| facts.tproxy = Err("Could not process rule".into())), Verdict::Warning);
        assert_eq!(without(|facts| facts.tun = Err("No such file".into())), Verdict::Warning);
        assert_eq!(without(|facts| facts.cgroup2 = None), Verdict::Warning);
        assert_eq!(without(|facts| facts.ipv6 = false), Verdict::Ok);
        assert_eq!(without(|facts| facts.policy_routing = false), Verdict::Failed);
        assert_eq!(without(|facts| facts.owner = Err("Operation not permitted".into())), Verdict::Failed);
    }

    #[test]
    fn this_kernel_tells_who_we_are() {
        assert_eq!(own_socket_owner().unwrap().uid, nix::unistd::getuid().as_raw());
    }
}
