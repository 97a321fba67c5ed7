//! A whole mesh on machines: the PKI on a plain host, everything else as units of real systemds.

use std::sync::Arc;

use anyhow::Result;

use super::{Key, Machine, MachineDaemon, ssh, units};
use crate::backend;
use crate::host::Host;
use crate::lab::Lab;
use crate::mesh::Mesh;
use crate::plan::{self, HostPlan, Plan, Workload};
use crate::process::{Finished, Process, Program};

// Fields drop in order: machines first, the lab they run in last.
pub struct MachineMesh {
    machines: Vec<Machine>,
    key: Key,
    mesh: Mesh,
    plan: Plan,
}

impl MachineMesh {
    /// Every host of the plan as a machine, everything joined and ready, every program serving as its unit.
    pub fn start(plan: Plan) -> Result<Self> {
        let mesh = Self::prepare(plan, &backend::chosen())?;
        mesh.start_daemons()?;
        Ok(mesh)
    }

    /// Every meshd, now and at each boot; returns when all are ready.
    pub fn start_daemons(&self) -> Result<()> {
        self.machines.iter().try_for_each(|machine| machine.daemon().enable())?;
        self.machines.iter().try_for_each(|machine| machine.daemon().wait_ready())
    }

    /// Everything but meshd itself runs; it will capture by `backend`.
    pub fn prepare(plan: Plan, backend: &str) -> Result<Self> {
        let lab = Arc::new(Lab::new(&plan.host_names())?);
        let key = Key::generate(&lab)?;
        let machines = boot_all(&lab, &plan, &key)?;
        let mut mesh = Mesh::prepare(lab, plan.clone())?;
        mesh.start_pki()?;
        let mesh = Self { machines, key, mesh, plan };
        for machine in &mesh.machines {
            mesh.set_up(machine, backend)?;
        }
        Ok(mesh)
    }

    pub fn machine(&self, name: &str) -> &Machine {
        let found = self.machines.iter().find(|machine| machine.name() == name);
        found.unwrap_or_else(|| panic!("no machine {name}"))
    }

    pub fn machine_mut(&mut self, name: &str) -> &mut Machine {
        let found = self.machines.iter_mut().find(|machine| machine.name() == name);
        found.unwrap_or_else(|| panic!("no machine {name}"))
    }

    pub fn daemon(&self, machine: &str) -> MachineDaemon<'_> {
        self.machine(machine).daemon()
    }

    pub fn stop_pki(&mut self) -> Result<()> {
        self.mesh.stop_pki()
    }

    pub fn spiffe_id(&self, name: &str) -> String {
        self.mesh.spiffe_id(name)
    }

    /// `curl` as a transient unit of the plan, with its user; a name the plan does not know is an un-enrolled unit.
    pub fn curl(&self, machine: &str, name: &str, args: &[&str]) -> Result<Finished> {
        let curl = Program::new("curl").args(["--silent", "--show-error", "--max-time", "20"]).args(args);
        self.machine(machine).run(&self.mesh.in_unit(machine, name, curl))
    }

    /// `testkit`, likewise.
    pub fn testkit(&self, machine: &str, name: &str, args: &[&str]) -> Program {
        self.mesh.in_unit(machine, name, Program::new("/usr/bin/testkit").args(args))
    }

    /// A plain host beside the machines, without meshd.
    pub fn administrator(&self) -> Host {
        self.mesh.host(&self.plan.pki_host)
    }

    /// Starts a remote command as an administrator on another host does it.
    pub fn ssh(&self, machine: &str, command: &str) -> Result<Process> {
        let server = self.machine(machine).host();
        self.administrator().spawn(&ssh(&self.key, server.address(), command))
    }

    fn set_up(&self, machine: &Machine, backend: &str) -> Result<()> {
        let Some(host) = self.plan.hosts.iter().find(|host| host.name == machine.name()) else { return Ok(()) };
        let daemon = machine.daemon();
        daemon.install(self.plan.threads, backend)?;
        daemon.enrol(&plan::enrolment(&host.workloads, true))?;
        for service in &self.plan.services {
            let document = plan::document(service, &self.mesh.endpoints(service));
            daemon.resource(&format!("{}.yaml", service.name), &document)?;
        }
        daemon.join(&self.mesh.token(host)?)?;
        host.workloads.iter().try_for_each(|workload| start_app(machine, workload))
    }
}

fn boot_all(lab: &Lab, plan: &Plan, key: &Key) -> Result<Vec<Machine>> {
    let start = |host: &HostPlan| {
        if plan.ipv6_only {
            lab.host(&host.name).command("ip", &["-4", "address", "flush", "dev", "eth0"])?;
        }
        let users = units::users(&host.workloads);
        let seed = [("/root/.ssh/authorized_keys", key.public.as_str()), ("/etc/sysusers.d/workloads.conf", &users)];
        Machine::start(lab, &host.name, &seed)
    };
    let mut machines = plan.hosts.iter().map(start).collect::<Result<Vec<_>>>()?;
    machines.iter_mut().try_for_each(Machine::wait_booted)?;
    Ok(machines)
}

fn start_app(machine: &Machine, workload: &Workload) -> Result<()> {
    let Some(app) = workload.app else { return Ok(()) };
    let arguments = app.arguments(&format!("{}-on-{}", workload.name, machine.name())).join(" ");
    let user = format!("User={}", workload.name);
    let command = format!("/usr/bin/testkit {arguments}");
    machine.install_unit(&workload.unit(), &units::service(&command, &[&user]))?;
    machine.systemctl(&["enable", "--now", &workload.unit()]).map(drop)
}
