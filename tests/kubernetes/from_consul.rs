//! Services and endpoints from a real Consul: followed at once, and kept when Consul fails, empties, hides or goes.

use std::fs;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::authority::Authority;
use meshd_tests::consul::Consul;
use meshd_tests::daemon::UID;
use meshd_tests::lab::Lab;
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{self, Plan};
use meshd_tests::wait::until;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::DEADLINE;

const READER: &str = "service_prefix \"\" { policy = \"read\" } node_prefix \"\" { policy = \"read\" } \
                      key_prefix \"meshd-discovery/v1/\" { policy = \"read\" }";
const DOCUMENT: &str = "/v1/kv/meshd-discovery/v1/shop/payments/service";

/// A mesh whose web knows services from Consul alone.
struct Bed {
    mesh: Mesh,
    consul: Consul,
    token_file: PathBuf,
}

impl Bed {
    fn make() -> Result<Self> {
        Self::make_with("imports = [\"payments.shop\"]\n")
    }

    /// `more` of the top of web's meshd.toml.
    fn make_with(more: &str) -> Result<Self> {
        let lab = Arc::new(Lab::new(&["pki", "web", "api-1", "api-2", "store"])?);
        let mesh = Mesh::prepare(lab.clone(), Plan::shop())?;
        let consul = Consul::start(&lab.host("store"))?;
        let token_file = lab.host("store").directory().join("consul.token");
        let mut bed = Self { mesh, consul, token_file };
        bed.give_token(&bed.consul.token("reader", READER)?)?;
        bed.configure(more, &bed.consul.authority())?;
        bed.document(&bed.plan_document()?)?;
        bed.register("api-1")?;
        bed.mesh.start_pki()?;
        bed.mesh.join_all()?;
        bed.mesh.start_all()?;
        bed.answers("api-1")?;
        Ok(bed)
    }

    fn configure(&self, more: &str, authority: &PathBuf) -> Result<()> {
        chown(authority, Some(UID), Some(UID))?;
        let source = format!(
            "\n[[source]]\nkind = \"consul\"\naddress = {:?}\nca = {authority:?}\ntoken_file = {:?}\nnamespace = \"shop\"\n\
             authority = [\"shop\"]\n",
            self.consul.url(),
            self.token_file
        );
        let config = self.mesh.daemon("web").config();
        let text = fs::read_to_string(&config)?;
        let text = text.split("[[source]]").next().unwrap_or_default();
        Ok(fs::write(&config, format!("{more}{text}{source}"))?)
    }

    fn give_token(&self, token: &str) -> Result<()> {
        let new = self.token_file.with_extension("new");
        fs::write(&new, token)?;
        chown(&new, Some(UID), Some(UID))?;
        Ok(fs::rename(new, &self.token_file)?)
    }

    fn plan_document(&self) -> Result<String> {
        let plan = Plan::shop();
        let payments = plan.services.iter().find(|service| service.name == "payments").context("no payments")?;
        Ok(plan::document(payments, &[]))
    }

    fn document(&self, text: &str) -> Result<()> {
        self.consul.put_key(DOCUMENT, text)
    }

    fn register(&self, host: &str) -> Result<()> {
        self.register_with(host, &json!({ "meshd-transport": "meshd" }), "passing")
    }

    fn register_with(&self, host: &str, meta: &Value, status: &str) -> Result<()> {
        let address = self.mesh.host(host).address().to_string();
        let node = json!({
            "Node": host, "Address": address,
            "Service": { "Service": "payments", "Port": 80, "Meta": meta },
            "Check": { "Name": "alive", "Status": status, "ServiceID": "payments" },
        });
        self.consul.manage("PUT", "/v1/catalog/register", Some(&node)).map(drop)
    }

    fn unregister(&self, host: &str) -> Result<()> {
        self.consul.manage("PUT", "/v1/catalog/deregister", Some(&json!({ "Node": host }))).map(drop)
    }

    fn asks(&self) -> Result<String> {
        let asked = self.mesh.curl("web", "checkout", &["-sS", "--max-time", "5", "http://payments.shop.mesh/"])?;
        asked.expect_success("a request")
    }

    /// Waits until that host answers.
    fn answers(&self, host: &str) -> Result<()> {
        until(DEADLINE, &format!("an answer of {host}"), || self.asks().is_ok_and(|body| body.contains(host)))
    }

