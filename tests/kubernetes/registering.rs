//! What scenarios of registration share: a mesh that knows services from one store alone, where its servers register. What
//! is to be so in every backend is a scenario here.

use std::fs;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::fault::Fault;
use meshd_tests::lab::Lab;
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{self, Plan};
use meshd_tests::wait::until;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::DEADLINE;

/// Of payments, without endpoints.
pub(crate) fn document() -> Result<String> {
    let plan = Plan::shop();
    let payments = plan.services.iter().find(|service| service.name == "payments").context("no payments")?;
    Ok(plan::document(payments, &[]))
}

/// With a host for the backend.
pub(crate) fn prepare() -> Result<(Arc<Lab>, Mesh)> {
    let lab = Arc::new(Lab::new(&["pki", "web", "api-1", "api-2", "store"])?);
    let mesh = Mesh::prepare(lab.clone(), Plan::shop())?;
    Ok((lab, mesh))
}

pub(crate) trait Registering {
    fn mesh(&self) -> &Mesh;
    fn mesh_mut(&mut self) -> &mut Mesh;

    /// Waits until payments is there on that host, once, at its own address and healthy.
    fn is_registered(&self, host: &str) -> Result<()>;

    /// Waits until a host that left has nothing there any more.
    fn is_gone(&self, host: &str) -> Result<()>;

    /// Writes what a copy of api-1's machine would, of that epoch and with the address of api-2.
    fn write_copy(&self, epoch: u64) -> Result<()>;

    /// Of what is there of a host, if that is one thing.
    fn epoch(&self, host: &str) -> Result<u64>;

    /// Once its hosts are configured.
    fn start(mut self) -> Result<Self>
    where
        Self: Sized,
    {
        self.mesh_mut().start_pki()?;
        self.mesh().join_all()?;
        self.mesh_mut().start_all()?;
        for host in ["api-1", "api-2"] {
            self.is_registered(host)?;
            self.answers(host)?;
        }
        Ok(self)
    }

    fn hosts_stop_one_after_the_other_under_load(&self) -> Result<()> {
        let load = Load::start_with(self.mesh(), 4, &["--rate", "100"])?;
        for (stopped, other) in [("api-1", "api-2"), ("api-2", "api-1")] {
            load.reaches(stopped, 5)?;
            self.mesh().daemon(stopped).stop()?;
            self.is_gone(stopped)?;
            load.reaches(other, 10)?;
            self.mesh().daemon(stopped).start()?;
            self.is_registered(stopped)?;
        }
        let report = load.end()?;
        ensure!(report.failed == 0 && report.ok > 40, "{report:?}");
        Ok(())
    }

    fn an_old_owner_goes_on_and_leaves_the_later_one_alone(&self) -> Result<()> {
        let (daemon, later) = (self.mesh().daemon("api-1"), u64::MAX / 4);
        daemon.stand_still()?;
        self.is_used_by_web("api-1", false)?;
        self.write_copy(later)?;
        daemon.signal(Signal::SIGCONT)?;
        self.comes_to("api-1", "superseded")?;
        self.checks("api-1", "another meshd registered it later")?;
        until(DEADLINE, "the later one alone", || self.epoch("api-1").is_ok_and(|epoch| epoch == later))?;
        // Nor does it take it away when it ends.
        daemon.stop()?;
        ensure!(self.epoch("api-1")? == later);
        // A daemon that is started is a new life, and later than all before.
        daemon.start()?;
        self.is_registered("api-1")?;
        ensure!(self.epoch("api-1")? > later);
        Ok(())
    }

    fn a_host_without_its_program_gets_no_calls(&self) -> Result<()> {
        self.has_program("api-1", false)?;
        self.is_used_by_web("api-1", false)?;
        self.comes_to("api-1", "held")?;
        for _ in 0..10 {
            ensure!(self.asks()?.contains("api-2"));
        }
        self.has_program("api-1", true)?;
        self.is_registered("api-1")?;
        self.answers("api-1")
    }

    /// What an emptied backend comes to.
    fn all_are_there_again(&self, load: Load<'_>) -> Result<()> {
        for host in ["api-1", "api-2"] {
            self.is_registered(host)?;
            self.comes_to(host, "held")?;
            self.is_used_by_web(host, true)?;
            load.reaches(host, 5)?;
        }
        let report = load.end()?;
        ensure!(report.failed == 0, "{report:?}");
        Ok(())
    }

