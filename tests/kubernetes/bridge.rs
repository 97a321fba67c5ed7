//! Go's own verifier, after a rotation: with the root before alone, the new one alone, and both.

use std::fs;

use anyhow::{Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::Program;
use meshd_tests::servers;

#[test]
fn go_believes_a_chain_with_a_bridge_by_either_root() -> Result<()> {
    let mesh = Mesh::start_after_rotation(Plan::shop_with_one_server())?;
    let (web, pki) = (mesh.host("web"), mesh.pki_host());
    let directory = web.directory();
    // What the PKI shows at its port has the same chain as hosts have.
    let shown = format!("openssl s_client -connect {} -showcerts </dev/null", mesh.pki_address());
    let shown = pki.run(&Program::new("sh").args(["-c", &shown]))?.stdout;
    let begins = shown.match_indices("-----BEGIN").map(|(at, _)| at);
    let ends = shown.match_indices("-----END CERTIFICATE-----").map(|(at, end)| at + end.len());
    let chain: Vec<&str> = begins.zip(ends).map(|(from, to)| &shown[from..to]).collect();
    ensure!(chain.len() == 3, "{shown}");
    let roots = mesh.roots()?;
    let [before, now] = &roots[..] else { panic!("{} roots", roots.len()) };

    let believes = |chain: &[&str], roots: &[&String]| -> Result<bool> {
        fs::write(directory.join("chain.pem"), chain.join("\n"))?;
        fs::write(directory.join("roots.pem"), roots.iter().map(|root| root.as_str()).collect::<String>())?;
        let program = Program::new(servers::go_verifier()?);
        let judged = web.run(&program.arg(directory.join("chain.pem")).arg(directory.join("roots.pem")))?;
        ensure!(judged.success() || judged.stderr.contains("unknown authority"), "{judged:?}");
        Ok(judged.success())
    };
    for roots in [&[before][..], &[now], &[before, now], &[now, before]] {
        ensure!(believes(&chain, roots)?, "with {} roots", roots.len());
    }
    ensure!(!believes(&chain[..2], &[before])?, "nothing but the bridge leads there");
    ensure!(believes(&chain[..2], &[now])?);
    Ok(())
}
