//! The command line of the PKI.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use meshd_identity::TrustDomain;
use meshd_pki::commands::{self, TokenRequest};
use meshd_pki::lifetimes::Lifetimes;
use meshd_pki::serve::{serve, serve_metrics};
use meshd_pki::status::Status;
use meshd_pki::times::parse_duration;
use meshd_pki::{Options, Pki, state_dir};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The PKI of the mesh: enrols hosts and issues their certificates.
#[derive(Parser)]
#[command(name = "meshd-pki", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Create a PKI: its root, and the offline recovery key.
    Init(Init),
    /// Serve hosts until SIGTERM.
    Run(Run),
    /// Join tokens.
    #[command(subcommand)]
    Token(Token),
    /// Which host may hold which identity.
    #[command(subcommand)]
    Entry(Entry),
    /// What the PKI holds: authorities, hosts, open tokens, problems.
    Status(StatusArgs),
}

#[derive(Args)]
struct Init {
    /// Directory of the PKI; created, mode 0700.
    #[arg(long)]
    state: PathBuf,
    /// Name of the trust domain, for example prod.example.org. Never changes.
    #[arg(long)]
    trust_domain: TrustDomain,
    /// Where to write the recovery key; default: recovery.key in the state directory.
    #[arg(long)]
    recovery_key: Option<PathBuf>,
}

#[derive(Args)]
struct Run {
    #[arg(long)]
    state: PathBuf,
    /// Address and port to serve on.
    #[arg(long)]
    listen: SocketAddr,
    /// HOST:PORT at which hosts reach this PKI; goes into tokens and replies. May be repeated.
    #[arg(long, num_args = 1..)]
    advertise: Vec<String>,
    /// Serve Prometheus metrics here, in clear: use loopback.
    #[arg(long)]
    metrics: Option<SocketAddr>,
    /// Life of leaf certificates, for example 24h; a bare number is seconds.
    #[arg(long, default_value = "24h", value_parser = parse_duration)]
    leaf_ttl: Duration,
    /// Live in minutes what takes years: everything as short as this life of a leaf allows. For tests.
    #[arg(long, hide = true, conflicts_with = "leaf_ttl", value_parser = parse_duration)]
    rehearse: Option<Duration>,
}

#[derive(Subcommand)]
enum Token {
    /// Print a token that lets one host join once.
    Create(TokenCreate),
}

#[derive(Args)]
struct TokenCreate {
    #[arg(long)]
    state: PathBuf,
    /// Id the host will have.
    #[arg(long)]
    host: String,
    /// Identity the host may hold, as ns/<namespace>/sa/<name>. May be repeated.
    #[arg(long, num_args = 1..)]
    allow: Vec<String>,
    /// HOST:PORT of the PKI as the host sees it; default: what `run --advertise` said. May be repeated.
    #[arg(long, num_args = 1..)]
    pki: Vec<String>,
    /// How long the token can be used.
    #[arg(long, default_value = "1h", value_parser = parse_duration)]
    ttl: Duration,
}

#[derive(Subcommand)]
enum Entry {
    /// Permit a host an identity.
    Add(EntryArgs),
    /// Show what is permitted.
    List(EntryList),
    /// Take an identity away from a host.
    Remove(EntryArgs),
}

#[derive(Args)]
struct EntryArgs {
    #[arg(long)]
    state: PathBuf,
    #[arg(long)]
    host: String,
    /// ns/<namespace>/sa/<name>
    identity: String,
}

#[derive(Args)]
struct EntryList {
    #[arg(long)]
    state: PathBuf,
    #[arg(long)]
    host: Option<String>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Args)]
struct StatusArgs {
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

fn main() -> ExitCode {
    let cli = Cli::parse();
    harden();
    let done = match cli.command {
        Command::Init(args) => init(&args),
        Command::Run(args) => run(args),
        Command::Token(Token::Create(args)) => create_token(&args),
        Command::Entry(Entry::Add(args)) => add_entry(&args),
        Command::Entry(Entry::List(args)) => list_entries(&args),
        Command::Entry(Entry::Remove(args)) => remove_entry(&args),
        Command::Status(args) => return status(&args),
    };
    finish(done.map(|()| ExitCode::SUCCESS))
}

fn finish(done: anyhow::Result<ExitCode>) -> ExitCode {
    done.unwrap_or_else(|error| {
        eprintln!("meshd-pki: {error:#}");
        ExitCode::FAILURE
    })
}

/// Keys are in memory: no core dumps, no reading by other processes of the same user, no files for others.
fn harden() {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        eprintln!("meshd-pki: cannot switch core dumps off: {error}");
    }
}