    /// Of each endpoint by the host's name whether it is believed, and well.
    fn endpoints(&self) -> Result<Vec<(String, &'static str)>> {
        let rows = self.mesh.daemon("web").json("endpoints")?;
        let rows = rows.as_array().context("no rows")?.iter();
        let host = |ip: &str| ["api-1", "api-2"].iter().find(|host| self.mesh.host(host).address().to_string() == ip);
        let shown = |row: &Value| {
            let ip = row["dial"].as_str().unwrap_or_default().split(':').next().unwrap_or_default();
            let state = match (row["stale"] == true, row["healthy"] == true) {
                (true, _) => "stale",
                (false, healthy) => {
                    if healthy {
                        "healthy"
                    } else {
                        "unhealthy"
                    }
                }
            };
            (host(ip).map_or(ip, |host| host).to_owned(), state)
        };
        let mut shown: Vec<_> = rows.map(shown).collect();
        shown.sort();
        Ok(shown)
    }

    fn has(&self, expected: &[(&str, &str)]) -> bool {
        let same = |rows: Vec<(String, &str)>| {
            rows.len() == expected.len()
                && rows.iter().zip(expected).all(|((host, state), is)| (&**host, *state) == *is)
        };
        self.endpoints().is_ok_and(same)
    }

    fn waits_for(&self, what: &str, expected: &[(&str, &str)]) -> Result<()> {
        until(DEADLINE, what, || self.has(expected))
            .with_context(|| format!("{:?}, {:?}", self.endpoints(), self.errors()))
    }

    fn errors(&self) -> Result<String> {
        let status = self.mesh.daemon("web").json("status")?;
        Ok(status["sources"][0]["errors"].to_string())
    }

    fn waits_for_error(&self, error: &str) -> Result<()> {
        until(DEADLINE, error, || self.errors().is_ok_and(|errors| errors.contains(error)))
            .with_context(|| format!("{:?}", self.errors()))
    }

    fn waits_for_peace(&self) -> Result<()> {
        until(DEADLINE, "Consul is followed", || self.errors().is_ok_and(|errors| errors == "[]"))
            .with_context(|| format!("{:?}", self.errors()))
    }

    fn check_says(&self, expected: &str) -> Result<()> {
        let check = self.mesh.daemon("web").run(&["check"])?;
        ensure!(check.stdout.contains(expected), "{}", check.stdout);
        Ok(())
    }
}

#[test]
fn every_endpoint_is_replaced_under_load_and_nobody_notices() -> Result<()> {
    let bed = Bed::make()?;
    let load = Load::start_with(&bed.mesh, 4, &["--rate", "100"])?;
    for round in 0..4 {
        let (new, old) = if round % 2 == 0 { ("api-2", "api-1") } else { ("api-1", "api-2") };
        bed.register(new)?;
        load.reaches(new, 10)?;
        bed.unregister(old)?;
        bed.waits_for("the old one is gone", &[(new, "healthy")])?;
        load.reaches(new, 10)?;
    }
    let report = load.end()?;
    ensure!(report.failed == 0 && report.ok > 40, "{report:?}");
    Ok(())
}

#[test]
fn by_tls_all_questions_of_a_host_share_a_connection() -> Result<()> {
    let bed = Bed::make_with("imports = [\"*\"]\n")?;
    for service in 0..20 {
        let node =
            json!({ "Node": "elsewhere", "Address": "10.9.9.9", "Service": { "Service": format!("s{service}") } });
        bed.consul.manage("PUT", "/v1/catalog/register", Some(&node))?;
    }
    bed.register("api-2")?;
    bed.waits_for("both", &[("api-1", "healthy"), ("api-2", "healthy")])?;
    let open = bed.mesh.host("web").command("ss", &["-Htn", "state", "established", "dport", "=", ":8501"])?;
    ensure!(open.lines().count() == 1, "{open}");
    Ok(())
}

#[test]
fn a_critical_check_takes_the_traffic_away_and_back() -> Result<()> {
    let bed = Bed::make_with("imports = [\"*\"]\n")?;
    bed.register("api-2")?;
    bed.waits_for("both", &[("api-1", "healthy"), ("api-2", "healthy")])?;
    bed.register_with("api-1", &json!({ "meshd-transport": "meshd" }), "critical")?;
    bed.waits_for("one is unhealthy", &[("api-1", "unhealthy"), ("api-2", "healthy")])?;
    for _ in 0..20 {
        ensure!(bed.asks()?.contains("api-2"), "an unhealthy endpoint was asked");
    }
    bed.register("api-1")?;
    bed.waits_for("both again", &[("api-1", "healthy"), ("api-2", "healthy")])?;
    bed.answers("api-1")
}

