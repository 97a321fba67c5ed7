//! Services and endpoints from a real etcd cluster: followed at once, and kept when etcd fails, empties or goes.

use std::fs;
use std::os::unix::fs::chown;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::authority::Authority;
use meshd_tests::daemon::UID;
use meshd_tests::etcd::Etcd;
use meshd_tests::lab::Lab;
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{self, Plan};
use meshd_tests::wait::until;
use nix::sys::signal::Signal;

use crate::DEADLINE;

const PAYMENTS: &str = "/meshd-discovery/v1/shop/payments";

/// A mesh whose web knows services from etcd alone, of which it has declared none.
pub(crate) struct Bed {
    pub(crate) mesh: Mesh,
    pub(crate) etcd: Etcd,
}

impl Bed {
    pub(crate) fn make() -> Result<Self> {
        let plan = Plan::shop();
        let lab = Arc::new(Lab::new(&["pki", "web", "api-1", "api-2", "store"])?);
        let mut mesh = Mesh::prepare(lab.clone(), plan)?;
        let etcd = Etcd::start_telling(&lab.host("store"), 3)?;
        let (cert, key) = etcd.add_user("reader", "/meshd-discovery/")?;
        for file in [&cert, &key, &etcd.authority()] {
            chown(file, Some(UID), Some(UID))?;
        }
        let endpoints = etcd.endpoints().iter().map(|url| format!("{url:?}")).collect::<Vec<_>>().join(", ");
        let source = format!(
            "\n[[source]]\nkind = \"etcd\"\nendpoints = [{endpoints}]\nauthority = [\"shop\"]\nca = {:?}\ncert = {cert:?}\n\
             key = {key:?}\n",
            etcd.authority()
        );
        let config = mesh.daemon("web").config();
        let text = fs::read_to_string(&config)?;
        fs::write(&config, without_sources(&text) + &source)?;
        let bed = Self { mesh, etcd };
        let service = bed.mesh_plan_document()?;
        bed.put("service", &service)?;
        bed.register("api-1")?;
        let Bed { mesh: started, etcd } = bed;
        mesh = started;
        mesh.start_pki()?;
        mesh.join_all()?;
        mesh.start_all()?;
        let bed = Self { mesh, etcd };
        bed.answers("api-1")?;
        Ok(bed)
    }

    fn mesh_plan_document(&self) -> Result<String> {
        let plan = Plan::shop();
        let payments = plan.services.iter().find(|service| service.name == "payments").context("no payments")?;
        Ok(plan::document(payments, &[]))
    }

    fn put(&self, key: &str, value: &str) -> Result<()> {
        self.change(&["put", &format!("{PAYMENTS}/{key}"), value])
    }

