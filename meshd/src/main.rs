//! `meshd`: arguments -> configuration -> what was asked for -> exit code.

mod cli;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use meshd::config::Config;

use crate::cli::bypass::{Switch, bypass};
use crate::cli::enrol::{EnrolArgs, UnenrolArgs};
use crate::cli::intercept::Intercept;
use crate::cli::join::JoinArgs;
use crate::cli::probe::{ConnectArgs, ProbeArgs};
use crate::cli::{Output, endpoints, enrol, inspect, intercept, join, ledger, probe, resources, run, validate};

/// A service mesh for VMs and bare metal: the daemon of one host, and its command line.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Configuration file.
    #[arg(long, global = true, default_value = "/etc/meshd/meshd.toml")]
    config: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Make this host a member of the mesh: with a token from `meshd-pki token create`, or by what the machine has already.
    Join(JoinArgs),
    /// Run the daemon in the foreground.
    Run,
    /// What the daemon holds and knows: identities, services, sources.
    Status {
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Who talks to whom, from live counters.
    Edges {
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Where services run, and which source says so.
    Endpoints(endpoints::Endpoints),
    /// Look at documents without a daemon: all that is wrong, and where they contradict each other. Exit code 1 with errors.
    Validate(validate::Validate),
    /// Documents in the backends of meshd.toml: MeshService and other kinds, all of a kind or one by its name.
    Get(resources::GetArgs),
    /// Write documents to the backend that meshd.toml names, once all of them are found to be right. What somebody else changed
    /// meanwhile is never written over unseen.
    Apply(resources::ApplyArgs),
    /// Take a document out of its backend.
    Delete(resources::DeleteArgs),
    /// Look for what is wrong on this host, with remedies. Exit code 1 when something failed, 0 with warnings only.
    Check {
        /// Before meshd is installed: can it run here, and what is in its way?
        #[arg(long)]
        pre: bool,
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Who still calls this host's permissive ports in clear, and which ports nobody does.
    Ledger(ledger::Ledger),
    /// Put a unit, user or port of this host under the mesh. Takes effect at once; nothing is restarted.
    Enrol(EnrolArgs),
    /// Take a unit, user or port out of the mesh again.
    Unenrol(UnenrolArgs),
    /// See a name as an enrolled unit sees it: resolves and connects from within the unit. For root, audited.
    Probe(ProbeArgs),
    /// The part of `probe` that runs within the unit.
    #[command(hide = true)]
    ProbeConnect(ConnectArgs),
    /// The kernel rules that hand connections to meshd.
    Intercept {
        #[command(subcommand)]
        action: Intercept,
    },
    /// The kill switch: meshd gets out of the way where there is another way than through it.
    Bypass {
        #[arg(value_enum)]
        switch: Switch,
        /// Only this unit's strict ports and raw addresses.
        #[arg(long, value_name = "UNIT")]
        unit: Option<String>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(&cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("meshd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: &Cli) -> anyhow::Result<ExitCode> {
    match &cli.command {
        Command::Join(args) => join::join(&load(&cli.config)?, args),
        Command::Run => run::run(&load(&cli.config)?, &cli.config),
        Command::Status { output } => inspect::status(&load(&cli.config)?, *output),
        Command::Endpoints(args) => endpoints::run(&load(&cli.config)?, args),
        Command::Validate(args) => validate::run(args),
        Command::Edges { output } => inspect::edges(&load(&cli.config)?, *output),
        Command::Ledger(args) => ledger::run(&load(&cli.config)?, args),
        Command::Get(args) => resources::get(&load(&cli.config)?, args),
        Command::Apply(args) => resources::apply(&load(&cli.config)?, args),
        Command::Delete(args) => resources::delete(&load(&cli.config)?, args),
        Command::Check { pre, output } => inspect::check(&cli.config, *pre, *output),
        Command::Enrol(args) => enrol::enrol(&load(&cli.config)?, args),
        Command::Unenrol(args) => enrol::unenrol(&load(&cli.config)?, args),
        Command::Probe(args) => probe::probe(&load(&cli.config)?, args),
        Command::ProbeConnect(args) => probe::connect(args),
        Command::Intercept { action } => intercept::run(&cli.config, action),
        Command::Bypass { switch, unit } => {
            bypass(&intercept::config_or_defaults(&cli.config), *switch, unit.as_deref())
        }
    }
}

fn load(path: &Path) -> anyhow::Result<Config> {
    Ok(Config::load(path)?)
}
