//! What scenarios of registration share: a mesh that knows services from one store alone, where its servers register.

use std::fs;

use anyhow::{Context, Result};
use meshd_tests::fault::Fault;
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

pub(crate) trait Registering {
    fn mesh(&self) -> &Mesh;

    /// Replaces the sources of a host's configuration, and has its programs checked.
    fn configure(&self, host: &str, source: &str) -> Result<()> {
        let daemon = self.mesh().daemon(host);
        let text = fs::read_to_string(daemon.config())?;
        // The last sections of a file the harness wrote.
        let begins = text.split("[[source]]").next().unwrap_or_default();
        let source = format!("{begins}\n[[source]]\n{source}register = {}\n[host]\nzone = \"rack-1\"\n", host != "web");
        fs::write(daemon.config(), source)?;
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
