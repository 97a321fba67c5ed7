//! The day after a rotation: clients that others wrote, with the root before alone, the new one alone, and both.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::Program;

use crate::envoy::{Roots, ask, call, client_with, server_with};
use crate::pypi;

const END: &str = "-----END CERTIFICATE-----\n";

struct Rotated {
    mesh: Mesh,
    /// Each in a file that any unit can read.
    before: PathBuf,
    now: PathBuf,
}

impl Rotated {
    fn new() -> Result<Self> {
        let (mesh, _) = Mesh::start_after_rotation(Plan::shop_with_one_server(), 0)?;
        let roots = mesh.roots()?;
        ensure!(roots.len() == 2, "{} roots", roots.len());
        let directory = mesh.host("web").directory();
        let [before, now] = ["before.pem", "now.pem"].map(|name| directory.join(name));
        fs::write(&before, &roots[0])?;
        fs::write(&now, &roots[1])?;
        Ok(Self { mesh, before, now })
    }

    /// What checkout got by PyPI's client, and the same without the bridge.
    fn chains(&self) -> Result<[PathBuf; 2]> {
        let (whole, certificates) = fetch(&self.mesh)?;
        ensure!(certificates.len() == 3, "{certificates:?}");
        let short = whole.with_file_name("short.pem");
        fs::write(&short, certificates[..2].concat())?;
        Ok([whole, short])
    }
}

/// The chain of checkout, as PyPI's client got it; its key is beside it.
fn fetch(mesh: &Mesh) -> Result<(PathBuf, Vec<String>)> {
    let (fetched, directory) = pypi::fetch(mesh, "web", "checkout")?;
    fetched.expect_success("PyPI's client fetching checkout's identity")?;
    let chain = directory.join("chain.pem");
    let certificates = fs::read_to_string(&chain)?.split_inclusive(END).map(str::to_owned).collect();
    Ok((chain, certificates))
}

/// Whether an Envoy on api-1 lets checkout in with this chain.
fn is_served(mesh: &Mesh, chain: &Path) -> Result<bool> {
    let (chain, key) = (chain.display(), chain.with_file_name("key.pem"));
    let options = format!("-cert_chain {chain} -cert {chain} -key {}", key.display());
    let answered = call(mesh, "web", (mesh.host("api-1").address(), 9443).into(), &options)?;
    Ok(answered.stdout.contains("payments on api-1"))
}

fn openssl_verifies(mesh: &Mesh, roots: &Path, chain: &Path, purpose: &str) -> Result<bool> {
    let verify = Program::new("openssl").args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"]);
    Ok(mesh.host("web").run(&verify.arg(roots).arg("-untrusted").arg(chain).arg(chain))?.success())
}

#[test]
fn pypis_client_and_the_crate_take_it_and_openssl_verifies_it_by_either_root() -> Result<()> {
    let rotated = Rotated::new()?;
    let mesh = &rotated.mesh;
    let [whole, short] = rotated.chains()?;
    for purpose in ["sslclient", "sslserver"] {
        for roots in [&rotated.before, &rotated.now, &whole.with_file_name("roots.pem")] {
            ensure!(openssl_verifies(mesh, roots, &whole, purpose)?, "{purpose} by {}", roots.display());
        }
        ensure!(!openssl_verifies(mesh, &rotated.before, &short, purpose)?, "nothing but the bridge leads there");
        ensure!(openssl_verifies(mesh, &rotated.now, &short, purpose)?);
    }
    let program = Program::new(mesh.host("web").binary("workload-client"));
    let program = program.arg("--socket").arg(mesh.daemon("web").api_socket()).arg("fetch");
    let taken = mesh.host("web").run(&mesh.in_unit("web", "checkout", program))?;
    let taken = taken.expect_success("the crate `spiffe` taking a chain with a bridge")?;
    ensure!(taken.contains("\"chain\":3") && taken.contains("\"roots\":2"), "{taken}");
    let served = mesh.curl("web", "checkout", &["--max-time", "10", "http://payments.shop.mesh/"])?;
    ensure!(served.stdout.starts_with("payments on api-1"), "{served:?}");
    Ok(())
}

#[test]
fn envoys_that_know_one_root_alone_believe_each_other_whichever_it_is() -> Result<()> {
    let rotated = Rotated::new()?;
    let mesh = &rotated.mesh;
    for roots in [&rotated.before, &rotated.now] {
        let known = || Roots::File(roots.clone());
        let (server, client) = (server_with(mesh, known()), client_with(mesh, "checkout", (10000, 9901), known()));
        let _running = [server.start(mesh)?, client.start(mesh)?];
        let answer = ask(mesh, 10000)?;
        ensure!(answer.starts_with("payments on api-1"), "by {}: `{answer}`", roots.display());
    }
    Ok(())
}

#[test]
fn an_envoy_with_the_root_before_lets_nobody_in_without_the_bridge() -> Result<()> {
    let rotated = Rotated::new()?;
    let mesh = &rotated.mesh;
    let server = server_with(mesh, Roots::File(rotated.before.clone()));
    let _running = server.start(mesh)?;
    let [whole, short] = rotated.chains()?;
    ensure!(is_served(mesh, &whole)?, "refused with it");
    let before = server.stat(mesh, "fail_verify_error")?;
    ensure!(!is_served(mesh, &short)?, "let in without it");
    let refused = server.stat(mesh, "fail_verify_error")?;
    ensure!(refused == before + 1, "not for its certificate: {before} and {refused}");
    Ok(())
}

#[test]
fn an_envoy_with_the_new_root_does_not_mind_a_bridge_that_has_ended() -> Result<()> {
    let (mesh, shown) = Mesh::start_after_rotation(Plan::shop_with_one_server(), 40)?;
    ensure!(shown.len() == 3, "{shown:?}");
    let root = mesh.host("web").directory().join("now.pem");
    fs::write(&root, mesh.roots()?.concat())?;
    let _running = server_with(&mesh, Roots::File(root)).start(&mesh)?;
    let (chain, certificates) = fetch(&mesh)?;
    ensure!(certificates.len() == 2, "it is carried no more: {certificates:?}");
    let late = chain.with_file_name("late.pem");
    // As if somebody served it on.
    fs::write(&late, [&certificates[..], &shown[2..]].concat().concat())?;
    ensure!(is_served(&mesh, &late)?, "refused for what it does not need");
    Ok(())
}
