//! `meshd join`: this host becomes a member of the mesh.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{ArgGroup, Args};
use meshd::config::Config;
use meshd_identity::{JoinToken, PkiPin};
use meshd_pki_client::{MachineCertificate, Proof};

use super::on_runtime;

#[derive(Args)]
#[command(group(ArgGroup::new("proof").required(true).args(["token_file", "x509pop", "k8s_token"])))]
pub(crate) struct JoinArgs {
    /// File with the token; `-` reads standard input. Never on the command line: it is a secret.
    #[arg(long, value_name = "PATH|-")]
    token_file: Option<PathBuf>,
    /// The certificate this machine has (PEM, with intermediates) and its key, if the PKI takes its authority.
    #[arg(long, value_name = "CERT,KEY", value_delimiter = ',', requires = "pki_pin")]
    x509pop: Option<Vec<PathBuf>>,
    /// File with a projected service account token for the PKI, if it takes those of this cluster.
    #[arg(long, value_name = "PATH", requires = "pki_pin")]
    k8s_token: Option<PathBuf>,
    /// File with what `meshd-pki pin` printed: where the PKI is, and how to recognise it.
    #[arg(long, value_name = "PATH", conflicts_with = "token_file")]
    pki_pin: Option<PathBuf>,
    /// The host's id; default is the one the PKI gives.
    #[arg(long)]
    host: Option<String>,
}

pub(crate) fn join(config: &Config, args: &JoinArgs) -> anyhow::Result<ExitCode> {
    let (pin, proof) = proof(args)?;
    let host = args.host.as_deref();
    let joining = async { Ok(meshd_pki_client::join_by(&config.identity_dir(), &pin, &proof, host).await?) };
    let credentials = on_runtime(joining)?;
    println!("joined {} as host {} ({})", credentials.trust_domain, credentials.host_id, credentials.host.id);
    Ok(ExitCode::SUCCESS)
}

fn proof(args: &JoinArgs) -> anyhow::Result<(PkiPin, Proof)> {
    if let Some(file) = &args.token_file {
        let token: JoinToken = text_of(file)?.trim().parse().context("the token is not valid")?;
        return Ok((token.pin(), Proof::JoinToken(token)));
    }
    let pin = args.pki_pin.as_deref().context("--pki-pin is missing")?;
    let pin = text_of(pin)?.parse().with_context(|| pin.display().to_string())?;
    let proof = match (args.x509pop.as_deref(), &args.k8s_token) {
        (Some([certificate, key]), _) => Proof::Machine(MachineCertificate::read(certificate, key)?),
        (_, Some(file)) => Proof::Kubernetes(text_of(file)?.trim().to_owned()),
        _ => anyhow::bail!("--x509pop takes a certificate and a key, as in machine.pem,machine.key"),
    };
    Ok((pin, proof))
}

fn text_of(file: &Path) -> anyhow::Result<String> {
    if file == Path::new("-") {
        return std::io::read_to_string(std::io::stdin()).context("cannot read from standard input");
    }
    std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}
