//! `meshd intercept`: the kernel rules that hand connections to meshd.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Subcommand;
use meshd::admin::{self, AdminError, ApplyOrder, InterceptPlan, InterceptStatus};
use meshd::app;
use meshd::capture::manual::{self, Pending};
use meshd::capture::{self, StateFile, Wanted, timer};
use meshd::config::Config;
use meshd::dns;
use meshd::enrol;
use meshd::only_one;

use super::{Output, on_runtime, run, time, trust_domain};

#[derive(Subcommand)]
pub(crate) enum Intercept {
    /// Show the rules that would be in force, and the connections of this host they would change.
    Plan {
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Have the daemon put the plan in force; one that was never confirmed is taken back unless you confirm it.
    Apply {
        /// How long you have for `meshd intercept confirm`; units s, m.
        #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
        confirm_within: Duration,
    },
    /// You can still get in: keep the plan in force, now and whenever it is applied again.
    Confirm,
    /// Remove meshd's rules and routes, and what makes programs ask its DNS; works without the daemon, and touches
    /// nothing else.
    Revert {
        /// Wait for the revert timer to run out first; how the timer runs.
        #[arg(long, value_name = "PLAN", hide = true)]
        unless_confirmed: Option<String>,
    },
    /// What is in force, and what operators decided about it.
    Status {
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
}

pub(crate) fn run(path: &Path, action: &Intercept) -> anyhow::Result<ExitCode> {
    match action {
        Intercept::Plan { output } => plan(path, *output)?,
        Intercept::Apply { confirm_within } => apply(path, *confirm_within)?,
        Intercept::Confirm => confirm(&Config::load(path)?)?,
        Intercept::Revert { unless_confirmed: None } => revert(path)?,
        Intercept::Revert { unless_confirmed: Some(hash) } => revert_unless_confirmed(path, hash)?,
        Intercept::Status { output } => status(&Config::load(path)?, *output)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A plan as the files say it, and that locks nobody out.
struct Planned {
    config: Config,
    wanted: Wanted,
    live: capture::Live,
}

fn planned(path: &Path) -> anyhow::Result<Planned> {
    let config = Config::load(path)?;
    let enrolment = enrol::load(&config.enrol_dir, &trust_domain(&config)?, &config.reserved())?;
    let wanted = Wanted { daemon_uid: daemon_uid(&config)?, ..app::wanted(&config, &enrolment) };
    let live = capture::look(&wanted, capture::own_session())?;
    capture::refuse_lockout(&enrolment, &wanted, &live)?;
    Ok(Planned { config, wanted, live })
}

/// Whose sockets the rules believe: the running daemon's user, otherwise the owner of its identity.
fn daemon_uid(config: &Config) -> anyhow::Result<u32> {
    let of = |path: PathBuf| std::fs::metadata(path).map(|found| found.uid());
    of(config.admin_socket())
        .or_else(|_| of(config.identity_dir()))
        .with_context(|| format!("cannot look at {}; run this as root", config.identity_dir().display()))
}

fn plan(path: &Path, output: Output) -> anyhow::Result<()> {
    let Planned { config, wanted, live } = planned(path)?;
    let state = StateFile::new(&config.state_dir).read()?;
    let chosen = capture::choose(config.capture.backend, &wanted)?;
    let plan = InterceptPlan::new(&wanted, &live, &state, &enrol::PortMemory::new(&config.state_dir), &chosen);
    match output {
        Output::Table => print!("{plan}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&plan)?),
    }
    Ok(())
}

fn apply(path: &Path, within: Duration) -> anyhow::Result<()> {
    let Planned { config, wanted, .. } = planned(path)?;
    let plan = wanted.hash();
    let order = ApplyOrder { plan: plan.clone() };
    let put_in_force =
        || on_runtime(async { Ok(admin::order(&config.admin_socket(), "/intercept/apply", &order).await) });
    if StateFile::new(&config.state_dir).read()?.is_confirmed(&plan) {
        put_in_force()??;
        println!("plan {plan} is in force; it was confirmed before, so it stays");
        return Ok(());
    }
    let armed = manual::arm(&config.state_dir, &plan, within)?;
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let started = timer::start(&program, &std::path::absolute(path)?, &plan, within);
    if let Err(error) = started.context("cannot start the revert timer, so nothing was applied") {
        manual::disarm(&config.state_dir, armed)?;
        return Err(error);
    }
    match put_in_force()? {
        Ok(_) => {}
        // The daemon says that it did nothing, or is not there.
        Err(error @ (AdminError::Refused(_) | AdminError::Connect { .. })) => {
            manual::disarm(&config.state_dir, armed)?;
            return Err(error.into());
        }
        // It may have changed the rules before it died: the timer must stay.
        Err(error) => {
            return Err(error).context(format!(
                "whether plan {plan} is in force is not known; it is taken back in {} s unless you run `meshd intercept \
                 confirm`",
                within.as_secs()
            ));
        }
    }
    println!(
        "plan {plan} is in force\nIt is taken back in {} s, also if meshd dies or this session ends, unless you run\n    \
         meshd intercept confirm\nCheck first that you can still log in, from another terminal.",
        within.as_secs()
    );
    Ok(())
}

fn confirm(config: &Config) -> anyhow::Result<()> {
    let confirmed = manual::confirm(&config.state_dir)?;
    let timer = if confirmed.disarmed { "; the revert timer is off" } else { "" };
    println!("plan {} is confirmed and stays{timer}", confirmed.hash);
    Ok(())
}

/// The way out must work when everything else is broken, the configuration included.
pub(crate) fn config_or_defaults(path: &Path) -> Config {
    Config::load(path).unwrap_or_else(|error| {
        eprintln!("meshd: {error:#}; reverting what the default configuration installs");
        Config::default()
    })
}

fn revert(path: &Path) -> anyhow::Result<()> {
    run::log();
    let config = config_or_defaults(path);
    let why = "meshd intercept revert";
    let told = manual::forbid(&config.state_dir, why);
    // What only the daemon can let go of; all else is removed here, also if it hangs.
    if let Err(error) = follow(&config) {
        tracing::debug!(%error, "no daemon takes part");
    }
    let removed = manual::revert(&config.state_dir, why, &config.capture.bare(config.proxy.capture_port));
    // Whichever fails, the other is tried.
    dns::integrate::remove(&config.dns, &config.state_dir)?;
    removed?;
    told?;
    ensure_raw_is_let_go(&config, "All other rules and routes are removed")
}

/// What a daemon that hangs still holds is told, not passed over; so is `otherwise`, what was done nonetheless.
pub(super) fn ensure_raw_is_let_go(config: &Config, otherwise: &str) -> anyhow::Result<()> {
    if !manual::raw_is_held() {
        return Ok(());
    }
    let (who, remedy) = match only_one::running(&config.state_dir) {
        Some(pid) => (format!("meshd (process {pid}), which does not answer"), format!("end it: kill -KILL {pid}")),
        None => ("a process that is not known".to_owned(), "find it: nft list table inet meshd_raw".to_owned()),
    };
    bail!(
        "connections to raw addresses are still captured: table inet meshd_raw is held by {who}, and goes when that \
         ends; {remedy}. {otherwise}"
    )
}

/// Has a running daemon do at once what the state on disk says.
pub(super) fn follow(config: &Config) -> Result<(), AdminError> {
    let socket = config.admin_socket();
    let ordered = on_runtime(async { Ok(admin::order(&socket, "/intercept/follow", &()).await) });
    ordered.unwrap_or_else(|error| Err(AdminError::Answer(error.to_string()))).map(drop)
}

/// The revert timer itself.
fn revert_unless_confirmed(path: &Path, hash: &str) -> anyhow::Result<()> {
    // Fails for a process that leads its session already, which is just as well.
    let _ = nix::unistd::setsid();
    println!("{}", timer::ARMED);
    let config = config_or_defaults(path);
    on_runtime(async {
        while let Pending::Wait(left) = manual::pending(&config.state_dir) {
            tokio::time::sleep(left.min(Duration::from_secs(1))).await;
        }
        Ok(())
    })?;
    let bare = config.capture.bare(config.proxy.capture_port);
    Ok(manual::expire(&config.state_dir, hash, &bare)?)
}

fn status(config: &Config, output: Output) -> anyhow::Result<()> {
    let state = StateFile::new(&config.state_dir).read()?;
    let daemon = on_runtime(async { Ok(admin::fetch(&config.admin_socket(), "/intercept").await) })?.ok();
    let status = InterceptStatus::new(&state, daemon);
    match output {
        Output::Table => print!("{status}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&status)?),
    }
    Ok(())
}

fn duration(text: &str) -> anyhow::Result<Duration> {
    let within = if text.bytes().all(|byte| byte.is_ascii_digit()) { time(&format!("{text}s"))? } else { time(text)? };
    ensure!((1..=3600).contains(&within.as_secs()), "give between 1s and 60m");
    Ok(within)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units_and_bounds() {
        assert_eq!(duration("60s").unwrap(), Duration::from_secs(60));
        assert_eq!(duration("2m").unwrap(), Duration::from_secs(120));
        for wrong in ["", "s", "2h", "0s", "61m", "-1s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