    pub(crate) fn register(&self, host: &str) -> Result<()> {
        let address = self.mesh.host(host).address();
        let registration = format!(r#"{{"address":"{address}","ports":[{{"port":80,"target":80}}]}}"#);
        self.put(&format!("endpoints/{host}"), &registration)
    }

    fn unregister(&self, host: &str) -> Result<()> {
        self.change(&["del", &format!("{PAYMENTS}/endpoints/{host}")])
    }

    /// Once more where a leader is being elected: what is written here may be written twice.
    pub(crate) fn change(&self, what: &[&str]) -> Result<()> {
        until(DEADLINE, "a write to etcd", || self.etcd.ctl("root", what).is_ok_and(|done| done.success()))
    }

    fn asks(&self) -> Result<String> {
        let asked = self.mesh.curl("web", "checkout", &["-sS", "--max-time", "5", "http://payments.shop.mesh/"])?;
        asked.expect_success("a request")
    }

    /// Waits until that host answers.
    pub(crate) fn answers(&self, host: &str) -> Result<()> {
        until(DEADLINE, &format!("an answer of {host}"), || self.asks().is_ok_and(|body| body.contains(host)))
    }

    fn endpoints(&self) -> Result<Vec<(String, String)>> {
        let rows = self.mesh.daemon("web").json("endpoints")?;
        let rows = rows.as_array().context("no rows")?.iter();
        let shown = |row: &serde_json::Value| {
            let ip = row["dial"].as_str().unwrap_or_default().split(':').next().unwrap_or_default().to_owned();
            (ip, if row["stale"] == true { "stale".to_owned() } else { "believed".to_owned() })
        };
        Ok(rows.map(shown).collect())
    }

    fn is_checked(&self, message: &str) -> Result<()> {
        let check = self.mesh.daemon("web").run(&["check"])?;
        ensure!(check.stdout.contains(message), "{}", check.stdout);
        Ok(())
    }

    fn names(&self, message: &str) -> Result<()> {
        until(DEADLINE, message, || self.errors().is_ok_and(|errors| errors.contains(message)))
            .with_context(|| format!("{:?}", self.errors()))
    }

    fn is_well(&self) -> Result<()> {
        until(DEADLINE, "etcd is followed again", || self.errors().is_ok_and(|errors| errors == "[]"))
            .with_context(|| format!("{:?}", self.errors()))
    }

    fn errors(&self) -> Result<String> {
        let status = self.mesh.daemon("web").json("status")?;
        Ok(status["sources"][0]["errors"].to_string())
    }
}

/// A meshd.toml up to its first `[[source]]`, of which the harness writes the last sections.
fn without_sources(text: &str) -> String {
    text.split("[[source]]").next().unwrap_or_default().to_owned()
}

#[test]
fn every_endpoint_is_replaced_under_load_and_a_member_dies_and_nobody_notices() -> Result<()> {
    let mut bed = Bed::make()?;
    let load = Load::start_with(&bed.mesh, 4, &["--rate", "100"])?;
    for round in 0..4 {
        let (new, old) = if round % 2 == 0 { ("api-2", "api-1") } else { ("api-1", "api-2") };
        bed.register(new)?;
        load.reaches(new, 10)?;
        bed.unregister(old)?;
        until(DEADLINE, &format!("only {new} is known"), || bed.endpoints().is_ok_and(|rows| rows.len() == 1))?;
        load.reaches(new, 10)?;
        if round == 1 {
            bed.etcd.kill_member(0)?;
        }
    }
    let report = load.end()?;
    ensure!(report.failed == 0 && report.ok > 40, "{report:?}");
    Ok(())
}

#[test]
fn an_etcd_that_comes_back_empty_takes_nothing_away_and_an_operator_may_say_otherwise() -> Result<()> {
    let mut bed = Bed::make()?;
    bed.register("api-2")?;
    bed.answers("api-2")?;
    let load = Load::start_with(&bed.mesh, 2, &["--rate", "50"])?;
    bed.etcd.restart_empty()?;
    // A new cluster has new users: until then it is trouble, named.
    until(DEADLINE, "the loss is doubted or refused", || {
        bed.endpoints().is_ok_and(|rows| rows.len() == 2) && bed.errors().is_ok_and(|errors| errors != "[]")
    })?;
    bed.etcd.add_user("reader", "/meshd-discovery/")?;
    until(DEADLINE, "the loss is seen, and doubted", || {
        bed.endpoints().is_ok_and(|rows| rows.len() == 2 && rows.iter().all(|(_, state)| state == "stale"))
    })?;
    load.reaches("api-1", 5)?;
    let report = load.end()?;
    ensure!(report.failed == 0, "{report:?}");
    bed.mesh.daemon("web").run(&["endpoints", "--accept", "etcd"])?.expect_success("the loss is accepted")?;
    ensure!(bed.endpoints()?.is_empty(), "{:?}", bed.endpoints());
    Ok(())
}

#[test]
fn an_etcd_that_is_restarted_with_what_it_had_takes_nothing_away_and_is_followed_on() -> Result<()> {
    let mut bed = Bed::make()?;
    bed.register("api-2")?;
    bed.answers("api-2")?;
    let load = Load::start_with(&bed.mesh, 2, &["--rate", "50"])?;
    // One after the other, as for an upgrade; then all of them, as after a power cut.
    for members in [0..1, 1..2, 2..3, 0..3] {
        for member in members.clone() {
            bed.etcd.kill_member(member)?;
        }
        for member in members {
            bed.etcd.start_member(member)?;
        }
        bed.unregister("api-2")?;
        until(DEADLINE, "a removal is known", || bed.endpoints().is_ok_and(|rows| rows.len() == 1))?;
        bed.register("api-2")?;
        until(DEADLINE, "a registration is known", || bed.endpoints().is_ok_and(|rows| rows.len() == 2))?;
        until(DEADLINE, "all is well", || bed.errors().is_ok_and(|errors| errors == "[]"))?;
        let rows = bed.endpoints()?;
        ensure!(rows.iter().all(|(_, state)| state == "believed"), "{rows:?}");
        load.reaches("api-1", 5)?;
    }
    let report = load.end()?;
    ensure!(report.failed == 0, "{report:?}");
    Ok(())
}

#[test]
fn a_host_that_restarts_while_etcd_is_away_serves_from_what_it_knew() -> Result<()> {
    let mut bed = Bed::make()?;
    let saved = bed.mesh.daemon("web").config().with_file_name("").join("../state/directory/etcd.json");
    until(DEADLINE, "what is known is on disk", || {
        fs::read_to_string(&saved).is_ok_and(|text| text.contains(&bed.mesh.host("api-1").address().to_string()))
    })?;
    for member in 0..3 {
        bed.etcd.kill_member(member)?;
    }
    bed.mesh.daemon("web").restart()?;
    bed.answers("api-1")?;
    bed.names("no etcd member can be reached")?;
    for member in 0..3 {
        bed.etcd.start_member(member)?;
    }
    bed.is_well()?;
    bed.register("api-2")?;
    bed.answers("api-2")
}

#[test]
fn a_member_that_stands_still_is_left_and_changes_arrive_by_another() -> Result<()> {
    let bed = Bed::make()?;
    for member in 0..2 {
        bed.etcd.signal(member, Signal::SIGSTOP)?;
        until(DEADLINE, "a write", || bed.register("api-2").is_ok())?;
        bed.answers("api-2")?;
        until(DEADLINE, "a removal", || bed.unregister("api-2").is_ok())?;
        until(DEADLINE, "the removal is known", || bed.endpoints().is_ok_and(|rows| rows.len() == 1))?;
        bed.etcd.signal(member, Signal::SIGCONT)?;
    }
    Ok(())
}

#[test]
fn garbage_is_named_by_its_key_and_what_the_key_said_before_stays() -> Result<()> {
    let bed = Bed::make()?;
    bed.put("endpoints/api-1", "{\"address\": 7}")?;
    bed.put("service", "kind: [")?;
    until(DEADLINE, "both are named", || {
        bed.errors().is_ok_and(|errors| {
            errors.contains("payments/endpoints/api-1: is no registration") && errors.contains("payments/service: line")
        })
    })?;
    bed.answers("api-1")?;
    bed.is_checked("is no registration")?;
    let unknown = bed.mesh.daemon("web").run(&["endpoints", "--source", "consul"])?;
    ensure!(!unknown.success() && unknown.stderr.contains("no source `consul`; there are: etcd"), "{unknown:?}");
    Ok(())
}

#[test]
fn an_etcd_that_stands_still_or_is_cut_off_is_named_and_what_happened_meanwhile_arrives() -> Result<()> {
    let bed = Bed::make()?;
    for member in 0..3 {
        bed.etcd.signal(member, Signal::SIGSTOP)?;
    }
    bed.names("did not answer within")?;
    bed.answers("api-1")?;
    for member in 0..3 {
        bed.etcd.signal(member, Signal::SIGCONT)?;
    }
    bed.is_well()?;
    let cut = bed.mesh.host("web").black_hole(bed.mesh.lab().host("store").address())?;
    bed.names("etcd")?;
    bed.register("api-2")?;
    bed.unregister("api-1")?;
    bed.answers("api-1")?;
    drop(cut);
    bed.is_well()?;
    bed.answers("api-2")
}

#[test]
fn what_the_users_role_lacks_and_what_tls_refuses_is_named_by_check_and_the_mesh_goes_on() -> Result<()> {
    let bed = Bed::make()?;
    bed.change(&["role", "revoke-permission", "reader", "--prefix=true", "/meshd-discovery/"])?;
    bed.names("grant-permission")?;
    bed.is_checked("grant-permission")?;
    bed.answers("api-1")?;
    bed.change(&["role", "grant-permission", "reader", "readwrite", "--prefix=true", "/meshd-discovery/"])?;
    bed.is_well()?;
    bed.register("api-2")?;
    bed.answers("api-2")?;
    let web = bed.mesh.host("web");
    let strange = Authority::create(&web, &web.directory().join("strange"))?.certificate();
    chown(&strange, Some(UID), Some(UID))?;
    let config = bed.mesh.daemon("web").config();
    let text = fs::read_to_string(&config)?;
    let (ours, theirs) = (format!("{:?}", bed.etcd.authority()), format!("{strange:?}"));
    fs::write(&config, text.replace(&ours, &theirs))?;
    bed.mesh.daemon("web").restart()?;
    bed.names("invalid peer certificate")?;
    bed.is_checked("invalid peer certificate")?;
    bed.answers("api-1")
}