fn init(args: &Init) -> anyhow::Result<()> {
    let made = state_dir::init(&args.state, &args.trust_domain, args.recovery_key.as_deref(), SystemTime::now())?;
    let hex = |bytes: &[u8]| data_encoding::HEXLOWER.encode(bytes);
    println!("trust domain    {}", made.trust_domain);
    println!("bundle          sha256 {}", hex(&made.bundle_digest));
    println!("recovery key    {} (id {})", made.recovery_key.display(), hex(&made.recovery_key_id));
    println!(
        "\nMove the recovery key to a safe place offline, now. It is the way back should this PKI be lost;\n\
         every host pins its public half when it joins. The PKI itself never needs it."
    );
    Ok(())
}

fn run(args: Run) -> anyhow::Result<()> {
    let wanted = std::env::var("RUST_LOG").ok().and_then(|filter| filter.parse::<Targets>().ok());
    let filter = wanted.unwrap_or_else(|| Targets::new().with_default(tracing::Level::INFO));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    tracing_subscriber::registry().with(lines).with(filter).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(serve_until_signal(args));
    // A call cut at the end of the drain time must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

async fn serve_until_signal(args: Run) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let options = Options {
        lifetimes: args
            .rehearse
            .map_or(Lifetimes { leaf: args.leaf_ttl, ..Lifetimes::default() }, Lifetimes::rehearsal),
        advertise: advertised(&args)?,
        ..Options::default()
    };
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("--listen {}: cannot bind; is another meshd-pki running?", args.listen))?;
    let pki = Arc::new(Pki::open(&args.state, options)?);
    if let Some(address) = args.metrics {
        let listener = TcpListener::bind(address).await.with_context(|| format!("--metrics {address}: cannot bind"))?;
        tokio::spawn(serve_metrics(pki.clone(), listener));
    }
    let address = listener.local_addr()?;
    println!("meshd-pki ready listen={address} trust_domain={}", pki.trust_domain);
    serve(pki, listener, async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
    .await;
    tracing::info!("stopped");
    Ok(())
}

/// Without --advertise, the listen address when it is one that can be dialled.
fn advertised(args: &Run) -> anyhow::Result<Vec<String>> {
    for address in &args.advertise {
        let port = address.rsplit_once(':').map(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        anyhow::ensure!(port == Some(true), "--advertise {address}: not HOST:PORT");
    }
    let listen = args.listen;
    if args.advertise.is_empty() && !listen.ip().is_unspecified() && listen.port() != 0 {
        return Ok(vec![listen.to_string()]);
    }
    Ok(args.advertise.clone())
}

fn create_token(args: &TokenCreate) -> anyhow::Result<()> {
    let request = TokenRequest { host: &args.host, allow: &args.allow, pki: &args.pki, ttl: args.ttl };
    println!("{}", commands::create_token(&args.state, &request, SystemTime::now())?);
    Ok(())
}

fn add_entry(args: &EntryArgs) -> anyhow::Result<()> {
    let new = commands::add_entry(&args.state, &args.host, &args.identity, SystemTime::now())?;
    let what = if new { "may now hold" } else { "already may hold" };
    println!("host {} {what} {}", args.host, args.identity);
    Ok(())
}

fn remove_entry(args: &EntryArgs) -> anyhow::Result<()> {
    commands::remove_entry(&args.state, &args.host, &args.identity, SystemTime::now())?;
    println!("host {} gets no new certificate for {}; the last one ends by itself", args.host, args.identity);
    Ok(())
}

fn list_entries(args: &EntryList) -> anyhow::Result<()> {
    let entries = commands::list_entries(&args.state, args.host.as_deref())?;
    match args.output {
        Output::Json => {
            let objects = entries.iter().map(|(host, id)| serde_json::json!({"host": host, "identity": id}));
            println!("{}", serde_json::to_string_pretty(&objects.collect::<Vec<_>>())?);
        }
        Output::Text => {
            println!("{:<20} IDENTITY", "HOST");
            entries.iter().for_each(|(host, id)| println!("{host:<20} {id}"));
        }
    }
    Ok(())
}

/// Exit code 2 when something needs attention, so that a script sees it.
fn status(args: &StatusArgs) -> ExitCode {
    finish(show_status(&args.state, args.output))
}

fn show_status(state: &Path, output: Output) -> anyhow::Result<ExitCode> {
    let status = Status::read(state, SystemTime::now())?;
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&status)?),
        Output::Text => print!("{}", status.to_text()),
    }
    Ok(if status.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(2) })
}
