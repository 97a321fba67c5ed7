//! One host of a lab: a network namespace, addresses, files of its own.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

use crate::command;
use crate::process::{Finished, Process, Program};

const RUN_DEADLINE: Duration = Duration::from_secs(60);

/// Names resolve through meshd's DNS only, whatever this machine uses.
const ETC: [(&str, &str); 2] =
    [("resolv.conf", "nameserver 127.0.0.1\n"), ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")];

#[derive(Clone)]
pub struct Host(Arc<Inner>);

struct Inner {
    name: String,
    netns: String,
    lab: PathBuf,
    address: Ipv4Addr,
    address6: Ipv6Addr,
    programs_run: AtomicU32,
}

impl Host {
    pub(crate) fn create(name: &str, netns: &str, lab: &Path, address: Ipv4Addr, address6: Ipv6Addr) -> Result<Self> {
        let etc = lab.join(name).join("etc");
        fs::create_dir_all(&etc)?;
        fs::create_dir_all(lab.join(name).join("log"))?;
        for (file, text) in ETC {
            fs::write(etc.join(file), text)?;
        }
        Ok(Self(Arc::new(Inner {
            name: name.to_owned(),
            netns: netns.to_owned(),
            lab: lab.to_owned(),
            address,
            address6,
            programs_run: AtomicU32::new(0),
        })))
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub fn address(&self) -> Ipv4Addr {
        self.0.address
    }

    pub fn address6(&self) -> Ipv6Addr {
        self.0.address6
    }

    /// Files of this host, readable by its programs.
    pub fn directory(&self) -> PathBuf {
        self.0.lab.join(&self.0.name)
    }

    pub fn network_namespace(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0.netns)
    }

    /// A built program of ours as it is seen on the host.
    pub fn binary(&self, name: &str) -> PathBuf {
        self.0.lab.join("bin").join(name)
    }

    /// Starts a program; stdout and stderr go to log files of their own.
    pub fn spawn(&self, program: &Program) -> Result<Process> {
        let number = self.0.programs_run.fetch_add(1, Ordering::Relaxed);
        let log = self.directory().join("log").join(format!("{number:03}-{}", program.label()));
        Process::spawn(&self.0.lab.join("enter"), self.name(), program, &log)
    }

    /// Runs a program to its end.
    pub fn run(&self, program: &Program) -> Result<Finished> {
        self.spawn(program)?.finish(RUN_DEADLINE).with_context(|| format!("on host {}", self.name()))
    }

    /// Runs `work` on a thread whose sockets are the host's. Its process is this one, so it belongs to no unit.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let netns = fs::File::open(self.network_namespace())?;
        std::thread::scope(|scope| {
            let worker = scope.spawn(move || -> Result<T> {
                setns(netns, CloneFlags::CLONE_NEWNET).context("cannot enter the host's network namespace")?;
                Ok(work())
            });
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// `nft` in this host's namespace.
    pub fn nft(&self, rules: &str) -> Result<String> {
        command::run_with_input("ip", &["netns", "exec", &self.0.netns, "nft", "-f", "-"], rules)
    }

    /// A system command (ip, nft, sysctl) as root in this host's namespace, without unit or log.
    pub fn command(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut all = vec!["netns", "exec", &self.0.netns, program];
        all.extend(args);
        command::run("ip", &all)
    }

    /// Every netfilter rule, chain and set, but not what iptables makes of tables by being looked at: built-in
    /// chains without rules.
    pub fn netfilter(&self) -> Result<String> {
        const BUILT_IN: [&str; 5] = ["INPUT", "FORWARD", "OUTPUT", "PREROUTING", "POSTROUTING"];
        let of_table = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["table", "ip" | "ip6", "nat" | "filter" | "mangle" | "security", "{"] | ["}"] | [] => true,
                ["chain", name, "{"] => BUILT_IN.contains(&name),
                ["type", .., "policy", "accept;"] => true,
                _ => false,
            }
        };
        let ruleset = self.command("nft", &["--stateless", "list", "ruleset"])?;
        let mut rules: Vec<String> = ruleset.lines().filter(|line| !of_table(line)).map(str::to_owned).collect();
        for save in ["iptables-legacy-save", "ip6tables-legacy-save"] {
            let saved = self.command(save, &[])?;
            let of_chains = |line: &&str| line.starts_with("-A ") || line.ends_with(" - [0:0]");
            rules.extend(saved.lines().filter(of_chains).map(str::to_owned));
        }
        Ok(rules.join("\n"))
    }
}
