//! The command line of the PKI.

mod cli;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use meshd_identity::TrustDomain;
use meshd_pki::federation::web::{WebCertificate, serve_web};
use meshd_pki::labels::Label;
use meshd_pki::lifetimes::Lifetimes;
use meshd_pki::rehearsal::refuse_in_earnest;
use meshd_pki::serve::{serve, serve_metrics};
use meshd_pki::status::Status;
use meshd_pki::times::parse_duration;
use meshd_pki::upstream::watch::{self, UpstreamFiles};
use meshd_pki::{Options, Pki, admin, commands, state_dir};
use meshd_pki_api::admin as wire;
use meshd_pki_api::admin::command::Command;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use self::cli::{Place, Terms};

/// The PKI of the mesh: enrols hosts and issues their certificates.
#[derive(Parser)]
#[command(name = "meshd-pki", version)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Create a PKI: its root, and the offline recovery key.
    Init(Init),
    /// Serve hosts until SIGTERM.
    Run(Run),
    /// Join tokens.
    #[command(subcommand)]
    Token(Token),
    /// Print where the PKI is and how to recognise it, for hosts that join by certificate or Kubernetes token. No secret.
    Pin(Pin),
    /// Which host may hold which identity.
    #[command(subcommand)]
    Entry(Entry),
    /// Roots and intermediates: what there is, what each waits for.
    #[command(subcommand)]
    Authority(cli::authority::Authority),
    /// Hosts: who they are, what they could be, and shutting one out.
    #[command(subcommand)]
    Host(cli::host::Host),
    /// Who is refused although their certificates are still valid.
    #[command(subcommand)]
    Deny(cli::deny::Deny),
    /// Which identities may use the Admin API.
    #[command(subcommand)]
    Role(cli::role::Role),
    /// The offline recovery key: its successor, and trust in a PKI that takes the place of a lost one.
    #[command(subcommand)]
    Recovery(cli::recovery::Recovery),
    /// Print a certificate request for an offline root.
    Csr(cli::upstream::Csr),
    /// Use an intermediate that an authority outside signed.
    Import(cli::upstream::Import),
    /// Other trust domains whose identities are believed.
    #[command(subcommand)]
    Federation(cli::federation::Federation),
    /// What the PKI holds: authorities, hosts, open tokens, problems.
    Status(StatusArgs),
    /// Copies of the database, made every hour and after each step of an authority.
    #[command(subcommand)]
    Backup(cli::backup::Backup),
    /// Put a backup in the place of the database; the server must be stopped.
    Restore(cli::backup::Restore),
    /// Move the records between the file of one server and an etcd for several; no server may run.
    Migrate(cli::replica::Migrate),
    /// The servers of a PKI in etcd.
    #[command(subcommand)]
    Replica(cli::replica::Replica),
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
    /// PEM file with an intermediate from outside, then its root; read again every 30 s.
    #[arg(long, requires = "upstream_key")]
    upstream_chain: Option<PathBuf>,
    /// PEM file with the key of that intermediate.
    #[arg(long, requires = "upstream_chain")]
    upstream_key: Option<PathBuf>,
    /// PEM file with its root, when the chain does not have it.
    #[arg(long, requires = "upstream_chain")]
    upstream_roots: Option<PathBuf>,
    /// Serve the trust bundle to other trust domains here, under --bundle-cert (SPIFFE Federation, https_web).
    #[arg(long, requires = "bundle_cert", requires = "bundle_key")]
    bundle_listen: Option<SocketAddr>,
    /// PEM file with the certificate chain of --bundle-listen; read again every 30 s.
    #[arg(long)]
    bundle_cert: Option<PathBuf>,
    /// PEM file with its key.
    #[arg(long)]
    bundle_key: Option<PathBuf>,
    /// Unix socket for the other commands; default: admin.sock in the state directory.
    #[arg(long)]
    admin_socket: Option<PathBuf>,
    /// User, uid or group:NAME that may read through that socket. Root and the PKI's own user may do everything.
    #[arg(long, num_args = 1..)]
    admin_readers: Vec<String>,
    /// File that says which machine certificates and Kubernetes tokens make hosts; read again every 30 s.
    #[arg(long)]
    attestors: Option<PathBuf>,
    /// Life of leaf certificates, for example 24h; a bare number is seconds.
    #[arg(long, default_value = "24h", value_parser = parse_duration)]
    leaf_ttl: Duration,
    /// Let the root before vouch for the one that signs, in every chain, for a month after each rotation: for verifiers
    /// of other makers that missed the new root.
    #[arg(long, value_name = "true|false", default_value_t = true, action = clap::ArgAction::Set)]
    bridge: bool,
    /// Live in minutes what takes years: everything as short as this life of a leaf allows. For tests.
    #[arg(long, hide = true, conflicts_with = "leaf_ttl", value_parser = parse_duration)]
    rehearse: Option<Duration>,
    /// Believe this machine's clock, whatever the PKI has on record. For once, after a clock was wrong for long.
    #[arg(long)]
    clock_is_right: bool,
}

