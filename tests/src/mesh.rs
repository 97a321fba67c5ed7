//! A whole mesh on a lab: the PKI, a meshd per host, the programs behind it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::binaries;
use crate::clock::fake_time;
use crate::daemon::Daemon;
use crate::host::Host;
use crate::http;
use crate::lab::Lab;
use crate::metrics::Metrics;
use crate::plan::{self, HostPlan, PKI_PORT, Plan, ServicePlan, Workload};
use crate::process::{Finished, Process, Program};
use crate::wait::until;

pub const PKI_UID: u32 = 991;
const PKI_METRICS: ([u8; 4], u16) = ([127, 0, 0, 1], 15021);
const READY: Duration = Duration::from_secs(30);
const END: &str = "-----END CERTIFICATE-----\n";

// Fields drop in order: programs first, the lab they run in last.
pub struct Mesh {
    apps: Vec<Process>,
    pki: Option<Process>,
    daemons: Vec<Daemon>,
    plan: Plan,
    lab: Arc<Lab>,
}

impl Mesh {
    /// A lab of its own, everything joined and ready, every program serving.
    pub fn start(plan: Plan) -> Result<Self> {
        let lab = Arc::new(Lab::new(&plan.host_names())?);
        let mut mesh = Self::prepare(lab, plan)?;
        mesh.start_pki()?;
        mesh.join_all()?;
        mesh.start_all()?;
        Ok(mesh)
    }

    /// The same with a PKI whose first root was replaced by the calendar, so many days ago; and the chain that it showed then.
    pub fn start_after_rotation(plan: Plan, days: u64) -> Result<(Self, Vec<String>)> {
        let lab = Arc::new(Lab::new(&plan.host_names())?);
        let library = fake_time()?;
        let roots = |mesh: &Self| mesh.pki_status().map(|status| active_and_prepared(&status)).unwrap_or_default();
        let ago = |hours| format!("-{hours}h");
        let mut mesh = Self::prepare_in(lab, plan, &clock(&library, &ago(24 * (days + 9))))?;
        // Prepared after a week; signs a day later.
        mesh.start_pki_with(&clock(&library, &ago(24 * days + 26)))?;
        until(READY, "the second root", || roots(&mesh).1.is_some())?;
        mesh.stop_pki()?;
        let next = roots(&mesh).1;
        if days > 0 {
            mesh.start_pki_with(&clock(&library, &ago(24 * days)))?;
        } else {
            mesh.start_pki_serving(&["--clock-is-right"])?;
        }
        until(READY, "the second root signing", || roots(&mesh).0 == next)?;
        let shown = mesh.shown_by_pki()?;
        if days > 0 {
            mesh.stop_pki()?;
            mesh.start_pki_serving(&["--clock-is-right"])?;
        }
        mesh.join_all()?;
        mesh.start_all()?;
        Ok((mesh, shown))
    }

    /// The chain at the PKI's port, PEM each.
    pub fn shown_by_pki(&self) -> Result<Vec<String>> {
        let show = format!("openssl s_client -connect {} -showcerts </dev/null", self.pki_address());
        let shown = self.pki_host().run(&Program::new("sh").args(["-c", &show]))?.stdout;
        let begins = shown.match_indices("-----BEGIN CERTIFICATE").map(|(at, _)| at);
        let ends = shown.match_indices(END).map(|(at, end)| at + end.len());
        Ok(begins.zip(ends).map(|(from, to)| shown[from..to].to_owned()).collect())
    }

    /// Files in place and the PKI initialised, nothing running.
    pub fn prepare(lab: Arc<Lab>, plan: Plan) -> Result<Self> {
        Self::prepare_in(lab, plan, &[])
    }

