//! `meshd join`: this host becomes a member of the mesh.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use meshd::config::Config;
use meshd_identity::JoinToken;

use super::on_runtime;

pub(crate) fn join(config: &Config, token_file: &Path, host: Option<&str>) -> anyhow::Result<ExitCode> {
    let text = if token_file == Path::new("-") {
        std::io::read_to_string(std::io::stdin()).context("cannot read the token from standard input")?
    } else {
        std::fs::read_to_string(token_file).with_context(|| format!("cannot read {}", token_file.display()))?
    };
    let token: JoinToken = text.trim().parse().context("the token is not valid")?;
    let credentials = on_runtime(async { Ok(meshd_pki_client::join(&config.identity_dir(), &token, host).await?) })?;
    println!("joined {} as host {} ({})", credentials.trust_domain, credentials.host_id, credentials.host.id);
    Ok(ExitCode::SUCCESS)
}
