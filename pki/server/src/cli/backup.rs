//! `meshd-pki backup` and `meshd-pki restore`

use std::path::PathBuf;
use std::time::SystemTime;

use clap::{Args, Subcommand};
use meshd_pki::keeping::command::{acknowledge, create, list, restore};

use crate::Output;

#[derive(Subcommand)]
pub(crate) enum Backup {
    /// Make one now; works beside a running server.
    Create(Create),
    /// Show what there is, newest first, and whether each is whole.
    List(List),
}

#[derive(Args)]
pub(crate) struct Create {
    #[arg(long)]
    state: PathBuf,
}

#[derive(Args)]
pub(crate) struct List {
    #[arg(long)]
    state: PathBuf,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Args)]
pub(crate) struct Restore {
    #[arg(long)]
    state: PathBuf,
    /// The backup to use: a file, or a name as `backup list` shows it. Default: the newest that is whole.
    #[arg(long, conflicts_with = "seen")]
    from: Option<PathBuf>,
    /// Restore nothing; say that the alarm of the last restore was seen.
    #[arg(long)]
    seen: bool,
}

impl Backup {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        match self {
            Backup::Create(args) => {
                let made = create(&args.state, SystemTime::now())?;
                println!("{} ({} bytes)", made.path.display(), made.bytes);
                println!("The wrapping key is not in it; a copy of it belongs in another place than the backups.");
                Ok(())
            }
            Backup::List(args) => args.run(),
        }
    }
}

impl List {
    fn run(&self) -> anyhow::Result<()> {
        let backups = list(&self.state)?;
        match self.output {
            Output::Json => {
                let objects = backups.iter().map(|(one, state)| {
                    serde_json::json!({
                        "name": one.name(), "file": one.path, "bytes": one.bytes, "state": state,
                    })
                });
                println!("{}", serde_json::to_string_pretty(&objects.collect::<Vec<_>>())?);
            }
            Output::Text => {
                println!("{:<22} {:>12}  STATE", "NAME", "BYTES");
                backups.iter().for_each(|(one, state)| println!("{:<22} {:>12}  {state}", one.name(), one.bytes));
            }
        }
        Ok(())
    }
}

impl Restore {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        if self.seen {
            let was_on = acknowledge(&self.state, SystemTime::now())?;
            println!("{}", if was_on { "the alarm is off" } else { "there is no alarm" });
            return Ok(());
        }
        let from = restore(&self.state, self.from.as_deref(), SystemTime::now())?;
        println!("{} is in place; start the server", from.display());
        Ok(())
    }
}