    fn prepare_in(lab: Arc<Lab>, plan: Plan, environment: &[(&str, &str)]) -> Result<Self> {
        binaries::check()?;
        let daemons = plan
            .hosts
            .iter()
            .map(|host| Daemon::create(lab.host(&host.name), plan.access_log, plan.threads))
            .collect::<Result<Vec<_>>>()?;
        let mesh = Self { apps: Vec::new(), pki: None, daemons, plan, lab };
        for (host, daemon) in mesh.plan.hosts.iter().zip(&mesh.daemons) {
            daemon.enrol(&plan::enrolment(&host.workloads, mesh.lab.has_units()))?;
            mesh.write_documents(daemon)?;
        }
        mesh.init_pki(environment)?;
        Ok(mesh)
    }

    pub fn start_pki(&mut self) -> Result<()> {
        self.start_pki_with(&[])
    }

    /// With environment variables of its own, say another clock.
    pub fn start_pki_with(&mut self, environment: &[(&str, &str)]) -> Result<()> {
        self.run_pki(environment, &[])
    }

    /// With options of its own, say another port it serves on.
    pub fn start_pki_serving(&mut self, options: &[&str]) -> Result<()> {
        self.run_pki(&[], options)
    }

    fn run_pki(&mut self, environment: &[(&str, &str)], options: &[&str]) -> Result<()> {
        self.spawn_pki(environment, options)?;
        let process = self.pki.as_mut().context("the PKI does not run")?;
        until(READY, "meshd-pki ready", || process.output().contains("meshd-pki ready") || !process.is_running())?;
        ensure!(process.is_running(), "meshd-pki ended:\n{}", process.output());
        Ok(())
    }

    /// Starts the PKI without waiting for it.
    pub fn spawn_pki(&mut self, environment: &[(&str, &str)], options: &[&str]) -> Result<()> {
        let listen = self.pki_address();
        let leaf = self.plan.leaf_ttl.into_iter().flat_map(|ttl| ["--leaf-ttl", ttl]);
        let rehearsal = self.plan.rehearse.into_iter().flat_map(|leaf| ["--rehearse", leaf]);
        let mut program = self.pki_program(&["run"]).args(["--listen", &listen]).args(leaf).args(rehearsal);
        program = program.args(["--metrics", &SocketAddr::from(PKI_METRICS).to_string()]);
        program = program.args(&self.plan.pki_options).args(options);
        if !environment.is_empty() {
            // A clock behind the one at `init` would be distrusted.
            program = program.args(["--clock-is-right"]);
        }
        for (name, value) in environment {
            program = program.env(name, value);
        }
        self.pki = Some(self.pki_host().spawn(&program)?);
        Ok(())
    }

    pub fn stop_pki(&mut self) -> Result<()> {
        self.pki.take().context("the PKI does not run")?.stop()?;
        Ok(())
    }

    /// SIGKILL, and the end of it.
    pub fn kill_pki(&mut self) -> Result<()> {
        self.pki_process()?.kill()
    }

    /// The server of the PKI, running or ended.
    pub fn pki_process(&mut self) -> Result<&mut Process> {
        self.pki.as_mut().context("the PKI was never started")
    }

    /// What is in its state directory, as its operator sees it; no server needed. Problems are part of it.
    pub fn pki_status(&self) -> Result<serde_json::Value> {
        let finished = self.pki_host().run(&self.pki_program(&["status"]).args(["-o", "json"]))?;
        serde_json::from_str(&finished.stdout).with_context(|| format!("meshd-pki status: {finished:?}"))
    }

    pub fn pki_metrics(&self) -> Result<Metrics> {
        let (_, text) = self.pki_host().within(|| http::get(SocketAddr::from(PKI_METRICS), "/metrics"))??;
        Ok(Metrics::parse(&text))
    }

    pub fn pki_state(&self) -> PathBuf {
        self.pki_directory().join("state")
    }

    /// Has the running PKI deny somebody: `whom` is an option of `meshd-pki deny add`, with its value.
    pub fn deny(&self, whom: &[&str]) -> Result<()> {
        let program = self.pki_program(&["deny", "add"]).args(whom);
        self.pki_host().run(&program)?.expect_success("meshd-pki deny add")?;
        Ok(())
    }

