//! Two servers of the PKI over three members of etcd: members die and stand still, a server does, and nobody notices.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd_tests::host::Host;
use meshd_tests::lab::Lab;
use meshd_tests::mesh::{Mesh, PKI_UID};
use meshd_tests::plan::Plan;
use meshd_tests::process::{Process, Program};
use meshd_tests::wait::until;
use nix::sys::signal::Signal;

use crate::kills::renewed_everywhere;
use crate::witness::Witness;
use crate::{DEADLINE, asks_payments, figure, scale};

const MEMBERS: usize = 3;
const READY: Duration = Duration::from_secs(30);
/// Renewed after 12 to 18 s. What is left, 22 s, is for a server that stands still with a connection it took (20 s).
const LEAF_S: &str = "40";
const SECOND_PORT: u16 = 15112;

/// On loopback of one host: TLS to etcd and its users are shown elsewhere (`meshd-pki etcd`).
struct Members {
    host: Host,
    directory: PathBuf,
    running: Vec<Option<Process>>,
}

impl Members {
    fn start(host: Host) -> Result<Self> {
        let directory = host.directory().join("etcd");
        fs::create_dir(&directory)?;
        let mut members = Self { host, directory, running: (0..MEMBERS).map(|_| None).collect() };
        (0..MEMBERS).try_for_each(|member| members.start_member(member))?;
        until(READY, "etcd to be healthy", || members.ask(&["endpoint", "health"]).is_ok())?;
        Ok(members)
    }

    fn url(member: usize, port: u16) -> String {
        format!("http://127.0.0.{}:{port}", member + 1)
    }

    fn clients() -> [String; MEMBERS] {
        std::array::from_fn(|member| Self::url(member, 2379))
    }

    fn start_member(&mut self, member: usize) -> Result<()> {
        let (client, peer) = (Self::url(member, 2379), Self::url(member, 2380));
        let all: Vec<String> = (0..MEMBERS).map(|member| format!("e{member}={}", Self::url(member, 2380))).collect();
        let program = Program::new("etcd")
            .args(["--name", &format!("e{member}"), "--data-dir"])
            .arg(self.directory.join(format!("e{member}")))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &all.join(","), "--initial-cluster-token", "lab", "--logger", "zap"])
            .unit("etcd.service");
        self.running[member] = Some(self.host.spawn(&program)?);
        Ok(())
    }

    fn ask(&self, question: &[&str]) -> Result<String> {
        let program = Program::new("etcdctl").env("ETCDCTL_API", "3").args(["--endpoints", &Self::clients().join(",")]);
        self.host.run(&program.args(question))?.expect_success("etcdctl")
    }

    fn leader(&self) -> Result<usize> {
        let status: serde_json::Value = serde_json::from_str(&self.ask(&["endpoint", "status", "-w", "json"])?)?;
        let leads = |one: &&serde_json::Value| one["Status"]["leader"] == one["Status"]["header"]["member_id"];
        let leader = status.as_array().context("no list")?.iter().find(leads).context("nobody leads")?;
        Self::clients().iter().position(|url| leader["Endpoint"] == url.as_str()).context("a stranger leads")
    }

    fn member(&mut self, member: usize) -> Result<&mut Process> {
        self.running[member].as_mut().with_context(|| format!("member {member} does not run"))
    }

    fn signal(&mut self, members: &[usize], signal: Signal) -> Result<()> {
        members.iter().try_for_each(|member| self.member(*member)?.signal(signal))
    }
}

/// A second server of the PKI, beside the first.
struct Second {
    host: Host,
    state: PathBuf,
}

impl Second {
    fn init(mesh: &Mesh, etcd: &[&str]) -> Result<Self> {
        let second = Self { host: mesh.pki_host(), state: mesh.pki_directory().join("second") };
        fs::create_dir(&second.state)?;
        fs::set_permissions(&second.state, Permissions::from_mode(0o700))?;
        fs::copy(mesh.pki_state().join("kek"), second.state.join("kek"))?;
        for file in [second.state.clone(), second.state.join("kek")] {
            chown(file, Some(PKI_UID), Some(PKI_UID))?;
        }
        let domain = Plan::shop().trust_domain;
        let program = second.program(&["replica", "init"]).args(["--trust-domain", &domain]).args(etcd);
        second.host.run(&program)?.expect_success("meshd-pki replica init")?;
        Ok(second)
    }

    fn start(&self) -> Result<Process> {
        let listen = format!("{}:{SECOND_PORT}", self.host.address());
        let program = self.program(&["run"]).args(["--listen", &listen, "--leaf-ttl", LEAF_S]);
        let mut process = self.host.spawn(&program)?;
        until(READY, "the second server", || process.output().contains("meshd-pki ready") || !process.is_running())?;
        ensure!(process.is_running(), "the second server ended:\n{}", process.output());
        Ok(process)
    }

    fn program(&self, verb: &[&str]) -> Program {
        let program = Program::new(self.host.binary("meshd-pki")).args(verb).arg("--state").arg(&self.state);
        program.unit("meshd-pki-second.service").uid(PKI_UID)
    }
}

#[test]
fn members_of_etcd_and_servers_of_the_pki_fail_under_load_and_every_host_renews() -> Result<()> {
    let plan = Plan { leaf_ttl: Some(LEAF_S), ..Plan::shop() };
    let mut mesh = Mesh::prepare(Arc::new(Lab::new(&plan.host_names())?), plan)?;
    let mut members = Members::start(mesh.pki_host())?;
    let clients = Members::clients();
    let etcd: Vec<&str> = clients.iter().flat_map(|url| ["--etcd", url]).chain(["--etcd-lease", "4"]).collect();
    mesh.pki(&[&["migrate", "--to", "etcd"], &etcd[..]].concat())?;
    let second = Second::init(&mesh, &etcd)?;
    mesh.start_pki()?;
    let mut server = second.start()?;
    mesh.join_all()?;
    mesh.start_all()?;
    let load = Witness::start(&mesh)?;

    let rounds = scale(1, 15);
    for _ in 0..rounds {
        let leader = members.leader()?;
        members.member(leader)?.kill()?;
        renewed_everywhere(&mesh).context("the leader of etcd killed")?;
        members.start_member(leader)?;

        until(DEADLINE, "etcd to be whole", || members.ask(&["endpoint", "health"]).is_ok())?;
        let leader = members.leader()?;
        members.signal(&[leader], Signal::SIGSTOP)?;
        renewed_everywhere(&mesh).context("the leader of etcd stands still")?;
        let other = (leader + 1) % MEMBERS;
        members.signal(&[other], Signal::SIGSTOP)?;
        renewed_everywhere(&mesh).context("no majority in etcd")?;
        members.signal(&[leader, other], Signal::SIGCONT)?;
        until(DEADLINE, "etcd to be whole", || members.ask(&["endpoint", "health"]).is_ok())?;

        mesh.pki_process()?.signal(Signal::SIGSTOP)?;
        renewed_everywhere(&mesh).context("one server of the PKI stands still")?;
        mesh.pki_process()?.signal(Signal::SIGCONT)?;
        server.kill()?;
        renewed_everywhere(&mesh).context("the other server of the PKI was killed")?;
        server = second.start()?;
    }
    asks_payments(&mesh, "web", "checkout")?;
    ensure!(mesh.pki_process()?.is_running(), "a server of the PKI ended: {}", mesh.pki_process()?.output());
    figure(&format!(
        "{rounds} times: etcd's leader killed, stopped, no majority; a server of the PKI stopped, one killed"
    ));
    load.end(&mesh, "faults of etcd and of servers of the PKI")
}
