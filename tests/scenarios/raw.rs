//! Raw service addresses: captured for enrolled callers of services that ask for it, and never in the middle of a
//! connection.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::backend;
use meshd_tests::lab::Lab;
use meshd_tests::load::{LoadReport, report};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{self, Plan};
use meshd_tests::process::{Process, Program};
use meshd_tests::wait::until;
use nix::sys::signal::Signal;

use crate::DEADLINE;

pub(crate) const STABLE: &str = "10.96.3.7";
pub(crate) const STABLE6: &str = "fd00:96::7";
/// Where payments listens.
const PORT: u16 = 8080;
const POOL: usize = 3;

/// payments is permissive and known by raw addresses; web captures them.
fn start(enrolled: &[&str]) -> Result<Mesh> {
    let mut plan = Plan::shop();
    for serve in plan.hosts.iter_mut().flat_map(|host| &mut host.workloads).flat_map(|workload| &mut workload.serve) {
        serve.strict = false;
    }
    let lab = Arc::new(Lab::new(&plan.host_names())?);
    let mut mesh = Mesh::prepare(lab, plan)?;
    enrol(&mesh, enrolled)?;
    ask_for_raw(&mesh, &["api-1", "api-2"])?;
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.start_all()?;
    Ok(mesh)
}

/// Before web starts: has it capture payments' raw addresses.
pub(crate) fn ask_for_raw(mesh: &Mesh, hosts: &[&str]) -> Result<()> {
    let config = mesh.daemon("web").config();
    let text = fs::read_to_string(&config)?;
    fs::write(&config, text.replace("[capture]\n", "[capture]\nraw = [\"payments.shop\"]\n"))?;
    for unit in ["checkout", "billing", "stray"] {
        // A unit that runs already: a new one is known to the kernel's rules half a second later.
        mesh.host("web").run(&mesh.in_unit("web", unit, Program::new("true")))?.expect_success("true")?;
    }
    describe(mesh, hosts, &[STABLE, STABLE6])
}

/// The document of payments, as web sees it.
fn describe(mesh: &Mesh, hosts: &[&str], stable: &[&str]) -> Result<()> {
    let mut text = String::from(
        "apiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata: { name: payments, namespace: shop }\n\
         spec:\n  ports: [ { port: 80 } ]\n",
    );
    if !stable.is_empty() {
        writeln!(text, "  addresses: {stable:?}")?;
    }
    text += "  endpoints:\n";
    for host in hosts {
        writeln!(text, "    - {{ address: {}, targetPort: {PORT} }}", mesh.host(host).address())?;
    }
    mesh.daemon("web").resource("payments.yaml", &text)
}

fn enrol(mesh: &Mesh, names: &[&str]) -> Result<()> {
    let web = Plan::shop().hosts.into_iter().find(|host| host.name == "web").context("no web")?;
    let workloads: Vec<_> =
        web.workloads.into_iter().filter(|workload| names.contains(&workload.name.as_str())).collect();
    let by_unit = mesh.lab().has_units() && backend::can_tell_units();
    mesh.daemon("web").enrol(&plan::enrolment(&workloads, by_unit))
}

/// Enrols these on a running web.
fn enrol_now(mesh: &Mesh, names: &[&str]) -> Result<()> {
    let daemon = mesh.daemon("web");
    let reloads = || daemon.log().matches("enrolment reloaded").count();
    let before = reloads();
    enrol(mesh, names)?;
    daemon.signal(Signal::SIGHUP)?;
    until(DEADLINE, "the reload", || reloads() > before)
}

fn raw_url(mesh: &Mesh, host: &str) -> String {
    format!("http://{}:{PORT}/", mesh.host(host).address())
}

fn get(mesh: &Mesh, unit: &str, url: &str) -> Result<String> {
    let answer = mesh.curl("web", unit, &["--fail", "--max-time", "5", url])?;
    answer.expect_success(&format!("{unit} getting {url}"))
}

/// How many connections of a unit web has carried.
fn carried(mesh: &Mesh, unit: &str) -> usize {
    let id = mesh.spiffe_id(unit);
    let events = mesh.daemon("web").access_log();
    let by_it = events.iter().filter(|event| !event.is_inbound() && event.client_id.as_ref() == Some(&id));
    by_it.filter(|event| event.is_for("payments.shop")).count()
}

/// Whether the kernel on web has this in its rules about raw addresses.
fn captured(mesh: &Mesh, what: &str) -> bool {
    raw_rules(mesh).is_some_and(|rules| rules.contains(what))
}

fn raw_rules(mesh: &Mesh) -> Option<String> {
    let Some(variant) = backend::iptables() else {
        return mesh.host("web").command("nft", &["list", "table", "inet", "meshd_raw"]).ok();
    };
    let save = |program: &str| mesh.host("web").command(&format!("{program}-{variant}-save"), &["-t", "nat"]);
    let saved = save("iptables").ok()? + &save("ip6tables").ok()?;
    let rules: Vec<&str> = saved.lines().filter(|line| line.starts_with("-A MESHD_TAKE")).collect();
    (!rules.is_empty()).then(|| rules.join("\n"))
}

