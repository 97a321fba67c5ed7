//! `meshd-pki backup` and `meshd-pki restore`.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::{Args, Subcommand, ValueEnum};
use meshd_identity::TrustDomain;

use super::backups::{Backup, Backups};
use super::heal::{check_file, put_in_place};
use super::moving;
use super::restored::Restored;
use crate::audit::{Audit, Event};
use crate::commands::CommandError;
use crate::replicas::replicas;
use crate::state_dir::{StateDir, StateError, lock};
use crate::store::etcd::config::EtcdConfig;
use crate::times::unix;

#[derive(Subcommand)]
pub enum Keeping {
    /// Copies of the database, made every hour and after each step of an authority.
    #[command(subcommand)]
    Backup(BackupCommand),
    /// Put a backup in the place of the database; the server must be stopped.
    Restore(Restore),
    /// Move the records between the file of one server and an etcd for several; no server may run.
    Migrate(Migrate),
    /// The servers of a PKI in etcd.
    #[command(subcommand)]
    Replica(ReplicaCommand),
}

#[derive(Args)]
pub struct Migrate {
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

#[derive(Args)]
pub struct EtcdArgs {
    /// https://HOST:PORT of an etcd member. May be repeated; name all.
    #[arg(long, num_args = 1..)]
    etcd: Vec<String>,
    /// What the members' certificates chain to, PEM.
    #[arg(long)]
    etcd_ca: Option<PathBuf>,
    /// Client certificate, PEM; with etcd's --client-cert-auth its common name is the user.
    #[arg(long)]
    etcd_cert: Option<PathBuf>,
    #[arg(long)]
    etcd_key: Option<PathBuf>,
    #[arg(long)]
    etcd_user: Option<String>,
    #[arg(long)]
    etcd_password_file: Option<PathBuf>,
    /// Seconds after which another replica takes the lead from one that is silent.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(i64).range(2..=300))]
    etcd_lease: i64,
}

#[derive(Subcommand)]
pub enum ReplicaCommand {
    /// Make a state directory for one more server; its wrapping key must be there already.
    Init(ReplicaInit),
    /// Show the servers, which of them run, and which leads.
    List(State),
    /// Forget one that will not come back, so that rotation does not wait for it.
    Remove(ReplicaRemove),
}

#[derive(Args)]
pub struct ReplicaInit {
    #[arg(long)]
    state: PathBuf,
    #[arg(long)]
    trust_domain: TrustDomain,
    #[command(flatten)]
    etcd: EtcdArgs,
}

#[derive(Args)]
pub struct ReplicaRemove {
    #[arg(long)]
    state: PathBuf,
    /// Its name, as `replica list` shows it.
    replica: String,
}

impl EtcdArgs {
    /// The paths are the server's, wherever this was typed.
    fn config(&self) -> anyhow::Result<EtcdConfig> {
        let absolute = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
        Ok(EtcdConfig {
            replica: String::new(),
            trust_domain: String::new(),
            endpoints: self.etcd.clone(),
            ca: absolute(&self.etcd_ca)?,
            cert: absolute(&self.etcd_cert)?,
            key: absolute(&self.etcd_key)?,
            user: self.etcd_user.clone(),
            password_file: absolute(&self.etcd_password_file)?,
            lease_s: self.etcd_lease,
        })
    }
}

#[derive(Subcommand)]
pub enum BackupCommand {
    /// Make one now; works beside a running server.
    Create(State),
    /// Show what there is, newest first, and whether each is whole.
    List(BackupList),
}

#[derive(Args)]
pub struct State {
    #[arg(long)]
    state: PathBuf,
}

#[derive(Args)]
pub struct BackupList {
    #[arg(long)]
    state: PathBuf,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Output {
    #[default]
    Text,
    Json,
}

#[derive(Args)]
pub struct Restore {
    #[arg(long)]
    state: PathBuf,
    /// The backup to use: a file, or a name as `backup list` shows it. Default: the newest that is whole.
    #[arg(long, conflicts_with = "seen")]
    from: Option<PathBuf>,
    /// Restore nothing; say that the alarm of the last restore was seen.
    #[arg(long)]
    seen: bool,
}

pub fn run(command: &Keeping) -> anyhow::Result<()> {
    match command {
        Keeping::Backup(BackupCommand::Create(args)) => {
            let made = create(&args.state, SystemTime::now())?;
            println!("{} ({} bytes)", made.path.display(), made.bytes);
            println!("The wrapping key is not in it; a copy of it belongs in another place than the backups.");
        }
        Keeping::Backup(BackupCommand::List(args)) => list(args)?,
        Keeping::Restore(args) if args.seen => {
            let what =
                if acknowledge(&args.state, SystemTime::now())? { "the alarm is off" } else { "there is no alarm" };
            println!("{what}");
        }
        Keeping::Restore(args) => {
            let from = restore(&args.state, args.from.as_deref(), SystemTime::now())?;
            println!("{} is in place; start the server", from.display());
        }
        Keeping::Migrate(args) => {
            let moved = match args.to {
                Target::Etcd => moving::to_etcd(&args.state, args.etcd.config()?, SystemTime::now())?,
                Target::Sqlite => moving::to_sqlite(&args.state, SystemTime::now())?,
            };
            println!("{} records moved, all the same on both sides (sha256 {})", moved.records, moved.sha256);
        }
        Keeping::Replica(ReplicaCommand::Init(args)) => {
            let name = moving::init_replica(&args.state, &args.trust_domain, args.etcd.config()?)?;
            println!("replica {name} is ready: `meshd-pki run --state {} ...`", args.state.display());
        }
        Keeping::Replica(ReplicaCommand::Remove(args)) => {
            moving::remove_replica(&args.state, &args.replica, SystemTime::now())?;
            println!("replica {} is forgotten; hosts learn with their next renewal", args.replica);
        }
        Keeping::Replica(ReplicaCommand::List(args)) => {
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

pub fn create(dir: &Path, now: SystemTime) -> Result<Backup, CommandError> {
    let state = StateDir::open(dir)?;
    state.check()?;
    Ok(Backups::new(dir).create(&state.database, now).map_err(StateError::from)?)
}

fn list(args: &BackupList) -> anyhow::Result<()> {
    let backups = Backups::new(&args.state).list()?;
    let whole =
        |backup: &Backup| check_file(&backup.path).map_or_else(|error| error.to_string(), |()| "whole".to_owned());
    match args.output {
        Output::Json => {
            let objects = backups.iter().map(|backup| {
                serde_json::json!({
                    "name": backup.name(), "file": backup.path, "bytes": backup.bytes, "state": whole(backup),
                })
            });
            println!("{}", serde_json::to_string_pretty(&objects.collect::<Vec<_>>())?);
        }
        Output::Text => {
            println!("{:<22} {:>12}  STATE", "NAME", "BYTES");
            backups.iter().for_each(|one| println!("{:<22} {:>12}  {}", one.name(), one.bytes, whole(one)));
        }
    }
    Ok(())
}

/// Puts a backup in place and says which.
pub fn restore(dir: &Path, from: Option<&Path>, now: SystemTime) -> anyhow::Result<PathBuf> {
    let _running = lock(dir)?;
    let listed = Backups::new(dir).list()?;
    let backup = match from {
        Some(from) => {
            let known = listed.into_iter().find(|backup| Path::new(&backup.name()) == from);
            known.unwrap_or_else(|| Backup { path: from.to_owned(), bytes: 0 })
        }
        None => listed.into_iter().find(|backup| check_file(&backup.path).is_ok()).ok_or_else(|| {
            anyhow::anyhow!("{} has no backup that is whole; give one with --from FILE", dir.join("backups").display())
        })?,
    };
    anyhow::ensure!(backup.path.exists(), "{}: no such backup; see `meshd-pki backup list`", backup.path.display());
    check_file(&backup.path)?;
    let restored = match EtcdConfig::read(dir)? {
        Some(config) => moving::restore_etcd(dir, &config, &backup.path, now)?,
        None => put_in_place(dir, &backup, "the operator asked for it".to_owned(), now)?,
    };
    note(dir, now, "restore", restored.problem())?;
    Ok(backup.path)
}

/// Whether there was an alarm.
pub fn acknowledge(dir: &Path, now: SystemTime) -> anyhow::Result<bool> {
    let Some(restored) = Restored::read(dir).filter(|restored| !restored.seen) else { return Ok(false) };
    let detail = restored.problem();
    Restored { seen: true, ..restored }.write(dir)?;
    note(dir, now, "restore_seen", detail)?;
    Ok(true)
}

fn note(dir: &Path, now: SystemTime, event: &'static str, detail: String) -> anyhow::Result<()> {
    let event = Event { event, result: "ok", detail: Some(detail), ..Event::default() };
    Ok(Audit::new(dir.join("audit.jsonl")).append(unix(now), &[event])?)
}
