//! `meshd`: arguments -> configuration -> what was asked for -> exit code.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use meshd::admin::{self, EdgeView, StatusView, Verdict};
use meshd::app::App;
use meshd::capture;
use meshd::config::Config;
use meshd_identity::JoinToken;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

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
    /// Make this host a member of the mesh, with a one-use token from `meshd-pki token create`.
    Join {
        /// File with the token; `-` reads standard input. Never on the command line: it is a secret.
        #[arg(long, value_name = "PATH|-")]
        token_file: PathBuf,
        /// The host's id; default is the one the token was made for.
        #[arg(long)]
        host: Option<String>,
    },
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
    /// Look for what is wrong on this host, with remedies. Exit code 1 when something is.
    Check {
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// The kernel rules that hand connections to meshd.
    Intercept {
        #[command(subcommand)]
        action: Intercept,
    },
}

#[derive(Subcommand)]
enum Intercept {
    /// Print the rules that `run` installs for no strict ports.
    Plan,
    /// Remove meshd's rules and routes; works without the daemon, and touches nothing else.
    Revert,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    #[default]
    Table,
    Json,
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
        Command::Join { token_file, host } => join(&load(&cli.config)?, token_file, host.as_deref()),
        Command::Run => run(&load(&cli.config)?, &cli.config),
        Command::Status { output } => status(&load(&cli.config)?, *output),
        Command::Edges { output } => edges(&load(&cli.config)?, *output),
        Command::Check { output } => check(&cli.config, *output),
        Command::Intercept { action } => intercept(&cli.config, action),
    }
}

fn load(path: &Path) -> anyhow::Result<Config> {
    Ok(Config::load(path)?)
}

/// Control work needs one thread: the data plane has threads of its own.
fn on_runtime<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

fn join(config: &Config, token_file: &Path, host: Option<&str>) -> anyhow::Result<ExitCode> {
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

fn run(config: &Config, path: &Path) -> anyhow::Result<ExitCode> {
    log();
    raise_descriptor_limit();
    // One arena per worker and one for everything else.
    meshd_sys::memory::tune(config.proxy.worker_count() + 1);
    on_runtime(async {
        App::start(config.clone(), path).await?.run().await?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Each connection takes a descriptor; the usual soft limit of 1024 is for programs that use select(2).
fn raise_descriptor_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open descriptors; connections beyond it are refused");
    }
}

/// To standard error, for journald; `RUST_LOG=debug` or `RUST_LOG=meshd::transport=debug,info` says how much.
fn log() {
    let wanted = std::env::var("RUST_LOG").ok().and_then(|filter| filter.parse::<Targets>().ok());
    let filter = wanted.unwrap_or_else(|| Targets::new().with_default(tracing::Level::INFO));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(lines).with(filter).init();
}

fn status(config: &Config, output: Output) -> anyhow::Result<ExitCode> {
    let status: StatusView = on_runtime(async { Ok(admin::fetch(&config.admin_socket(), "/status").await?) })?;
    match output {
        Output::Table => print!("{}", admin::status(&status)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&status)?),
    }
    Ok(ExitCode::SUCCESS)
}

fn edges(config: &Config, output: Output) -> anyhow::Result<ExitCode> {
    let edges: Vec<EdgeView> = on_runtime(async { Ok(admin::fetch(&config.admin_socket(), "/edges").await?) })?;
    match output {
        Output::Table => print!("{}", admin::edges(&edges)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&edges)?),
    }
    Ok(ExitCode::SUCCESS)
}

fn check(path: &Path, output: Output) -> anyhow::Result<ExitCode> {
    let findings = on_runtime(async { Ok(admin::check(path).await) })?;
    match output {
        Output::Table => findings.iter().for_each(|finding| println!("{}", finding.line())),
        Output::Json => println!("{}", serde_json::to_string_pretty(&findings)?),
    }
    let failed = findings.iter().any(|finding| finding.verdict == Verdict::Failed);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn intercept(path: &Path, action: &Intercept) -> anyhow::Result<ExitCode> {
    match action {
        Intercept::Plan => {
            let config = load(path)?;
            print!("{}", capture::render(&config.capture, config.proxy.capture_port, 0, &[]));
        }
        Intercept::Revert => {
            // The way out must work when everything else is broken, the configuration included.
            let config = load(path).unwrap_or_else(|error| {
                eprintln!("meshd: {error:#}; reverting what the default configuration installs");
                Config::default()
            });
            capture::revert(&config.capture)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
