//! PyPI's `spiffe`: it sends the socket's path as `:authority`, as every client on gRPC's C core does.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::{Finished, Program};
use meshd_tests::wait::until;

use crate::{DEADLINE, script};

/// As the unit on web; what it fetched, and where it put it.
pub(crate) fn fetch(mesh: &Mesh, name: &str) -> Result<(Finished, PathBuf)> {
    let directory = mesh.host("web").directory().join(name);
    std::fs::create_dir_all(&directory)?;
    let program = script(mesh, "web", &format!("{name}.service"), "fetch.py", include_str!("fetch.py"))?;
    let fetched = mesh.host("web").run(&program.arg(mesh.daemon("web").api_socket()).arg(&directory))?;
    Ok((fetched, directory))
}

#[test]
fn it_gets_its_identity_unmodified_and_openssl_verifies_it() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let (fetched, directory) = fetch(&mesh, "checkout")?;
    let id = fetched.expect_success("PyPI's spiffe fetching checkout's identity")?;
    ensure!(id.trim() == mesh.spiffe_id("checkout"), "{id}");
    for purpose in ["sslclient", "sslserver"] {
        let verify = Program::new("openssl").args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"]);
        let (roots, chain) = (directory.join("roots.pem"), directory.join("chain.pem"));
        let verified = mesh.host("web").run(&verify.arg(roots).arg("-untrusted").arg(&chain).arg(&chain))?;
        verified.expect_success(&format!("openssl verify -purpose {purpose}"))?;
    }
    Ok(())
}

#[test]
fn it_is_told_that_a_stray_unit_has_no_identity() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let (told, _) = fetch(&mesh, "stray")?;
    ensure!(!told.success() && told.stderr.contains("no identity issued"), "{told:?}");
    Ok(())
}

#[test]
fn its_stream_follows_renewals() -> Result<()> {
    let mesh = Mesh::start(Plan { leaf_ttl: Some("15"), ..Plan::shop_with_one_server() })?;
    let program = script(&mesh, "web", "checkout.service", "watch.py", include_str!("watch.py"))?;
    let watching = mesh.host("web").spawn(&program.arg(mesh.daemon("web").api_socket()))?;
    let serials = || watching.stdout().lines().map(str::to_owned).collect::<BTreeSet<_>>().len();
    until(DEADLINE, "three certificates", || serials() >= 3)?;
    ensure!(watching.stderr().is_empty(), "{}", watching.stderr());
    Ok(())
}
