//! Go's own verifier, after a rotation: with the root before alone, the new one alone, and both.

use std::fs;

use anyhow::{Context, Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::Program;
use meshd_tests::servers;

/// Whether Go's verifier believes a chain by these roots, PEM each.
fn believes(mesh: &Mesh, chain: &[String], roots: &[&String]) -> Result<bool> {
    let web = mesh.host("web");
    let [chain_file, roots_file] = ["chain.pem", "roots.pem"].map(|name| web.directory().join(name));
    fs::write(&chain_file, chain.concat())?;
    fs::write(&roots_file, roots.iter().map(|root| root.as_str()).collect::<String>())?;
    let judged = web.run(&Program::new(servers::go_verifier()?).arg(chain_file).arg(roots_file))?;
    ensure!(judged.success() || judged.stderr.contains("unknown authority"), "{judged:?}");
    Ok(judged.success())
}

#[test]
fn go_believes_a_chain_with_a_bridge_by_either_root() -> Result<()> {
    // What the PKI shows is what hosts have, too.
    let (mesh, chain) = Mesh::start_after_rotation(Plan::shop_with_one_server(), 0)?;
    ensure!(chain.len() == 3, "{chain:?}");
    let roots = mesh.roots()?;
    let (before, now) = (&roots[0], roots.get(1).context("one root only")?);
    for roots in [&[before][..], &[now], &[before, now], &[now, before]] {
        ensure!(believes(&mesh, &chain, roots)?, "with {} roots", roots.len());
    }
    ensure!(!believes(&mesh, &chain[..2], &[before])?, "nothing but the bridge leads there");
    ensure!(believes(&mesh, &chain[..2], &[now])?);
    Ok(())
}

#[test]
fn go_does_not_mind_a_bridge_that_has_ended_where_it_has_the_new_root() -> Result<()> {
    let (mesh, shown) = Mesh::start_after_rotation(Plan::shop_with_one_server(), 40)?;
    ensure!(shown.len() == 3, "{shown:?}");
    let chain = mesh.shown_by_pki()?;
    ensure!(chain.len() == 2, "it is carried no more: {chain:?}");
    let late = [&chain[..], &shown[2..]].concat();
    ensure!(believes(&mesh, &late, &[&mesh.roots()?[0]])?, "refused for what it does not need");
    Ok(())
}
