//! PyPI's `spiffe`: it sends the socket's path as `:authority`, as every client on gRPC's C core does.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::{Finished, Program};
use meshd_tests::wait::until;

use crate::{DEADLINE, script};

/// As the unit of a host; what it fetched, and where it put it.
pub(crate) fn fetch(mesh: &Mesh, host: &str, name: &str) -> Result<(Finished, PathBuf)> {
    let directory = mesh.host(host).directory().join(name);
    std::fs::create_dir_all(&directory)?;
    let program = script(mesh, host, &format!("{name}.service"), "fetch.py", include_str!("fetch.py"))?;
    let fetched = mesh.host(host).run(&program.arg(mesh.daemon(host).api_socket()).arg(&directory))?;
    Ok((fetched, directory))
}

#[test]
fn it_gets_its_identity_unmodified_and_openssl_verifies_it() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let (fetched, directory) = fetch(&mesh, "web", "checkout")?;
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
    let (told, _) = fetch(&mesh, "web", "stray")?;
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

#[test]
fn its_tokens_are_good_for_their_audience_only() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let program = script(&mesh, "web", "checkout.service", "fetch_token.py", include_str!("fetch_token.py"))?;
    let program = program.arg(mesh.daemon("web").api_socket()).args(["ledger", "payroll"]);
    let said = mesh.host("web").run(&program)?.expect_success("PyPI's spiffe with tokens")?;
    let (id, other) = said.split_once('\n').context("one line only")?;
    ensure!(id == mesh.spiffe_id("checkout"), "{said}");
    ensure!(other.contains("for `ledger`, not for `payroll`"), "{said}");
    Ok(())
}

#[test]
fn its_stream_of_token_keys_follows_the_pkis() -> Result<()> {
    let mut mesh = Mesh::start(Plan { leaf_ttl: Some("15"), ..Plan::shop_with_one_server() })?;
    let program = script(&mesh, "web", "checkout.service", "watch_jwt.py", include_str!("watch_jwt.py"))?;
    let watching = mesh.host("web").spawn(&program.arg(mesh.daemon("web").api_socket()))?;
    let told = |text: &str| watching.stdout().lines().last() == Some(text);
    until(DEADLINE, "the one key there is", || told("1"))?;
    mesh.stop_pki()?;
    age_the_key_of_tokens(&mesh)?;
    mesh.start_pki()?;
    until(DEADLINE, "its successor beside it", || told("2"))?;
    ensure!(watching.stderr().is_empty(), "{}", watching.stderr());
    Ok(())
}

/// As if the PKI had published it a month ago: it is due for a successor. Each record has a checksum of its key and value.
fn age_the_key_of_tokens(mesh: &Mesh) -> Result<()> {
    let age = "import hashlib, json, sqlite3, sys; db = sqlite3.connect(sys.argv[1]); \
               trust = json.loads(db.execute(\"SELECT value FROM record WHERE key = 'trust'\").fetchone()[0]); \
               trust['jwt_keys'][0]['published_at'] = 1; text = json.dumps(trust); \
               checksum = hashlib.sha256(b'trust\\0' + text.encode()).digest()[:8]; \
               db.execute(\"UPDATE record SET value = ?, sum = ? WHERE key = 'trust'\", (text, checksum)); \
               db.commit(); print(db.total_changes)";
    let database = mesh.pki_directory().join("state/pki.db");
    let changed = mesh.pki_host().run(&Program::new("python3").args(["-c", age]).arg(database))?;
    ensure!(changed.expect_success("changing the database")?.trim() == "1");
    Ok(())
}