    /// Replaces the sources of a host's configuration, and has its programs checked.
    fn configure(&self, host: &str, source: &str) -> Result<()> {
        self.configure_with(host, source, "")
    }

    /// `more` of `[host]`.
    fn configure_with(&self, host: &str, source: &str, more: &str) -> Result<()> {
        let daemon = self.mesh().daemon(host);
        let text = fs::read_to_string(daemon.config())?;
        // The last sections of a file the harness wrote.
        let begins = text.split("[[source]]").next().unwrap_or_default();
        let register = host != "web";
        let source = format!("[[source]]\n{source}register = {register}\n[host]\nzone = \"rack-1\"\n{more}");
        fs::write(daemon.config(), format!("imports = [\"payments.shop\"]\n{begins}\n{source}"))?;
        let enrolment = fs::read_to_string(daemon.etc("enrol.d/harness.toml"))?;
        let checked = "  port = 80\n  check = { http = \"/healthz\", every_s = 1 }\n  version = \"7\"\n";
        daemon.enrol(&enrolment.replace("  port = 80\n", checked))
    }

    /// What `meshd status` says of payments' registration on a host.
    fn row(&self, host: &str) -> Result<Value> {
        let status = self.mesh().daemon(host).json("status")?;
        let rows = status["registrations"].as_array().context("no registrations")?;
        rows.iter().find(|row| row["service"] == "payments.shop").cloned().context("payments is not registered")
    }

    fn phase(&self, host: &str) -> Result<String> {
        Ok(self.row(host)?["phase"].as_str().unwrap_or_default().to_owned())
    }

    fn comes_to(&self, host: &str, phase: &str) -> Result<()> {
        until(DEADLINE, &format!("{host} to be {phase}"), || self.phase(host).is_ok_and(|it| it == phase))
            .with_context(|| format!("{:?}\n{}", self.row(host), self.mesh().daemon(host).log()))
    }

    fn asks(&self) -> Result<String> {
        let asked = self.mesh().curl("web", "checkout", &["-sS", "--max-time", "5", "http://payments.shop.mesh/"])?;
        asked.expect_success("a request")
    }

    fn answers(&self, host: &str) -> Result<()> {
        until(DEADLINE, &format!("an answer of {host}"), || self.asks().is_ok_and(|body| body.contains(host)))
            .with_context(|| format!("{:?}", self.known()))
    }

    /// Where web would send requests for payments.
    fn known(&self) -> Result<Vec<Value>> {
        let rows = self.mesh().daemon("web").json("endpoints")?;
        let rows = rows.as_array().context("no rows")?.clone();
        Ok(rows.into_iter().filter(|row| row["service"] == "payments.shop").collect())
    }

    /// Web has a healthy place of payments at that host.
    fn is_used(&self, host: &str) -> bool {
        let address = self.mesh().host(host).address().to_string();
        let is_it = |row: &Value| row["dial"].as_str().is_some_and(|dial| dial.starts_with(&address));
        self.known().is_ok_and(|rows| rows.iter().any(|row| is_it(row) && row["healthy"] == true))
    }

    fn is_used_by_web(&self, host: &str, used: bool) -> Result<()> {
        let what = format!("web to know that {host} is {}there", if used { "" } else { "not " });
        // A web that does not answer says nothing.
        until(DEADLINE, &what, || self.known().is_ok() && self.is_used(host) == used)
            .with_context(|| format!("{:?}", self.known()))
    }

    /// Its program is where the registration says, or not any more.
    fn has_program(&self, host: &str, has: bool) -> Result<()> {
        let daemon = self.mesh().daemon(host);
        let (here, gone) = ("127.0.0.1:8080", "127.0.0.1:8099");
        let text = fs::read_to_string(daemon.etc("enrol.d/harness.toml"))?;
        daemon.enrol(&if has { text.replace(gone, here) } else { text.replace(here, gone) })?;
        daemon.signal(Signal::SIGHUP)
    }

    /// As a machine that lost its power, until the fault ends.
    fn dies(&self, host: &str) -> Result<Fault> {
        self.mesh().daemon(host).kill()?;
        self.mesh().host(host).link_down()
    }

    fn checks(&self, host: &str, trouble: &str) -> Result<()> {
        let said = || self.mesh().daemon(host).run(&["check"]).map(|check| check.stdout);
        until(DEADLINE, &format!("`{trouble}` in meshd check"), || said().is_ok_and(|text| text.contains(trouble)))
            .with_context(|| said().unwrap_or_default())
    }
}
