//! `meshd-pki federation`.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use meshd_identity::TrustDomain;
use meshd_pki::federation::commands::{self, Asked, Endpoint};

use crate::Output;

#[derive(Subcommand)]
pub(crate) enum Federation {
    /// Follow the bundle of another trust domain, or change how.
    Add(Add),
    /// Show whose bundles are followed, and how that goes.
    List(List),
    /// Ask an endpoint again now.
    Refresh(Domain),
    /// Forget a trust domain: its identities are not believed any more.
    Remove(Domain),
}

#[derive(Args)]
pub(crate) struct Add {
    #[arg(long)]
    state: PathBuf,
    #[arg(long)]
    trust_domain: TrustDomain,
    /// https://HOST[:PORT]/PATH of its bundle endpoint.
    #[arg(long)]
    url: String,
    /// How the endpoint proves who it is.
    #[arg(long, value_enum)]
    profile: Profile,
    /// With https_spiffe: the SPIFFE ID of the endpoint.
    #[arg(long, required_if_eq("profile", "https_spiffe"))]
    spiffe_id: Option<String>,
    /// Bundle document of that trust domain to begin with; https_spiffe needs it the first time.
    #[arg(long)]
    bundle: Option<PathBuf>,
    /// With https_web: PEM file of the authorities to believe instead of the system's.
    #[arg(long)]
    ca: Option<PathBuf>,
    /// Identity of ours that may have dealings with that domain, as ns/<namespace>/sa/<name>, or `*` for all. May be
    /// repeated.
    #[arg(long = "for", required = true, num_args = 1..)]
    identities: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Profile {
    #[value(name = "https_web")]
    Web,
    #[value(name = "https_spiffe")]
    Spiffe,
}

#[derive(Args)]
pub(crate) struct List {
    #[arg(long)]
    state: PathBuf,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Args)]
pub(crate) struct Domain {
    #[arg(long)]
    state: PathBuf,
    #[arg(long)]
    trust_domain: TrustDomain,
}

impl Federation {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Federation::Add(args) => add(&args),
            Federation::List(args) => list(&args),
            Federation::Refresh(args) => {
                commands::refresh(&args.state, &args.trust_domain, SystemTime::now())?;
                println!("a running meshd-pki asks {} within seconds", args.trust_domain);
                Ok(())
            }
            Federation::Remove(args) => {
                commands::remove(&args.state, &args.trust_domain, SystemTime::now())?;
                println!("{} is not federated any more", args.trust_domain);
                Ok(())
            }
        }
    }
}

fn add(args: &Add) -> anyhow::Result<()> {
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let endpoint = match (args.profile, &args.spiffe_id) {
        (Profile::Spiffe, Some(spiffe_id)) => Endpoint::Spiffe { spiffe_id: spiffe_id.clone() },
        (Profile::Spiffe, None) => anyhow::bail!("https_spiffe needs --spiffe-id"),
        (Profile::Web, _) => {
            let authorities = args.ca.as_deref().map(read).transpose()?;
            Endpoint::Web { authorities: authorities.map(String::from_utf8).transpose().context("--ca: not PEM")? }
        }
    };
    let asked = Asked {
        trust_domain: args.trust_domain.clone(),
        url: &args.url,
        endpoint,
        identities: &args.identities,
        bundle: args.bundle.as_deref().map(read).transpose()?,
    };
    commands::add(&args.state, &asked, SystemTime::now())?;
    println!("{} is federated; `meshd-pki federation list` shows how following its bundle goes", args.trust_domain);
    Ok(())
}

fn list(args: &List) -> anyhow::Result<()> {
    let all = commands::list(&args.state)?;
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&all)?),
        Output::Text => {
            println!(
                "{:<28} {:<13} {:>16} {:>5}  {:<21} URL",
                "TRUST DOMAIN", "PROFILE", "SEQUENCE", "ROOTS", "LAST GOOD"
            );
            for one in &all {
                let sequence = one.sequence.map_or_else(|| "none yet".to_owned(), |sequence| sequence.to_string());
                let good = one.last_good.as_deref().unwrap_or("never");
                let (domain, profile, roots, url) = (&one.trust_domain, &one.profile, one.roots, &one.url);
                println!("{domain:<28} {profile:<13} {sequence:>16} {roots:>5}  {good:<21} {url}");
                println!("  for {}", one.identities.join(", "));
                if let Some(problem) = &one.problem {
                    println!("‼ {problem}");
                }
            }
        }
    }
    Ok(())
}
