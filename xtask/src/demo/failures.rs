//! The steps in which something is stopped or killed.

use anyhow::Result;
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;

use super::show::Show;
use super::steps::said;

const CLIENTS: u64 = 8;

pub(super) fn stopped_under_load(show: &mut Show, mesh: &Mesh) -> Result<()> {
    show.step(
        "A host taken out of service",
        "checkout makes one connection per request, 8 at a time, while api-1's meshd is stopped.",
    );
    let load = Load::start(mesh, CLIENTS)?;
    load.reaches("api-1", 100)?;
    show.command("api-1", "root", "systemctl stop meshd (SIGTERM)");
    mesh.daemon("api-1").stop()?;
    load.reaches("api-2", 200)?;
    let report = load.end()?;
    show.output(&format!("{} requests answered, {} failed", report.ok, report.failed));
    show.claim(report.failed == 0, "no request failed", || format!("{report:?}"))?;
    mesh.daemon("api-1").start()
}

pub(super) fn killed_under_load(show: &mut Show, mesh: &Mesh) -> Result<()> {
    show.step("A daemon killed", "The same load; this time api-1's meshd gets no time to say goodbye.");
    let load = Load::start(mesh, CLIENTS)?;
    load.reaches("api-1", 100)?;
    show.command("api-1", "root", "kill -9 meshd");
    mesh.daemon("api-1").kill()?;
    load.reaches("api-2", 200)?;
    let report = load.end()?;
    show.output(&format!("{} requests answered, {} failed {:?}", report.ok, report.failed, report.errors));
    let claim = format!("no more than the {CLIENTS} requests in flight were lost");
    show.claim(report.failed <= CLIENTS, &claim, || format!("{report:?}"))?;
    mesh.daemon("api-1").start()
}

pub(super) fn pki_stopped(show: &mut Show, mesh: &mut Mesh) -> Result<()> {
    show.step("The PKI is down", "Everything a host needs to go on is on that host.");
    show.command("pki", "root", "systemctl stop meshd-pki");
    mesh.stop_pki()?;
    both_are_answered(show, mesh)?;
    show.command("web", "root", "systemctl restart meshd");
    mesh.daemon("web").restart()?;
    both_are_answered(show, mesh)?;
    mesh.start_pki()
}

fn both_are_answered(show: &Show, mesh: &Mesh) -> Result<()> {
    for unit in ["checkout", "billing"] {
        let answer = mesh.curl("web", unit, &["http://payments.shop.mesh/"])?;
        show.claim(answer.success(), &format!("{unit} is answered: {}", said(&answer)), || said(&answer))?;
    }
    Ok(())
}
