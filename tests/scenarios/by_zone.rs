//! Endpoints near by first, farther ones while those do not work, and back again.

use std::fmt::Write;
use std::fs;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd_tests::lab::Lab;
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{HostPlan, Plan, Workload};
use meshd_tests::wait::until;

/// A host that is back is found by a probe within half a minute, and ten seconds later those farther away are left.
const FOUND_WITHIN: Duration = Duration::from_secs(90);

/// The server hosts, each in a zone of its own: of web, of its site, of neither.
const ZONES: [(&str, &str); 3] = [("api-1", "rack-1"), ("api-2", "rack-2"), ("api-3", "far")];

fn start() -> Result<Mesh> {
    let mut plan = Plan { threads: 1, ..Plan::shop() };
    plan.hosts.push(HostPlan { name: "api-3".to_owned(), workloads: vec![Workload::payments()] });
    let lab = Arc::new(Lab::new(&plan.host_names())?);
    let mut mesh = Mesh::prepare(lab, plan)?;
    let web = mesh.daemon("web");
    let mut text = fs::read_to_string(web.config())?;
    text.push_str("\n[host]\nzone = \"rack-1\"\nsite_zones = [\"rack-2\"]\n");
    fs::write(web.config(), text)?;
    let mut document = String::from(
        "apiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata: { name: payments, namespace: shop }\nspec:\n  ports: \
         [{ port: 80 }]\n  endpoints:\n",
    );
    for (host, zone) in ZONES {
        writeln!(document, "    - {{ address: {}, zone: {zone} }}", mesh.host(host).address())?;
    }
    web.resource("payments.yaml", &document)?;
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.start_all()?;
    Ok(mesh)
}

/// Connections a host has had of the mesh.
fn arrived(mesh: &Mesh, host: &str) -> Result<f64> {
    Ok(mesh.daemon(host).metrics()?.sum("tcp_open_total", &[("direction", "inbound"), ("peer", "src")]))
}

#[test]
fn the_near_zone_has_the_traffic_then_the_site_then_the_rest_and_it_comes_back_and_no_request_fails() -> Result<()> {
    let mesh = start()?;
    let load = Load::start_with(&mesh, 4, &["--rate", "200"])?;
    load.reaches("api-1", 100).context("at first")?;
    for far in ["api-2", "api-3"] {
        ensure!(arrived(&mesh, far)? < 1.0, "{far} was called while the near zone works");
    }
    mesh.daemon("api-1").stop()?;
    load.reaches("api-2", 100)?;
    ensure!(arrived(&mesh, "api-3")? < 1.0, "the far one was called while the site works");
    mesh.daemon("api-2").stop()?;
    load.reaches("api-3", 100)?;

    for back in ["api-2", "api-1"] {
        mesh.daemon(back).start()?;
        // Not only probes.
        until(FOUND_WITHIN, &format!("{back} is used again"), || {
            arrived(&mesh, back).is_ok_and(|calls| calls >= 100.0)
        })?;
    }
    // Ten seconds without a break after it answers again, those farther away are left.
    let quiet = |host: &str| -> Result<()> {
        let mut before = arrived(&mesh, host)?;
        until(FOUND_WITHIN, &format!("{host} is left"), || {
            load.reaches("api-1", 100).is_ok()
                && arrived(&mesh, host).is_ok_and(|now| mem::replace(&mut before, now) >= now)
        })
    };
    quiet("api-2")?;
    quiet("api-3")?;
    let report = load.end()?;
    ensure!(report.failed == 0 && report.ok > 500, "{report:?}");
    Ok(())
}