/// Kept-alive connections of checkout, asking all the time.
struct Pool<'a> {
    mesh: &'a Mesh,
    client: Process,
    target: String,
    opened: BTreeMap<String, u64>,
}

impl<'a> Pool<'a> {
    fn open(mesh: &'a Mesh, target: &str) -> Result<Self> {
        let (rate, connections) = ("200", POOL.to_string());
        let args = ["load", "--target", target, "--connections", &connections, "--rate", rate, "--size", "64"];
        let client = mesh.host("web").start_testkit(&mesh.testkit("web", "checkout", &args))?;
        let mut pool = Self { mesh, client, target: target.to_owned(), opened: BTreeMap::new() };
        until(DEADLINE, "the pool to open", || pool.sent().is_ok_and(|sent| sent.len() == POOL))?;
        pool.opened = pool.sent()?;
        pool.flows("when it had opened")?;
        Ok(pool)
    }

    /// Bytes acknowledged to the client, by the local address of the connection.
    fn sent(&self) -> Result<BTreeMap<String, u64>> {
        let filter = ["-tniOH", "state", "established", "dst", &self.target];
        let sockets = self.mesh.host("web").command("ss", &filter)?;
        let one = |line: &str| {
            let local = line.split_whitespace().nth(2)?.to_owned();
            let bytes = line.split_whitespace().find_map(|word| word.strip_prefix("bytes_acked:"))?.parse().ok()?;
            Some((local, bytes))
        };
        Ok(sockets.lines().filter_map(one).collect())
    }

    /// Every connection it opened with is still there, and more bytes get through.
    fn flows(&self, when: &str) -> Result<()> {
        let before = self.sent()?;
        until(DEADLINE, &format!("bytes on every connection of the pool {when}"), || {
            let now = self.sent().unwrap_or_default();
            self.opened.keys().all(|local| now.get(local) > before.get(local).or(Some(&0)))
        })
        .with_context(|| format!("opened {:?}, now {:?}", self.opened, self.sent()))
    }

    fn end(mut self) -> Result<LoadReport> {
        self.client.stop()?;
        report(&self.client.finish(DEADLINE)?)
    }
}

#[test]
fn enrolled_callers_of_a_raw_address_go_through_the_mesh_and_others_go_direct() -> Result<()> {
    let mesh = start(&["checkout"])?;
    let urls =
        [raw_url(&mesh, "api-1"), format!("http://{STABLE}/"), format!("http://[{STABLE6}]/"), raw_url(&mesh, "api-2")];
    for (number, url) in urls.iter().enumerate() {
        ensure!(get(&mesh, "checkout", url)?.starts_with("payments on api-"), "not payments at {url}");
        until(DEADLINE, &format!("{url} in the access log"), || carried(&mesh, "checkout") == number + 1)?;
    }
    let checkout = mesh.spiffe_id("checkout");
    let arrived = |host: &str| {
        let events = mesh.daemon(host).access_log();
        events.iter().filter(|event| event.is_inbound() && event.client_id.as_ref() == Some(&checkout)).count()
    };
    until(DEADLINE, "all of them, with checkout's identity", || arrived("api-1") + arrived("api-2") == urls.len())?;

    for stranger in ["stray", "billing"] {
        ensure!(get(&mesh, stranger, &urls[0])? == "payments on api-1\n", "{stranger} was not served direct");
    }
    let ledger = mesh.daemon("api-1").json("ledger")?;
    let port = ledger["ports"].as_array().into_iter().flatten().find(|row| row["port"] == PORT);
    ensure!(port.context("no ledger")?["plaintext_connections"] == 2, "{ledger}");
    ensure!(carried(&mesh, "stray") + carried(&mesh, "billing") == 0, "meshd carried a stranger");
    Ok(())
}

#[test]
fn a_pool_opened_before_enrolment_survives_enrol_endpoint_churn_and_revert() -> Result<()> {
    let mesh = start(&["billing"])?;
    let target = format!("{}:{PORT}", mesh.host("api-1").address());
    let pool = Pool::open(&mesh, &target)?;

    enrol_now(&mesh, &["billing", "checkout"])?;
    pool.flows("after enrolment")?;
    get(&mesh, "checkout", &raw_url(&mesh, "api-1"))?;
    until(DEADLINE, "a new connection through the mesh", || carried(&mesh, "checkout") == 1)?;

    describe(&mesh, &["api-2"], &[])?;
    until(DEADLINE, "api-1 to be no endpoint", || !captured(&mesh, &mesh.host("api-1").address().to_string()))?;
    pool.flows("after its endpoint was removed")?;
    describe(&mesh, &["api-1", "api-2"], &[])?;
    until(DEADLINE, "api-1 to be an endpoint", || captured(&mesh, &mesh.host("api-1").address().to_string()))?;
    pool.flows("after its endpoint was added")?;

    mesh.daemon("web").run(&["intercept", "revert"])?.expect_success("meshd intercept revert")?;
    pool.flows("after a revert")?;
    let report = pool.end()?;
    ensure!(report.failed == 0, "{report:?}");
    ensure!(carried(&mesh, "checkout") == 1, "a connection of the pool was captured");
    Ok(())
}

