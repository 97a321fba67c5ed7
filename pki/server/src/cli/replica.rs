//! `meshd-pki replica` and `meshd-pki migrate`

use std::path::PathBuf;
use std::time::SystemTime;

use clap::{Args, Subcommand, ValueEnum};
use meshd_identity::TrustDomain;
use meshd_pki::keeping::moving;
use meshd_pki::replicas::replicas;

use super::etcd::EtcdArgs;

#[derive(Args)]
pub(crate) struct Migrate {
    #[arg(long)]
    state: PathBuf,
    #[arg(long, value_enum)]
    to: Target,
    #[command(flatten)]
    etcd: EtcdArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum Target {
    Etcd,
    Sqlite,
}

#[derive(Subcommand)]
pub(crate) enum Replica {
    /// Make a state directory for one more server; its wrapping key must be there already.
    Init(Init),
    /// Show the servers, which of them run, and which leads.
    List(List),
    /// Forget one that will not come back, so that rotation does not wait for it.
    Remove(Remove),
}

#[derive(Args)]
pub(crate) struct Init {
    #[arg(long)]
    state: PathBuf,
    #[arg(long)]
    trust_domain: TrustDomain,
    #[command(flatten)]
    etcd: EtcdArgs,
}

#[derive(Args)]
pub(crate) struct List {
    #[arg(long)]
    state: PathBuf,
}

#[derive(Args)]
pub(crate) struct Remove {
    #[arg(long)]
    state: PathBuf,
    /// Its name, as `replica list` shows it.
    replica: String,
}

impl Migrate {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let moved = match self.to {
            Target::Etcd => moving::to_etcd(&self.state, self.etcd.config()?, SystemTime::now())?,
            Target::Sqlite => moving::to_sqlite(&self.state, SystemTime::now())?,
        };
        println!("{} records moved, all the same on both sides (sha256 {})", moved.records, moved.sha256);
        Ok(())
    }
}

impl Replica {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        match self {
            Replica::Init(args) => {
                let name = moving::init_replica(&args.state, &args.trust_domain, args.etcd.config()?)?;
                println!("replica {name} is ready: `meshd-pki run --state {} ...`", args.state.display());
            }
            Replica::Remove(args) => {
                moving::remove_replica(&args.state, &args.replica, SystemTime::now())?;
                println!("replica {} is forgotten; hosts learn with their next renewal", args.replica);
            }
            Replica::List(args) => {
                println!("{:<10} {:<8} {:<6} ADDRESSES", "REPLICA", "STATE", "LEADS");
                for one in replicas(&args.state)? {
                    let state = if one.runs { "runs" } else { "away" };
                    let leads = if one.leads { "yes" } else { "" };
                    println!("{:<10} {state:<8} {leads:<6} {}", one.id, one.addresses.join(", "));
                }
            }
        }
        Ok(())
    }
}
