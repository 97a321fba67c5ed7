//! Entries that ask for more than a unit: group, program, content of the program. What they ask for must hold for whoever
//! opened a connection; of callers of the Workload API workload_api.rs tells.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use anyhow::{Result, ensure};
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::{Finished, Program};
use meshd_tests::wait::until;

use crate::{DEADLINE, PAYMENTS, ask, ensure_refused, refused};

/// How much web's meshd sees of programs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sight {
    Off,
    Blind,
    On,
}

/// The shop whose PKI gives checkout to processes like this only.
fn shop_for(selectors: &[&str], sight: Sight) -> Result<Mesh> {
    shop_where(sight, |_| Ok(selectors.iter().map(|&selector| selector.to_owned()).collect()))
}

/// The same, of selectors that depend on where everything is.
pub(crate) fn shop_where(sight: Sight, selectors: impl FnOnce(&Mesh) -> Result<Vec<String>>) -> Result<Mesh> {
    let plan = Plan::shop_with_one_server();
    let lab = Arc::new(Lab::new(&plan.host_names())?);
    let mut mesh = Mesh::prepare(lab, plan)?;
    if sight != Sight::Off {
        mesh.daemon("web").look_at_programs(sight == Sight::On)?;
    }
    mesh.start_pki()?;
    mesh.join_all()?;
    let selectors = selectors(&mesh)?;
    let selectors = selectors.iter().flat_map(|selector| ["--selector", selector]);
    let args = ["entry", "add", "--host", "web"].into_iter().chain(selectors).chain(["ns/shop/sa/checkout"]);
    mesh.pki(&args.collect::<Vec<_>>())?;
    mesh.start_all()?;
    Ok(mesh)
}

/// Where the host has curl, by no other name.
fn curl() -> io::Result<PathBuf> {
    fs::canonicalize("/usr/bin/curl")
}

/// The same program as another file. By a process of its own: whatever another thread of ours starts meanwhile would hold it
/// open for writing.
pub(crate) fn copied(mesh: &Mesh, program: &Path, name: &str) -> Result<PathBuf> {
    let copy = mesh.host("web").directory().join(name);
    mesh.host("web").run(&Program::new("cp").arg(program).arg(&copy))?.expect_success("cp")?;
    Ok(copy)
}

fn other_curl(mesh: &Mesh) -> Result<PathBuf> {
    copied(mesh, &curl()?, "curl-of-another-name")
}

fn asked_with(mesh: &Mesh, program: &Path) -> Result<Finished> {
    let program = Program::new(program).args(["--silent", "--fail", "--max-time", "5", PAYMENTS]);
    mesh.host("web").run(&mesh.in_unit("web", "checkout", program))
}

#[test]
fn connections_of_other_programs_than_the_entry_names_are_refused() -> Result<()> {
    let path = format!("unix:path:{}", curl()?.display());
    let mesh = shop_for(&["systemd:unit:checkout.service", &path], Sight::On)?;
    if !mesh.lab().has_units() {
        return Ok(());
    }
    ask(&mesh)?;
    ensure_refused(&asked_with(&mesh, &other_curl(&mesh)?)?)?;
    ensure!(refused(&mesh, "web", "unenrolled")? >= 1.0);
    let told = format!("refused a connection: the process is not {path}");
    ensure!(mesh.daemon("web").log().contains(&told), "{}", mesh.daemon("web").log());
    ensure!(mesh.curl("web", "billing", &[PAYMENTS])?.success(), "billing is refused, too");
    ask(&mesh).map(drop)
}

#[test]
fn the_content_of_a_program_is_what_it_is_whatever_its_name() -> Result<()> {
    let sum = std::process::Command::new("sha256sum").arg(curl()?).output()?;
    let hash = String::from_utf8_lossy(&sum.stdout).chars().take(64).collect::<String>();
    let mesh = shop_for(&[&format!("unix:sha256:{hash}")], Sight::On)?;
    ask(&mesh)?;
    let copy = other_curl(&mesh)?;
    ensure!(asked_with(&mesh, &copy)?.success(), "{}", mesh.daemon("web").log());
    // Behind the end of an executable anything may follow.
    let append = Program::new("sh").args(["-c", "printf x >>$0"]).arg(&copy);
    mesh.host("web").run(&append)?.expect_success("changing the program")?;
    ensure_refused(&asked_with(&mesh, &copy)?)
}

#[test]
fn the_group_is_known_without_a_capability() -> Result<()> {
    // Of checkout, in the plan.
    let mesh = shop_for(&["systemd:unit:checkout.service", "unix:gid:2003"], Sight::Off)?;
    if !mesh.lab().has_units() {
        return Ok(());
    }
    ask(&mesh)?;
    let mesh = shop_for(&["systemd:unit:checkout.service", "unix:gid:9"], Sight::Off)?;
    ensure_refused(&mesh.curl("web", "checkout", &["--max-time", "5", PAYMENTS])?)?;
    let log = mesh.daemon("web").log();
    ensure!(log.contains("refused a connection: the process is not unix:gid:9"), "{log}");
    Ok(())
}

#[test]
fn a_claim_the_pki_does_not_agree_with_is_shown_with_its_remedy() -> Result<()> {
    let mesh = shop_for(&["unix:path:/usr/bin/checkout"], Sight::Off)?;
    let shown = |mesh: &Mesh, remedy: &str| -> Result<()> {
        until(DEADLINE, "the claim to be withheld", || {
            mesh.daemon("web").metrics().is_ok_and(|metrics| metrics.sum("meshd_withheld_claims", &[]) == 1.0)
        })?;
        let status = mesh.daemon("web").json("status")?;
        let withheld = &status["withheld"][0];
        ensure!(withheld["identity"] == *mesh.spiffe_id("checkout"), "{withheld}");
        let page = mesh.daemon("web").run(&["status"])?.expect_success("meshd status")?;
        let checked = mesh.daemon("web").run(&["check"])?;
        ensure!(checked.exit_code() == Some(1), "{checked:?}");
        for text in [&page, &checked.stdout] {
            ensure!(text.contains("the PKI's entry gives it to unix:path:/usr/bin/checkout only"), "{text}");
            ensure!(text.contains(remedy), "no `{remedy}`: {text}");
        }
        Ok(())
    };
    shown(&mesh, "path_selectors = true")?;
    let blind = shop_for(&["unix:path:/usr/bin/checkout"], Sight::Blind)?;
    shown(&blind, "AmbientCapabilities=CAP_SYS_PTRACE")?;
    let checked = blind.daemon("web").run(&["check"])?;
    ensure!(checked.stdout.contains("× programs can be seen"), "{checked:?}");
    // No entry at all.
    let enrolled = blind.daemon("web").run(&["enrol", "--uid", "2999", "--as", "ns/shop/sa/unknown"])?;
    ensure!(enrolled.exit_code() == Some(3), "{enrolled:?}");
    let page = blind.daemon("web").run(&["status"])?.expect_success("meshd status")?;
    ensure!(page.contains("uid:2999: host `web` claims ns/shop/sa/unknown, the PKI permits it"), "{page}");
    Ok(())
}