#[test]
fn a_captured_pool_survives_endpoint_churn_and_the_end_of_its_enrolment() -> Result<()> {
    let mesh = start(&["checkout", "billing"])?;
    let pool = Pool::open(&mesh, &format!("{STABLE}:80"))?;
    describe(&mesh, &["api-1", "api-2"], &[STABLE6])?;
    until(DEADLINE, "the stable address to be gone", || !captured(&mesh, STABLE))?;
    pool.flows("after its address was removed")?;
    enrol_now(&mesh, &["billing"])?;
    pool.flows("after its unit was unenrolled")?;
    enrol_now(&mesh, &[])?;
    pool.flows("after nobody was enrolled")?;
    let report = pool.end()?;
    ensure!(report.failed == 0, "{report:?}");
    until(DEADLINE, "the whole pool in the access log", || carried(&mesh, "checkout") == POOL)
}

#[test]
fn raw_addresses_go_direct_at_once_when_meshd_is_killed() -> Result<()> {
    let mesh = start(&["checkout"])?;
    get(&mesh, "checkout", &raw_url(&mesh, "api-1"))?;
    until(DEADLINE, "it in the access log", || carried(&mesh, "checkout") == 1)?;
    mesh.daemon("web").kill()?;
    if backend::iptables().is_none() {
        until(DEADLINE, "the raw table to be gone", || raw_rules(&mesh).is_none())?;
    } else {
        // Rules that nobody is left to remove, and that no daemon keeps alive.
        let direct = || get(&mesh, "checkout", &raw_url(&mesh, "api-1")).is_ok();
        until(DEADLINE, "raw addresses to go direct", direct)?;
        ensure!(captured(&mesh, &mesh.host("api-1").address().to_string()), "somebody removed the rules");
    }
    ensure!(get(&mesh, "checkout", &raw_url(&mesh, "api-1"))? == "payments on api-1\n", "not direct");
    ensure!(carried(&mesh, "checkout") == 1, "a dead meshd carried it");

    mesh.daemon("web").start()?;
    get(&mesh, "checkout", &raw_url(&mesh, "api-1"))?;
    until(DEADLINE, "the mesh to carry it again", || carried(&mesh, "checkout") == 2)?;
    mesh.daemon("web").stop()?;
    ensure!(raw_rules(&mesh).is_none(), "a stopped meshd left its raw table");
    get(&mesh, "checkout", &raw_url(&mesh, "api-1"))?;
    mesh.daemon("web").run(&["intercept", "revert"])?.expect_success("meshd intercept revert")?;
    let rules = mesh.host("web").command("ip", &["rule", "show"])?;
    ensure!(!rules.contains("fwmark"), "a revert left a rule of raw addresses:\n{rules}");
    Ok(())
}

#[test]
fn a_revert_tells_that_a_hung_meshd_still_captures_raw_addresses() -> Result<()> {
    let mesh = start(&["checkout"])?;
    let daemon = mesh.daemon("web");
    let pid = daemon.pid()?;
    daemon.stand_still()?;
    let told = daemon.run(&["bypass", "on"])?;
    ensure!(told.exit_code() == Some(1) && told.stderr.contains(&format!("kill -KILL {pid}")), "{told:?}");
    let told = daemon.run(&["intercept", "revert"])?;
    ensure!(told.exit_code() == Some(1) && told.stderr.contains(&format!("kill -KILL {pid}")), "{told:?}");
    ensure!(raw_rules(&mesh).is_some(), "nothing is held, so nothing is shown");
    daemon.kill()?;
    daemon.run(&["intercept", "revert"])?.expect_success("meshd intercept revert after it was killed")?;
    ensure!(raw_rules(&mesh).is_none(), "the raw table is still there");
    ensure!(get(&mesh, "checkout", &raw_url(&mesh, "api-1"))? == "payments on api-1\n", "not direct");
    Ok(())
}

#[test]
fn a_reload_that_waits_for_a_certificate_does_not_keep_meshd_from_stopping() -> Result<()> {
    let mut mesh = start(&["checkout"])?;
    mesh.stop_pki()?;
    enrol(&mesh, &["checkout", "billing"])?;
    let daemon = mesh.daemon("web");
    daemon.signal(Signal::SIGHUP)?;
    let enrolled = || daemon.json("status").is_ok_and(|status| status["enrolled"].to_string().contains("billing"));
    until(DEADLINE, "the reload under way", enrolled)?;
    daemon.stop()?;
    let log = daemon.log();
    ensure!(log.contains("meshd stopped") && !log.contains("enrolment reloaded"), "it waited for the reload:\n{log}");
    Ok(())
}
