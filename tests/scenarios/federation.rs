//! Two meshes, each with a PKI of its own, whose identities believe each other for as long as both operators want.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd_tests::lab::Lab;
use meshd_tests::load::{LoadReport, report};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{self, HostPlan, Plan, ServicePlan, Workload};
use meshd_tests::process::{Process, Program};
use meshd_tests::wait::until;
use serde_json::Value;

use crate::{DEADLINE, PAYMENTS, ask, ensure_refused};

const OURS: &str = plan::TRUST_DOMAIN;
const THEIRS: &str = "other.example";
const WEB_PORT: u16 = 15443;

/// checkout and billing on web are ours; payments on api-1 is theirs, known there by their identity.
struct Two {
    ours: Mesh,
    theirs: Mesh,
}

impl Two {
    fn start(their_leaf_ttl: Option<&'static str>) -> Result<Two> {
        let services = vec![ServicePlan { hosts: vec!["api-1".to_owned()], ..ServicePlan::new("payments", 80) }];
        let clients = vec![Workload::client("checkout", 2003), Workload::client("billing", 2004)];
        let web = HostPlan { name: "web".to_owned(), workloads: clients };
        let ours = Plan { hosts: vec![web], services: services.clone(), ..Plan::shop() };
        let theirs = Plan {
            trust_domain: THEIRS.to_owned(),
            pki_host: "pki-of-others".to_owned(),
            hosts: vec![HostPlan { name: "api-1".to_owned(), workloads: vec![Workload::payments()] }],
            services: services.clone(),
            leaf_ttl: their_leaf_ttl,
            ..Plan::shop()
        };
        let lab = Arc::new(Lab::new(&[ours.host_names(), theirs.host_names()].concat())?);
        let mut two = Two { ours: Mesh::prepare(lab.clone(), ours)?, theirs: Mesh::prepare(lab, theirs)? };
        let document = plan::document(&services[0], &two.theirs.endpoints(&services[0]));
        let identities = format!("spec:\n  identities: [\"spiffe://{THEIRS}/ns/shop/sa/payments\"]\n");
        two.ours.daemon("web").resource("payments.yaml", &document.replace("spec:\n", &identities))?;
        two.ours.start_pki()?;
        let listen = format!("{}:{WEB_PORT}", two.theirs.pki_host().address());
        let [certificate, key, _] = two.web_certificate()?;
        let options = ["--bundle-listen", &listen, "--bundle-cert", &certificate, "--bundle-key", &key];
        two.theirs.start_pki_serving(&options)?;
        for mesh in [&mut two.ours, &mut two.theirs] {
            mesh.join_all()?;
            mesh.start_all()?;
        }
        Ok(two)
    }

    /// For their web endpoint: certificate, key, and the authority that vouches for it.
    fn web_certificate(&self) -> Result<[String; 3]> {
        let host = self.theirs.pki_host();
        let path = |name: &str| self.theirs.pki_directory().join(name).display().to_string();
        fs::write(path("openssl.cnf"), "[req]\ndistinguished_name = dn\n[dn]\n")?;
        let [config, authority, authority_key, certificate, key] =
            ["openssl.cnf", "web-ca.pem", "web-ca.key", "web.pem", "web.key"].map(path);
        let common = ["req", "-config", &config, "-x509", "-nodes", "-days", "2", "-newkey", "ec", "-pkeyopt"];
        let common = [&common[..], &["ec_paramgen_curve:prime256v1"]].concat();
        let of_authority = ["-subj", "/CN=ca", "-addext", "basicConstraints=critical,CA:TRUE", "-out", &authority];
        host.command("openssl", &[&common[..], &of_authority, &["-keyout", &authority_key]].concat())?;
        let name = format!("subjectAltName=IP:{}", host.address());
        let signed = ["-CA", &authority, "-CAkey", &authority_key, "-subj", "/CN=web", "-addext", &name];
        let leaf = ["-addext", "basicConstraints=critical,CA:FALSE", "-out", &certificate, "-keyout", &key];
        host.command("openssl", &[&common[..], &signed, &leaf].concat())?;
        for file in [&certificate, &key] {
            fs::set_permissions(file, Permissions::from_mode(0o644))?;
        }
        Ok([certificate, key, authority])
    }

    /// We follow them by a name of the web, they follow us by our SPIFFE ID.
    fn federate(&self) -> Result<()> {
        self.follow_them()?;
        let url = format!("https://{}/.well-known/spiffe-bundle", self.ours.pki_address());
        let bundle = self.ours.pki_host().command("curl", &["--silent", "--fail", "--insecure", &url])?;
        let file = self.theirs.pki_directory().join("ours.jwks");
        fs::write(&file, bundle)?;
        let identity = format!("spiffe://{OURS}/ns/meshd-system/sa/pki");
        let file = file.display().to_string();
        let profile = ["--profile", "https_spiffe", "--spiffe-id", &identity, "--bundle", &file];
        let add = ["federation", "add", "--trust-domain", OURS, "--url", &url, "--for", "*"];
        self.theirs.pki(&[&add[..], &profile].concat())?;
        Ok(())
    }