#[derive(Subcommand)]
enum Token {
    /// Print a token that lets one host join once, or several (--max-uses).
    Create(TokenCreate),
}

#[derive(Args)]
struct TokenCreate {
    #[command(flatten)]
    place: Place,
    /// Id the host will have; with --max-uses, what the ids of the hosts begin with.
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
    /// Let several hosts join, each once: --host is then what their ids begin with, as in web-3f9a2c11d0.
    #[arg(long, default_value_t = 1)]
    max_uses: u32,
    /// Network the token can be used from, as in 10.1.0.0/16. May be repeated.
    #[arg(long, num_args = 1..)]
    from: Vec<IpNet>,
    /// KEY=VALUE the hosts are known by to entries (`entry add --label`). May be repeated.
    #[arg(long, num_args = 1..)]
    label: Vec<Label>,
}

#[derive(Args)]
struct Pin {
    #[arg(long)]
    state: PathBuf,
    /// HOST:PORT of the PKI as hosts see it; default: what `run --advertise` said. May be repeated.
    #[arg(long, num_args = 1..)]
    pki: Vec<String>,
}

#[derive(Subcommand)]
enum Entry {
    /// Permit a host, or all hosts with some labels, an identity; again to change the terms.
    Add(EntryAdd),
    /// Show what is permitted.
    List(EntryList),
    /// Take an identity away from a host, or from all hosts with some labels.
    Remove(EntryArgs),
}

#[derive(Args)]
struct EntryAdd {
    #[command(flatten)]
    entry: EntryArgs,
    #[command(flatten)]
    terms: Terms,
}

#[derive(Args)]
#[command(group(ArgGroup::new("parent").required(true).args(["host", "label"])))]
struct EntryArgs {
    #[command(flatten)]
    place: Place,
    #[arg(long)]
    host: Option<String>,
    /// KEY=VALUE of the hosts meant (`token create --label`, --attestors); with several, hosts that have all of them.
    #[arg(long)]
    label: Vec<Label>,
    /// ns/<namespace>/sa/<name>
    identity: String,
}

#[derive(Args)]
struct EntryList {
    #[command(flatten)]
    place: Place,
    #[arg(long)]
    host: Option<String>,
}

#[derive(Args)]
struct StatusArgs {
    #[arg(long)]
    state: PathBuf,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Default, ValueEnum)]