#[test]
fn a_consul_that_comes_back_empty_takes_nothing_away_and_an_operator_may_say_otherwise() -> Result<()> {
    let mut bed = Bed::make()?;
    bed.register("api-2")?;
    bed.waits_for("both", &[("api-1", "healthy"), ("api-2", "healthy")])?;
    let load = Load::start_with(&bed.mesh, 2, &["--rate", "50"])?;
    bed.consul.restart_empty()?;
    bed.waits_for_error("refuses the token")?;
    ensure!(bed.has(&[("api-1", "healthy"), ("api-2", "healthy")]), "{:?}", bed.endpoints());
    // One that may see everything there is: nothing.
    bed.give_token(&bed.consul.token("reader", READER)?)?;
    bed.waits_for("the loss is seen, and doubted", &[("api-1", "stale"), ("api-2", "stale")])?;
    load.reaches("api-1", 5)?;
    let report = load.end()?;
    ensure!(report.failed == 0, "{report:?}");
    bed.mesh.daemon("web").run(&["endpoints", "--accept", "consul"])?.expect_success("the loss is accepted")?;
    ensure!(bed.endpoints()?.is_empty(), "{:?}", bed.endpoints());
    Ok(())
}

#[test]
fn a_token_that_loses_its_rights_is_trouble_by_the_rules_name_and_no_empty_catalog() -> Result<()> {
    let bed = Bed::make_with("imports = [\"*\"]\n")?;
    let load = Load::start_with(&bed.mesh, 2, &["--rate", "50"])?;
    bed.consul.set_rules("reader", "key_prefix \"\" { policy = \"read\" }")?;
    bed.register("api-2")?;
    bed.waits_for_error("service_prefix")?;
    bed.check_says("service_prefix")?;
    bed.consul.set_rules("reader", READER.split(" key_prefix").next().unwrap_or_default())?;
    bed.waits_for("both", &[("api-1", "healthy"), ("api-2", "healthy")])?;
    // Consul holds the rights for as long as a query on its store blocks: the next one shows them.
    let mut writes = 0..;
    until(DEADLINE, "what is hidden of the store", || {
        let comment = format!("# {:?}\n", writes.next());
        let written = bed.plan_document().and_then(|text| bed.document(&(text + &comment)));
        written.is_ok() && bed.errors().is_ok_and(|errors| errors.contains("key_prefix"))
    })?;
    bed.check_says("key_prefix")?;
    bed.consul.set_rules("reader", READER)?;
    bed.waits_for_peace()?;
    let report = load.end()?;
    ensure!(report.failed == 0, "{report:?}");
    Ok(())
}

#[test]
fn a_token_is_rotated_by_replacing_its_file_and_nobody_notices() -> Result<()> {
    let bed = Bed::make()?;
    let old = fs::read_to_string(&bed.token_file)?;
    bed.give_token(&bed.consul.token("next", READER)?)?;
    let (status, said) = bed.consul.call(Some(&old), "GET", "/v1/acl/token/self", None)?;
    ensure!(status == 200, "{status} {said}");
    let accessor: Value = serde_json::from_str(&said)?;
    let accessor = accessor["AccessorID"].as_str().context("no accessor")?;
    bed.consul.manage("DELETE", &format!("/v1/acl/token/{accessor}"), None)?;
    bed.register("api-2")?;
    bed.answers("api-2")?;
    bed.waits_for_peace()?;
    ensure!(!bed.mesh.daemon("web").log().contains("refuses the token"), "the change was noticed");
    Ok(())
}

#[test]
fn without_a_token_an_empty_catalog_is_not_believed_and_an_unknown_authority_is_named() -> Result<()> {
    let bed = Bed::make()?;
    let config = bed.mesh.daemon("web").config();
    let text = fs::read_to_string(&config)?;
    let tokenless: Vec<&str> = text.lines().filter(|line| !line.starts_with("token_file")).collect();
    fs::write(&config, tokenless.join("\n"))?;
    bed.mesh.daemon("web").restart()?;
    bed.waits_for_error("denies by default")?;
    bed.check_says("denies by default")?;
    bed.answers("api-1")?;
    let strange = Authority::create(&bed.mesh.host("web"), &bed.mesh.host("web").directory().join("strange"))?;
    bed.configure("", &strange.certificate())?;
    bed.mesh.daemon("web").restart()?;
    bed.waits_for_error("TLS: invalid peer certificate")?;
    bed.check_says("TLS: invalid peer certificate")?;
    bed.answers("api-1")
}