    fn follow_them(&self) -> Result<()> {
        let authority = self.theirs.pki_directory().join("web-ca.pem").display().to_string();
        let url = format!("https://{}:{WEB_PORT}/.well-known/spiffe-bundle", self.theirs.pki_host().address());
        let profile = ["--profile", "https_web", "--ca", &authority];
        let add = ["federation", "add", "--trust-domain", THEIRS, "--url", &url, "--for", "ns/shop/sa/checkout"];
        self.ours.pki(&[&add[..], &profile].concat())?;
        Ok(())
    }

    /// Until web holds their bundle with so many roots; our PKI is told to look instead of waiting for its time.
    fn web_holds_roots(&self, count: u64) -> Result<()> {
        let refresh = || self.ours.pki(&["federation", "refresh", "--trust-domain", THEIRS]);
        until(DEADLINE, &format!("web to hold {count} roots of theirs"), || {
            refresh().is_ok() && held(&self.ours, "web").is_ok_and(|held| held["roots"] == count)
        })
        .with_context(|| format!("{:?}", held(&self.ours, "web")))
    }

    /// Their roots: id and state.
    fn their_roots(&self) -> Result<Vec<(String, String)>> {
        let list: Value = serde_json::from_str(&self.theirs.pki(&["authority", "list", "-o", "json"])?)?;
        let authorities = list["authorities"].as_array().context("no authorities")?;
        let text = |one: &Value, field: &str| one[field].as_str().unwrap_or_default().to_owned();
        let roots = authorities.iter().filter(|one| one["kind"] == "root");
        Ok(roots.map(|one| (text(one, "id"), text(one, "state"))).collect())
    }

    fn has_left(&self, id: &str) -> bool {
        let in_bundle = ["prepared", "active", "old"];
        let is_it = |(found, state): &(String, String)| found == id && in_bundle.contains(&state.as_str());
        self.their_roots().is_ok_and(|roots| !roots.iter().any(is_it))
    }

    fn idle(&self) -> Result<Process> {
        let idle = ["idle", "--target", "payments.shop.mesh:80", "--connections", "3"];
        self.ours.host("web").start_testkit(&self.ours.testkit("web", "checkout", &idle))
    }
}

/// The only federated trust domain of a host, as `meshd status` has it.
fn held(mesh: &Mesh, host: &str) -> Result<Value> {
    let status = mesh.daemon(host).json("status")?;
    Ok(status["pki"]["federation"][0].clone())
}

fn cut(mesh: &Mesh, host: &str, direction: &str) -> f64 {
    let metrics = mesh.daemon(host).metrics();
    metrics.map_or(0.0, |metrics| metrics.sum("meshd_connections_cut_total", &[("direction", direction)]))
}

fn arrived(mesh: &Mesh) -> f64 {
    let metrics = mesh.daemon("api-1").metrics();
    metrics.map_or(0.0, |metrics| metrics.sum("tcp_open_total", &[("direction", "inbound"), ("peer", "src")]))
}

fn hundred_more(mesh: &Mesh) -> Result<()> {
    let goal = arrived(mesh) + 100.0;
    until(DEADLINE, "100 more connections at api-1", || arrived(mesh) >= goal)
}

#[test]
fn services_of_another_mesh_are_reached_while_both_sides_want_it_and_its_root_rotates() -> Result<()> {
    // A tainted root is left within a quarter of that.
    let two = Two::start(Some("40"))?;
    let (ours, theirs) = (&two.ours, &two.theirs);
    ensure_refused(&ours.curl("web", "checkout", &["--max-time", "5", PAYMENTS])?)?;
    ensure!(ours.daemon("web").log().contains("that trust domain is not federated"), "{}", ours.daemon("web").log());
    two.federate()?;
    until(DEADLINE, "checkout to reach payments", || ask(ours).is_ok())
        .with_context(|| format!("web:\n{}\napi-1:\n{}", ours.daemon("web").log(), theirs.daemon("api-1").log()))?;
    // Ours to say: billing has no dealings with them.
    ensure_refused(&ours.curl("web", "billing", &["--max-time", "5", PAYMENTS])?)?;

    let load = ["load", "--target", "payments.shop.mesh:80", "--per-request", "--connections", "4"];
    let mut load = ours.host("web").start_testkit(&ours.testkit("web", "checkout", &load))?;
    hundred_more(theirs)?;
    let pids = [ours.daemon("web").pid()?, theirs.daemon("api-1").pid()?];
    let (old, _) = two.their_roots()?.into_iter().find(|(_, state)| state == "active").context("no active root")?;
    theirs.pki(&["authority", "prepare"])?;
    // What the calendar waits for: everybody who follows has the new root before it signs.
    two.web_holds_roots(2)?;
    theirs.pki(&["authority", "rotate", "--now"])?;
    let signs = |roots: &[(String, String)]| roots.iter().any(|(id, state)| *id != old && state == "active");
    until(DEADLINE, "their new root to sign", || two.their_roots().is_ok_and(|roots| signs(&roots)))?;
    hundred_more(theirs)?;
    theirs.pki(&["authority", "taint", &old])?;
    until(DEADLINE * 3, "their old root to leave the bundle", || two.has_left(&old))
        .with_context(|| theirs.pki(&["authority", "list"]).unwrap_or_default())?;
    two.web_holds_roots(1)?;
    hundred_more(theirs)?;
    load.stop()?;
    let done: LoadReport = report(&load.finish(DEADLINE)?)?;
    ensure!(done.failed == 0 && done.ok > 300, "{done:?}");
    ensure!(pids == [ours.daemon("web").pid()?, theirs.daemon("api-1").pid()?], "a meshd was started anew");
    Ok(())
}