pub(crate) enum Output {
    #[default]
    Text,
    Json,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    harden();
    let done = match cli.command {
        Verb::Init(args) => init(&args),
        Verb::Run(args) => run(args),
        Verb::Token(Token::Create(args)) => create_token(args),
        Verb::Pin(args) => pin(&args),
        Verb::Entry(Entry::Add(args)) => add_entry(args),
        Verb::Entry(Entry::List(args)) => list_entries(args),
        Verb::Entry(Entry::Remove(args)) => remove_entry(args),
        Verb::Authority(command) => command.run(),
        Verb::Host(command) => command.run(),
        Verb::Deny(command) => command.run(),
        Verb::Role(command) => command.run(),
        Verb::Recovery(command) => command.run(),
        Verb::Csr(command) => command.run(),
        Verb::Import(command) => command.run(),
        Verb::Federation(command) => command.run(),
        Verb::Status(args) => return status(&args),
        Verb::Backup(command) => command.run(),
        Verb::Restore(args) => args.run(),
        Verb::Migrate(args) => args.run(),
        Verb::Replica(command) => command.run(),
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
    let (upstream_chain, upstream_key) = (args.upstream_chain.clone(), args.upstream_key.clone());
    let roots = args.upstream_roots.clone();
    let upstream = upstream_chain.zip(upstream_key).map(|(chain, key)| UpstreamFiles { chain, key, roots });
    let rehearsed = args.rehearse.map(Lifetimes::rehearsal);
    if let Some(lifetimes) = &rehearsed {
        refuse_in_earnest(&args.state, lifetimes)?;
    }
    let lifetimes = rehearsed.unwrap_or(Lifetimes { leaf: args.leaf_ttl, ..Lifetimes::default() });
    let bridge = if args.bridge { lifetimes.bridge } else { Duration::ZERO };
    let options = Options {
        lifetimes: Lifetimes { bridge, ..lifetimes },
        advertise: advertised(&args)?,
        clock_is_right: args.clock_is_right,
        attestors: args.attestors.clone(),
        upstream: upstream.clone(),
        ..Options::default()
    };
    let readers = admin::Readers::parse(&args.admin_readers).map_err(|why| anyhow!("--admin-readers: {why}"))?;
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("--listen {}: cannot bind; is another meshd-pki running?", args.listen))?;
    let pki = Arc::new(Pki::open(&args.state, options)?);
    let socket = args.admin_socket.unwrap_or_else(|| args.state.join(admin::SOCKET));
    let operators =
        admin::bind(&socket, &readers).with_context(|| format!("--admin-socket {}: cannot bind", socket.display()))?;
    tokio::spawn(admin::serve_socket(pki.clone(), operators, readers));
    if let Some(address) = args.metrics {
        let listener = TcpListener::bind(address).await.with_context(|| format!("--metrics {address}: cannot bind"))?;
        tokio::spawn(serve_metrics(pki.clone(), listener));
    }
    let upstream = upstream.map(|files| tokio::spawn(watch::watch(pki.clone(), files)));
    let bundles = match (args.bundle_listen, args.bundle_cert, args.bundle_key) {
        (Some(address), Some(chain), Some(key)) => {
            let certificate =
                WebCertificate::load(chain, key).map_err(|reason| anyhow::anyhow!("--bundle-cert: {reason}"))?;
            let listener =
                TcpListener::bind(address).await.with_context(|| format!("--bundle-listen {address}: cannot bind"))?;
            Some(tokio::spawn(serve_web(pki.clone(), listener, Arc::new(certificate))))
        }
        _ => None,
    };
    let address = listener.local_addr()?;
    println!("meshd-pki ready listen={address} trust_domain={}", pki.trust_domain);
    serve(pki, listener, async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
    .await;
    for task in bundles.into_iter().chain(upstream) {
        task.abort();
    }
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

fn create_token(args: TokenCreate) -> anyhow::Result<()> {
    let TokenCreate { place, host, allow, pki, ttl, max_uses, from, label } = args;
    let (from, labels) = (texts(&from), texts(&label));
    place.run(Command::TokenCreate(wire::TokenCreate {
        host,
        allow,
        pki,
        ttl_s: ttl.as_secs(),
        max_uses,
        from,
        labels,
    }))
}

fn pin(args: &Pin) -> anyhow::Result<()> {
    println!("{}", commands::pin(&args.state, &args.pki)?);
    Ok(())
}

fn add_entry(args: EntryAdd) -> anyhow::Result<()> {
    let EntryAdd { entry: EntryArgs { place, host, label, identity }, terms } = args;
    let (host, labels) = (host.unwrap_or_default(), texts(&label));
    place.run(Command::EntryAdd(terms.of(wire::EntryAdd { host, identity, labels, ..wire::EntryAdd::default() })))
}

fn remove_entry(args: EntryArgs) -> anyhow::Result<()> {
    let EntryArgs { place, host, label, identity } = args;
    let (host, labels) = (host.unwrap_or_default(), texts(&label));
    place.run(Command::EntryRemove(wire::EntryRemove { host, identity, labels }))
}

fn list_entries(args: EntryList) -> anyhow::Result<()> {
    let EntryList { place, host } = args;
    place.run(Command::EntryList(wire::EntryList { host: host.unwrap_or_default() }))
}

fn texts<T: ToString>(all: &[T]) -> Vec<String> {
    all.iter().map(T::to_string).collect()
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
