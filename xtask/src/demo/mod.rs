//! `cargo xtask demo`: what a newcomer must see, each claim checked.

mod failures;
mod show;
mod steps;

use std::sync::Arc;

use anyhow::{Result, ensure};
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::{binaries, packages, root};

use crate::{built, interrupt};
use show::Show;

/// The lab of `--keep` outlives the command, so it has a name that `--down` knows.
const KEPT: &str = "meshd-demo";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave the mesh up at the end, with hints on what to try
    #[arg(long)]
    keep: bool,
    /// Take down a mesh that was kept
    #[arg(long, conflicts_with = "keep")]
    down: bool,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    if args.down {
        return down();
    }
    let built = match built::before_sudo() {
        Some(built) => built,
        None => built::release()?,
    };
    root::become_root("cargo xtask demo", &built.marks())?;
    packages::ensure(&[packages::FOR_LABS])?;
    binaries::use_directory(built.target.join("release"));
    let mut show = Show::begin();
    let lab = make_lab(args.keep)?;
    interrupt::remove_on_interrupt(lab.name());
    let mesh = act(&mut show, lab)?;
    show.end();
    if args.keep {
        hints(&mesh);
        // Nothing is dropped, so nothing is ended.
        std::mem::forget(mesh);
    }
    Ok(true)
}

/// The steps in the order of the story.
fn act(show: &mut Show, lab: Arc<Lab>) -> Result<Mesh> {
    let mut mesh = steps::build(show, lab, Plan::shop())?;
    let capture = mesh.host("web").capture("demo.pcap")?;
    mesh.start_all()?;
    steps::request_by_name(show, &mesh)?;
    steps::two_identities(show, &mesh)?;
    steps::server_speaks_first(show, &mesh)?;
    steps::only_tls_on_the_wire(show, capture)?;
    steps::not_enrolled(show, &mesh)?;
    steps::strict_port(show, &mesh)?;
    steps::unknown_target(show, &mesh)?;
    failures::stopped_under_load(show, &mesh)?;
    failures::killed_under_load(show, &mesh)?;
    failures::pki_stopped(show, &mut mesh)?;
    steps::status_and_edges(show, &mesh)?;
    Ok(mesh)
}

fn make_lab(keep: bool) -> Result<Arc<Lab>> {
    let plan = Plan::shop();
    let hosts = plan.host_names();
    if !keep {
        return Ok(Arc::new(Lab::new(&hosts)?));
    }
    ensure!(!Lab::exists(KEPT), "a kept mesh is up already; take it down with `cargo xtask demo --down`");
    Ok(Arc::new(Lab::named(KEPT, &hosts)?))
}

fn down() -> Result<bool> {
    root::become_root("cargo xtask demo --down", &[])?;
    let was_up = Lab::exists(KEPT);
    Lab::remove(KEPT);
    println!("{}", if was_up { "The mesh is down." } else { "No mesh was kept." });
    Ok(true)
}

fn hints(mesh: &Mesh) {
    let directory = mesh.lab().directory().display();
    println!(
        "\nThe mesh stays up. Try:\n\
         \x20 sudo {directory}/enter web checkout.service curl -s http://payments.shop.mesh/\n\
         \x20 sudo {directory}/enter web stray.service curl -s http://payments.shop.mesh/\n\
         \x20 sudo {directory}/enter web admin.service {directory}/bin/meshd edges --config {web}\n\
         \x20 sudo {directory}/enter web admin.service nft list ruleset\n\
         \x20 tail -f {directory}/api-*/meshd/log/access.jsonl\n\
         `enter HOST UNIT PROGRAM...` runs any program on a host as a unit. Take it all down with\n\
         \x20 cargo xtask demo --down",
        web = mesh.daemon("web").config().display(),
    );
}