#[test]
fn either_side_ends_the_federation_and_open_connections_with_it() -> Result<()> {
    /// From the operator's word to the last cut connection.
    const PROMISED: Duration = Duration::from_secs(5);
    let two = Two::start(None)?;
    let (ours, theirs) = (&two.ours, &two.theirs);
    two.federate()?;
    until(DEADLINE, "checkout to reach payments", || ask(ours).is_ok())?;

    let mut first = two.idle()?;
    ours.pki(&["federation", "remove", "--trust-domain", THEIRS])?;
    until(PROMISED, "web to cut", || cut(ours, "web", "outbound") >= 1.0).with_context(|| ours.daemon("web").log())?;
    ensure_refused(&ours.curl("web", "checkout", &["--max-time", "5", PAYMENTS])?)?;
    ensure!(held(ours, "web")?.is_null(), "web still holds a bundle of theirs");
    first.stop()?;

    two.follow_them()?;
    until(DEADLINE, "checkout to reach payments again", || ask(ours).is_ok())?;
    let mut second = two.idle()?;
    theirs.pki(&["federation", "remove", "--trust-domain", OURS])?;
    until(PROMISED, "api-1 to cut", || cut(theirs, "api-1", "inbound") >= 1.0)
        .with_context(|| theirs.daemon("api-1").log())?;
    ensure_refused(&ours.curl("web", "checkout", &["--max-time", "5", PAYMENTS])?)?;
    let told = format!("trust domain `{OURS}` is not federated with `{THEIRS}`");
    until(DEADLINE, "api-1 to say why", || theirs.daemon("api-1").log().contains(&told))?;
    second.stop()?;

    theirs.daemon("api-1").stop()?;
    let events = theirs.daemon("api-1").access_log();
    let cut = events.iter().filter(|event| event.outcome == "unfederated").count();
    ensure!(cut == 3, "{cut} of 3 connections ended as unfederated");
    Ok(())
}

#[test]
fn a_host_that_restarts_while_its_pki_is_away_still_believes_the_other_mesh() -> Result<()> {
    let mut two = Two::start(None)?;
    two.federate()?;
    until(DEADLINE, "checkout to reach payments", || ask(&two.ours).is_ok())?;
    two.ours.stop_pki()?;
    two.theirs.stop_pki()?;
    for (mesh, host) in [(&two.ours, "web"), (&two.theirs, "api-1")] {
        mesh.daemon(host).restart()?;
    }
    ask(&two.ours)?;
    Ok(())
}

/// The `spiffe` crate as a program of a host would use it.
fn workload_client(mesh: &Mesh, host: &str, name: &str, args: &[&str]) -> Result<String> {
    let program = Program::new(mesh.host(host).binary("workload-client"));
    let program = program.arg("--socket").arg(mesh.daemon(host).api_socket()).args(args);
    let done = mesh.host(host).run(&mesh.in_unit(host, name, program))?;
    done.expect_success(&format!("workload-client {} as {name}", args.join(" ")))
}

#[test]
fn programs_with_dealings_get_the_bundle_of_the_other_mesh_and_verify_its_tokens() -> Result<()> {
    let two = Two::start(None)?;
    two.federate()?;
    let bundles = |name: &str| -> Result<Value> {
        let fetched: Value = serde_json::from_str(&workload_client(&two.ours, "web", name, &["fetch"])?)?;
        Ok(fetched["bundles"].clone())
    };
    until(DEADLINE, "checkout to get both bundles", || bundles("checkout").is_ok_and(|count| count == 2))?;
    ensure!(bundles("billing")? == 1, "billing has no dealings with them");

    let token = workload_client(&two.theirs, "api-1", "payments", &["token", "--audience", "ledger"])?;
    let token: Value = serde_json::from_str(&token)?;
    let token = token["token"].as_str().context("no token")?;
    let judged = |name: &str| workload_client(&two.ours, "web", name, &["judge", "--audience", "ledger", token]);
    let said = judged("checkout")?;
    ensure!(said == format!("valid: spiffe://{THEIRS}/ns/shop/sa/payments\n"), "{said}");
    let said = judged("billing")?;
    ensure!(said.starts_with("refused: "), "{said}");
    Ok(())
}