    /// A one-use token for a host, allowing the identities of its workloads.
    pub fn token(&self, host: &HostPlan) -> Result<String> {
        let address = self.pki_address();
        let mut program = self.pki_program(&["token", "create"]).args(["--host", &host.name, "--pki", &address]);
        for workload in &host.workloads {
            program = program.args(["--allow", &workload.identity()]);
        }
        let token = self.pki_host().run(&program)?.expect_success("meshd-pki token create")?;
        Ok(token.trim().to_owned())
    }

    pub fn token_of(&self, host: &str) -> Result<String> {
        let planned = self.plan.hosts.iter().find(|planned| planned.name == host);
        self.token(planned.with_context(|| format!("no host {host} is planned"))?)
    }

    /// A verb of meshd-pki as its operator runs it, beside the running server.
    pub fn pki(&self, verb: &[&str]) -> Result<String> {
        let words = verb.iter().position(|word| word.starts_with('-')).unwrap_or(verb.len());
        let program = self.pki_program(&verb[..words]).args(&verb[words..]);
        self.pki_host().run(&program)?.expect_success(&format!("meshd-pki {}", verb.join(" ")))
    }

    pub fn join_all(&self) -> Result<()> {
        self.plan.hosts.iter().try_for_each(|host| self.join(&host.name))
    }

    pub fn join(&self, host: &str) -> Result<()> {
        self.daemon(host).join(&self.token_of(host)?)?.expect_success(&format!("meshd join on {host}"))?;
        Ok(())
    }

    /// The programs behind the mesh, then every meshd at once.
    pub fn start_all(&mut self) -> Result<()> {
        let names: Vec<String> = self.plan.hosts.iter().map(|host| host.name.clone()).collect();
        self.start_hosts(&names.iter().map(String::as_str).collect::<Vec<_>>())
    }

    pub fn start_hosts(&mut self, names: &[&str]) -> Result<()> {
        for host in self.plan.hosts.clone().iter().filter(|host| names.contains(&host.name.as_str())) {
            for workload in &host.workloads {
                self.start_app(&host.name, workload)?;
            }
        }
        for name in names {
            self.daemon(name).spawn()?;
        }
        names.iter().try_for_each(|name| self.daemon(name).wait_ready())
    }

    pub fn lab(&self) -> &Arc<Lab> {
        &self.lab
    }

    pub fn host(&self, name: &str) -> Host {
        self.lab.host(name)
    }

    pub fn daemon(&self, host: &str) -> &Daemon {
        let found = self.daemons.iter().find(|daemon| daemon.host().name() == host);
        found.unwrap_or_else(|| panic!("no meshd on {host}"))
    }

    pub fn spiffe_id(&self, name: &str) -> String {
        format!("spiffe://{}/ns/shop/sa/{name}", self.plan.trust_domain)
    }

    /// A program as a unit of the plan would run it: its cgroup and its user.
    pub fn in_unit(&self, host: &str, name: &str, program: Program) -> Program {
        let host = self.plan.hosts.iter().find(|planned| planned.name == host);
        let workload = host.and_then(|host| host.workloads.iter().find(|workload| workload.name == name));
        let uid = workload.map_or(STRAY_UID, |workload| workload.uid);
        program.unit(&format!("{name}.service")).uid(uid)
    }

    /// `curl` as a workload of a host; a name the plan does not know is an un-enrolled unit.
    pub fn curl(&self, host: &str, name: &str, args: &[&str]) -> Result<Finished> {
        let curl = Program::new("curl").args(["--silent", "--show-error", "--max-time", "20"]).args(args);
        self.host(host).run(&self.in_unit(host, name, curl))
    }

    /// `testkit` as a workload of a host.
    pub fn testkit(&self, host: &str, name: &str, args: &[&str]) -> Program {
        self.in_unit(host, name, self.host(host).testkit(args))
    }

    /// The virtual address a host's DNS gives for a service name.
    pub fn virtual_address(&self, host: &str, name: &str) -> Result<Ipv4Addr> {
        let lookup = Program::new("getent").args(["ahostsv4", name]).uid(STRAY_UID);
        let found = self.host(host).run(&lookup)?.expect_success(&format!("looking up {name} on {host}"))?;
        found.split_whitespace().next().unwrap_or_default().parse().with_context(|| format!("{name}: {found}"))
    }

