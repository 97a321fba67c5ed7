//! An etcd cluster on one host: TLS with client certificates, and roles by their names.

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::authority::Authority;
use crate::host::Host;
use crate::process::{Finished, Process, Program};
use crate::servers;
use crate::wait::until;

/// Of the first member, in the host's own namespace; each has two.
const FIRST_PORT: u16 = 12379;
const READY: Duration = Duration::from_secs(60);

pub struct Etcd {
    members: Vec<Option<Process>>,
    authority: Authority,
    program: PathBuf,
    host: Host,
    /// Members tell of each request.
    tells: bool,
}

impl Etcd {
    /// So many members, healthy, with auth on: `root` may everything, and nobody else anything yet.
    pub fn start(host: &Host, members: u16) -> Result<Self> {
        Self::begun(host, members, false)
    }

    /// The same, which can say what it was asked.
    pub fn start_telling(host: &Host, members: u16) -> Result<Self> {
        Self::begun(host, members, true)
    }

    fn begun(host: &Host, members: u16, tells: bool) -> Result<Self> {
        let authority = Authority::create(host, &host.directory().join("etcd"))?;
        authority.issue("server", "/CN=server")?;
        authority.issue("root", "/CN=root")?;
        let members = (0..members).map(|_| None).collect();
        let mut etcd = Self { members, authority, program: servers::etcd()?, host: host.clone(), tells };
        etcd.begin()?;
        Ok(etcd)
    }

    /// For clients, reachable from other hosts, too.
    pub fn endpoints(&self) -> Vec<String> {
        (0..self.members.len()).map(|n| self.url(n, 0)).collect()
    }

    pub fn authority(&self) -> PathBuf {
        self.authority.certificate()
    }

    /// A user who may read and write below a prefix, with a certificate of that name: `etcd/NAME.pem` and `.key`.
    pub fn add_user(&self, name: &str, prefix: &str) -> Result<(PathBuf, PathBuf)> {
        self.authority.issue(name, &format!("/CN={name}"))?;
        self.must(&["role", "add", name])?;
        self.must(&["role", "grant-permission", name, "readwrite", "--prefix=true", prefix])?;
        self.must(&["user", "add", name, "--no-password"])?;
        self.must(&["user", "grant-role", name, name])?;
        Ok((self.authority.file(&format!("{name}.pem")), self.authority.file(&format!("{name}.key"))))
    }

    /// etcdctl as somebody with a certificate, asking the members that run.
    pub fn ctl(&self, user: &str, arguments: &[&str]) -> Result<Finished> {
        let running = self.endpoints().into_iter().zip(&self.members).filter(|(_, member)| member.is_some());
        let endpoints: Vec<String> = running.map(|(endpoint, _)| endpoint).collect();
        let program = Program::new("etcdctl").env("ETCDCTL_API", "3").args(["--endpoints", &endpoints.join(",")]);
        let program = program.arg("--cacert").arg(self.authority());
        let program = program.arg("--cert").arg(self.authority.file(&format!("{user}.pem")));
        let program = program.arg("--key").arg(self.authority.file(&format!("{user}.key")));
        self.host.run(&program.args(arguments))
    }

    /// SIGSTOP and SIGCONT, say.
    pub fn signal(&self, member: usize, signal: Signal) -> Result<()> {
        self.members[member].as_ref().context("this member does not run")?.signal(signal)
    }

    pub fn kill_member(&mut self, member: usize) -> Result<()> {
        self.members[member].take().context("this member does not run")?.kill()
    }

    pub fn start_member(&mut self, member: usize) -> Result<()> {
        let (clients, peers) = (self.url(member, 0), self.url(member, 1));
        let all: Vec<String> = (0..self.members.len()).map(|n| format!("m{n}={}", self.url(n, 1))).collect();
        let program = Program::new(&self.program).args(["--name", &format!("m{member}"), "--data-dir"]);
        let program = program.arg(self.data(member)).args(["--unsafe-no-fsync", "--client-cert-auth"]);
        let program = program.args(["--peer-client-cert-auth", "--initial-cluster", &all.join(",")]);
        let program = program.args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
        let program = program.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
        let files = [("trusted-ca-file", "ca.pem"), ("cert-file", "server.pem"), ("key-file", "server.key")];
        let program = files.iter().fold(program, |program, (option, file)| {
            let file = self.authority.file(file);
            program.arg(format!("--{option}={}", file.display())).arg(format!("--peer-{option}={}", file.display()))
        });
        let program = program.args(["--log-level", if self.tells { "debug" } else { "info" }]);
        self.members[member] = Some(self.host.spawn(&program)?);
        Ok(())
    }

    /// The keys, or the beginnings of keys, that somebody at an address asked the running members for.
    pub fn read_by(&self, address: Ipv4Addr) -> Vec<String> {
        let (by, asked) = (format!("\"remote\":\"{address}:"), "\"request content\":\"key:\\\"");
        let output = self.output();
        let reads = output.lines().filter(|line| line.contains("KV/Range") && line.contains(&by));
        reads.filter_map(|line| Some(line.split_once(asked)?.1.split_once('\\')?.0.to_owned())).collect()
    }

    /// Everything in it is lost, revisions included; the same addresses and certificates, and again only `root`.
    pub fn restart_empty(&mut self) -> Result<()> {
        for member in 0..self.members.len() {
            self.members[member].take().map_or(Ok(()), |mut process| process.kill())?;
            fs::remove_dir_all(self.data(member))?;
        }
        self.begin()
    }

    /// What the running members said.
    pub fn output(&self) -> String {
        self.members.iter().flatten().map(Process::output).collect()
    }

    fn begin(&mut self) -> Result<()> {
        (0..self.members.len()).try_for_each(|member| self.start_member(member))?;
        let healthy = || self.ctl("root", &["endpoint", "health"]).is_ok_and(|finished| finished.success());
        until(READY, "a healthy etcd", healthy).with_context(|| self.output())?;
        self.must(&["user", "add", "root", "--no-password"])?;
        self.must(&["user", "grant-role", "root", "root"])?;
        self.must(&["auth", "enable"])
    }

    fn must(&self, arguments: &[&str]) -> Result<()> {
        self.ctl("root", arguments)?.expect_success(&format!("etcdctl {}", arguments.join(" ")))?;
        Ok(())
    }

    fn data(&self, member: usize) -> PathBuf {
        self.authority.file(&format!("m{member}"))
    }

    fn url(&self, member: usize, which: usize) -> String {
        format!("https://{}:{}", self.host.address(), usize::from(FIRST_PORT) + 2 * member + which)
    }
}
