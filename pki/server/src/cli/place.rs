//! Where a command is carried out: by the running server through its socket, on the state directory when none runs, or
//! by a server far away.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use clap::Args;
use meshd_pki::admin::{Actor, SOCKET, run_on};
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{Command as Message, Reply as Answer, admin_client::AdminClient};
use meshd_pki_client::operator::{Channel, Proof, is_absent, over_socket, over_tls};

use super::show::show;
use crate::Output;

#[derive(Args)]
pub(crate) struct Place {
    /// Directory of the PKI. The server that runs on it does the work; if none does, the directory is changed itself.
    #[arg(long, required_unless_present_any = ["server", "socket"])]
    state: Option<PathBuf>,
    /// Socket of the server; default: admin.sock in the state directory.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// HOST:PORT of a PKI that is not on this machine; needs an identity with a role (`meshd-pki role grant`).
    #[arg(long, requires_all = ["cert", "key", "bundle"], conflicts_with_all = ["state", "socket"])]
    server: Option<String>,
    /// With --server: certificate chain of that identity, PEM.
    #[arg(long)]
    cert: Option<PathBuf>,
    /// With --server: its private key, PEM.
    #[arg(long)]
    key: Option<PathBuf>,
    /// With --server: what the PKI is known by, a SPIFFE bundle document or root certificates in PEM.
    #[arg(long)]
    bundle: Option<PathBuf>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Far more than any command takes, other operators' before it included.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

impl Place {
    /// Has the command carried out, and prints what came of it.
    pub(crate) fn run(&self, command: Command) -> anyhow::Result<()> {
        self.show(&self.ask(command)?)
    }

    pub(crate) fn show(&self, reply: &Reply) -> anyhow::Result<()> {
        match self.output {
            Output::Json => println!("{}", serde_json::to_string_pretty(reply)?),
            Output::Text => print!("{}", show(reply)),
        }
        Ok(())
    }

    pub(crate) fn ask(&self, command: Command) -> anyhow::Result<Reply> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        if let Some(address) = &self.server {
            return runtime.block_on(async { send(over_tls(address, &self.proof()?).await?, command).await });
        }
        let socket = self.socket.clone().or_else(|| self.state.as_ref().map(|dir| dir.join(SOCKET)));
        let socket = socket.context("give --state, --socket or --server")?;
        match (runtime.block_on(over_socket(&socket)), &self.state) {
            (Ok(client), _) => runtime.block_on(send(client, command)),
            (Err(error), Some(dir)) if is_absent(&error) => on_directory(dir, command),
            (Err(error), _) => Err(error.into()),
        }
    }

    fn proof(&self) -> anyhow::Result<Proof<'_>> {
        match (&self.cert, &self.key, &self.bundle) {
            (Some(certificate), Some(key), Some(bundle)) => Ok(Proof { certificate, key, bundle }),
            _ => bail!("--server needs --cert, --key and --bundle"),
        }
    }
}

async fn send(mut client: AdminClient<Channel>, command: Command) -> anyhow::Result<Reply> {
    let asked = tokio::time::timeout(ANSWER_WITHIN, client.run(Message { command: Some(command) })).await;
    let late = |_| anyhow::anyhow!("no answer within {} s; see the log of meshd-pki", ANSWER_WITHIN.as_secs());
    let answer = asked.map_err(late)?;
    let Answer { reply } = answer.map_err(|status| anyhow::anyhow!("{}", status.message()))?.into_inner();
    reply.context("the PKI answered in a way this meshd-pki does not know; install a newer one")
}

fn on_directory(dir: &Path, command: Command) -> anyhow::Result<Reply> {
    Ok(run_on(dir, &Actor::local(), command, SystemTime::now())?)
}
