//! Where a command is carried out.

use std::path::PathBuf;
use std::time::SystemTime;

use clap::Args;
use meshd_pki::admin::{Actor, run_on};
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;

use super::show::show;
use crate::Output;

#[derive(Args)]
pub(crate) struct Place {
    /// Directory of the PKI.
    #[arg(long)]
    state: PathBuf,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

impl Place {
    /// Has the command carried out, and prints what came of it.
    pub(crate) fn run(&self, command: Command) -> anyhow::Result<()> {
        let reply = self.ask(command)?;
        match self.output {
            Output::Json => println!("{}", serde_json::to_string_pretty(&reply)?),
            Output::Text => print!("{}", show(&reply)),
        }
        Ok(())
    }

    fn ask(&self, command: Command) -> anyhow::Result<Reply> {
        Ok(run_on(&self.state, &Actor::local(), command, SystemTime::now())?)
    }
}