    /// Where a service's endpoints are, as its document says.
    pub fn endpoints(&self, service: &ServicePlan) -> Vec<String> {
        let hosts = service.hosts.iter().map(|host| self.lab.host(host));
        if self.plan.ipv6_only {
            hosts.map(|host| host.address6().to_string()).collect()
        } else {
            hosts.map(|host| host.address().to_string()).collect()
        }
    }

    fn write_documents(&self, daemon: &Daemon) -> Result<()> {
        let documents = self.plan.services.iter();
        let documents = documents.map(|service| (service, plan::document(service, &self.endpoints(service))));
        for (service, document) in documents {
            daemon.resource(&format!("{}.yaml", service.name), &document)?;
        }
        Ok(())
    }

    fn start_app(&mut self, host: &str, workload: &Workload) -> Result<()> {
        let Some(app) = workload.app else { return Ok(()) };
        let name = format!("{} on {host}", workload.name);
        let program = self.testkit(host, &workload.name, &app.arguments(&name));
        let process = self.host(host).start_testkit(&program)?;
        self.apps.push(process);
        Ok(())
    }

    fn init_pki(&self, environment: &[(&str, &str)]) -> Result<()> {
        let directory = self.pki_directory();
        fs::create_dir_all(&directory)?;
        chown(&directory, Some(PKI_UID), Some(PKI_UID))?;
        let mut program = self.pki_program(&["init"]).args(["--trust-domain", &self.plan.trust_domain]);
        for (name, value) in environment {
            program = program.env(name, value);
        }
        self.pki_host().run(&program)?.expect_success("meshd-pki init")?;
        Ok(())
    }

    /// The roots that hosts trust, PEM each, the oldest first.
    pub fn roots(&self) -> Result<Vec<String>> {
        let url = format!("https://{}/.well-known/spiffe-bundle", self.pki_address());
        let bundle = self.pki_host().command("curl", &["--silent", "--fail", "--insecure", &url])?;
        let bundle: serde_json::Value = serde_json::from_str(&bundle)?;
        let keys = bundle["keys"].as_array().context("a bundle without keys")?;
        Ok(keys.iter().filter_map(|key| key["x5c"][0].as_str()).map(pem).collect())
    }

    pub fn pki_address(&self) -> String {
        let host = self.pki_host();
        let address = if self.plan.ipv6_only { IpAddr::V6(host.address6()) } else { IpAddr::V4(host.address()) };
        SocketAddr::new(address, PKI_PORT).to_string()
    }

    pub fn pki_host(&self) -> Host {
        self.lab.host(&self.plan.pki_host)
    }

    pub fn pki_directory(&self) -> PathBuf {
        self.pki_host().directory().join("meshd-pki")
    }

    fn pki_program(&self, verb: &[&str]) -> Program {
        let binary = self.pki_host().binary("meshd-pki");
        let state = self.pki_directory().join("state");
        Program::new(binary).args(verb).arg("--state").arg(state).unit("meshd-pki.service").uid(PKI_UID)
    }
}

fn pem(base64: &str) -> String {
    let lines: Vec<_> = base64.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

/// An environment in which it is `time`, in words of libfaketime.
fn clock<'a>(library: &'a str, time: &'a str) -> [(&'static str, &'a str); 3] {
    [("LD_PRELOAD", library), ("FAKETIME", time), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")]
}

/// Of the roots in a status of the PKI.
fn active_and_prepared(status: &serde_json::Value) -> (Option<String>, Option<String>) {
    let of = |state: &str| {
        let mut all = status["authorities"].as_array()?.iter();
        all.find(|one| one["kind"] == "root" && one["state"] == state)?["id"].as_str().map(str::to_owned)
    };
    (of("active"), of("prepared"))
}

/// The user of units nobody enrolled.
pub const STRAY_UID: u32 = 2005;