#[test]
fn a_host_that_restarts_while_consul_is_away_serves_from_what_it_knew() -> Result<()> {
    let mut bed = Bed::make()?;
    let saved = bed.mesh.daemon("web").config().with_file_name("").join("../state/directory/consul.json");
    until(DEADLINE, "what is known is on disk", || {
        fs::read_to_string(&saved).is_ok_and(|text| text.contains(&bed.mesh.host("api-1").address().to_string()))
    })?;
    bed.consul.kill()?;
    bed.mesh.daemon("web").restart()?;
    bed.answers("api-1")?;
    bed.waits_for_error("cannot be reached")?;
    bed.consul.resume()?;
    bed.waits_for_peace()?;
    bed.register("api-2")?;
    bed.answers("api-2")
}

#[test]
fn a_consul_that_is_restarted_with_what_it_had_takes_nothing_away_and_is_followed_on() -> Result<()> {
    let mut bed = Bed::make()?;
    let both = [("api-1", "healthy"), ("api-2", "healthy")];
    bed.register("api-2")?;
    bed.waits_for("both", &both)?;
    let load = Load::start_with(&bed.mesh, 2, &["--rate", "50"])?;
    for _ in 0..2 {
        bed.consul.kill()?;
        bed.waits_for_error("cannot be reached")?;
        ensure!(bed.has(&both), "{:?}", bed.endpoints());
        bed.consul.resume()?;
        bed.waits_for_peace()?;
        ensure!(bed.has(&both), "{:?}", bed.endpoints());
        bed.unregister("api-2")?;
        bed.waits_for("a removal is known", &both[..1])?;
        bed.register("api-2")?;
        bed.waits_for("a registration is known", &both)?;
        load.reaches("api-2", 5)?;
    }
    let report = load.end()?;
    ensure!(report.failed == 0, "{report:?}");
    Ok(())
}

#[test]
fn a_consul_that_stands_still_or_is_cut_off_is_named_and_followed_again() -> Result<()> {
    let bed = Bed::make()?;
    let load = Load::start_with(&bed.mesh, 2, &["--rate", "50"])?;
    bed.consul.signal(Signal::SIGSTOP)?;
    bed.waits_for_error("did not answer within")?;
    ensure!(bed.has(&[("api-1", "healthy")]), "{:?}", bed.endpoints());
    bed.consul.signal(Signal::SIGCONT)?;
    bed.waits_for_peace()?;
    let cut = bed.mesh.host("web").black_hole(bed.mesh.lab().host("store").address())?;
    bed.waits_for_error("Consul at")?;
    bed.register("api-2")?;
    ensure!(bed.has(&[("api-1", "healthy")]), "{:?}", bed.endpoints());
    drop(cut);
    bed.waits_for_peace()?;
    bed.waits_for("both", &[("api-1", "healthy"), ("api-2", "healthy")])?;
    let report = load.end()?;
    ensure!(report.failed == 0, "{report:?}");
    Ok(())
}

#[test]
fn garbage_is_named_by_instance_and_key_and_what_was_said_before_stays() -> Result<()> {
    let bed = Bed::make()?;
    bed.register_with("api-1", &json!({ "meshd-transport": "meshed", "meshd-port": "http" }), "passing")?;
    bed.document("kind: [")?;
    for error in [
        "Consul service `payments`, instance `payments` on node `api-1`: Meta meshd-port: `http`",
        "Meta meshd-transport: `meshed` is not known",
        "meshd-discovery/v1/shop/payments/service: line 1",
    ] {
        bed.waits_for_error(error)?;
    }
    bed.answers("api-1")?;
    bed.check_says("Meta meshd-transport")
}

#[test]
fn a_service_that_knows_nothing_of_the_mesh_is_used_by_consent_only() -> Result<()> {
    let bed = Bed::make_with("imports = [\"*\"]\n")?;
    bed.register_with("api-2", &json!({}), "passing")?;
    bed.waits_for_error("plaintext is not allowed for payments.shop")?;
    ensure!(bed.has(&[("api-1", "healthy")]), "{:?}", bed.endpoints());
    let allowed = bed.plan_document()?.replace("spec:\n", "spec:\n  allowPlaintext: true\n");
    bed.document(&allowed)?;
    bed.waits_for("both", &[("api-1", "healthy"), ("api-2", "healthy")])?;
    bed.waits_for_peace()
}
