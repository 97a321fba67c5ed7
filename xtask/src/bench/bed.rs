//! Two hosts, a server behind one, and whichever pair of proxies is being measured between them.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use meshd_tests::host::Host;
use meshd_tests::http;
use meshd_tests::lab::Lab;
use meshd_tests::process::{Process, Program};
use meshd_tests::wait::until;

use super::certificates::Certificates;
use super::mesh::BenchMesh;
use super::subject::Subject;
use super::{envoy, haproxy};
use crate::interrupt;

/// Where near proxies listen, as in their configurations.
const NEAR: &str = "127.0.0.1:9000";
pub(crate) const APP: &str = "127.0.0.1:8080";
const APP_PORT: u16 = 8080;
const UNIT: &str = "client";
const READY: Duration = Duration::from_secs(20);

/// A connection per request leaves ports waiting; a full range keeps them from running out.
const SYSCTLS: [&str; 2] = ["net.ipv4.ip_local_port_range=16000 65535", "net.ipv4.tcp_tw_reuse=1"];

// Fields drop in order: processes first, the lab they run in last.
pub(crate) struct Bed {
    mesh: Option<BenchMesh>,
    _app: Process,
    programs: BTreeMap<Subject, PathBuf>,
    certificates: Option<Certificates>,
    near: Host,
    far: Host,
    lab: Arc<Lab>,
}

/// The two proxies of one measurement, and where its clients connect to.
pub(crate) struct Running {
    pub(crate) target: String,
    /// Near and far; none for direct.
    pub(crate) pids: Vec<u32>,
    processes: Vec<Process>,
}

impl Bed {
    pub(crate) fn make() -> Result<Self> {
        let lab = Arc::new(Lab::new(&["pki", "near", "far"])?);
        interrupt::remove_on_interrupt(lab.name());
        let (near, far) = (lab.host("near"), lab.host("far"));
        for host in [&near, &far] {
            for setting in SYSCTLS {
                host.command("sysctl", &["-q", "-w", setting])?;
            }
        }
        let listen = format!("0.0.0.0:{APP_PORT}");
        let app = far.testkit(&["echo-http", "--listen", &listen]).unit("app.service");
        let app = far.start_testkit(&app)?;
        Ok(Self { mesh: None, _app: app, programs: BTreeMap::new(), certificates: None, near, far, lab })
    }

    /// Everything a subject needs before its first measurement.
    pub(crate) fn prepare(&mut self, subject: Subject, target: &Path) -> Result<()> {
        match subject {
            Subject::Direct => {}
            Subject::Haproxy => {
                self.certificates()?;
                let program = meshd_tests::packages::find("haproxy").context("no haproxy here")?;
                self.programs.insert(subject, program);
            }
            Subject::Envoy => {
                self.certificates()?;
                self.programs.insert(subject, envoy::program(target)?);
            }
            Subject::Meshd | Subject::MeshdTun if self.mesh.is_none() => {
                self.mesh = Some(BenchMesh::join(self.lab.clone())?);
            }
            Subject::Meshd | Subject::MeshdTun => {}
        }
        Ok(())
    }

    /// Fresh proxies, proven to answer.
    pub(crate) fn start(&self, subject: Subject) -> Result<Running> {
        let running = match subject {
            Subject::Direct => {
                Running { target: format!("{}:{APP_PORT}", self.far.address()), pids: vec![], processes: vec![] }
            }
            Subject::Haproxy => self.start_pair(subject, haproxy::NEAR, haproxy::FAR, haproxy::ARGUMENTS)?,
            Subject::Envoy => self.start_pair(subject, envoy::NEAR, envoy::FAR, envoy::ARGUMENTS)?,
            Subject::Meshd | Subject::MeshdTun => {
                let mesh = self.mesh.as_ref().context("meshd was not prepared")?;
                let (target, pids) = mesh.start(subject.backend().context("not a meshd")?)?;
                Running { target, pids, processes: vec![] }
            }
        };
        self.wait_answer(subject, &running)?;
        Ok(running)
    }

    pub(crate) fn stop(&self, subject: Subject, running: Running) -> Result<()> {
        drop(running);
        match &self.mesh {
            Some(mesh) if subject.backend().is_some() => mesh.stop(),
            _ => Ok(()),
        }
    }

    /// `testkit` on the near host, as the unit whose traffic is measured.
    pub(crate) fn client(&self, args: &[&str]) -> Program {
        self.near.testkit(args).unit(&format!("{UNIT}.service")).uid(super::mesh::CLIENT_UID)
    }

    pub(crate) fn near(&self) -> &Host {
        &self.near
    }

    fn start_pair(&self, subject: Subject, near: &str, far: &str, arguments: &[&str]) -> Result<Running> {
        let program = self.programs.get(&subject).context("not prepared")?;
        let certificates = self.certificates.as_ref().context("no certificates")?;
        let far_address = self.far.address().to_string();
        let mut processes = Vec::new();
        for (host, template) in [(&self.near, near), (&self.far, far)] {
            let config = host.directory().join(format!("{subject}.yaml"));
            fs::write(&config, certificates.fill(template, &far_address))?;
            let program = Program::new(program).args(arguments).arg(&config).unit("proxy.service");
            processes.push(host.spawn(&program)?);
        }
        let pids = processes.iter().map(Process::pid).collect();
        Ok(Running { target: NEAR.to_owned(), pids, processes })
    }

    fn wait_answer(&self, subject: Subject, running: &Running) -> Result<()> {
        if subject.backend().is_some() {
            // Only the enrolled unit may ask there, so a client of that unit does.
            let args = ["load", "--target", &running.target, "--requests", "1"];
            return until(READY, "meshd to answer", || {
                let finished = self.near.run(&self.client(&args));
                finished.is_ok_and(|finished| finished.stdout.contains("\"ok\":1"))
            });
        }
        let target: SocketAddr = running.target.parse()?;
        let answers =
            || self.near.within(|| http::get(target, "/")).is_ok_and(|got| got.is_ok_and(|(code, _)| code == 200));
        until(READY, &format!("{subject} to answer"), answers)
            .with_context(|| running.processes.iter().map(Process::output).collect::<String>())
    }

    fn certificates(&mut self) -> Result<()> {
        if self.certificates.is_none() {
            self.certificates = Some(Certificates::make(&self.lab.directory().join("certificates"))?);
        }
        Ok(())
    }
}
