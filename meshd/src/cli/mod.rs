//! The verbs of the command line, one file per family.

pub(crate) mod bypass;
pub(crate) mod endpoints;
pub(crate) mod enrol;
pub(crate) mod inspect;
pub(crate) mod intercept;
pub(crate) mod join;
pub(crate) mod ledger;
pub(crate) mod probe;
pub(crate) mod resources;
pub(crate) mod run;
pub(crate) mod validate;

use std::io::ErrorKind;
use std::time::Duration;

use anyhow::Context;
use clap::ValueEnum;
use meshd::config::Config;
use meshd_identity::TrustDomain;
use meshd_pki_client::{Agent, StoreError};

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    #[default]
    Table,
    Json,
}

/// Control work needs one thread: the data plane has threads of its own.
pub(crate) fn on_runtime<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// A number and its unit.
pub(crate) fn time(text: &str) -> anyhow::Result<Duration> {
    let wrong = || format!("`{text}` is no time; write a number and s, m, h or d, like 7d");
    let unit = text.chars().last().with_context(wrong)?;
    let number: u64 = text[..text.len() - unit.len_utf8()].parse().with_context(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => anyhow::bail!(wrong()),
    };
    Ok(Duration::from_secs(number.checked_mul(seconds).with_context(wrong)?))
}

/// What this host has joined, as its identity says.
pub(crate) fn trust_domain(config: &Config) -> anyhow::Result<TrustDomain> {
    let agent = Agent::open(&config.identity_dir()).map_err(|error| match &error {
        StoreError::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => anyhow::Error::new(error)
            .context("only root and meshd's user may read this host's identity: run this as root"),
        _ => error.into(),
    })?;
    Ok(agent.watch().borrow().trust_domain.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_a_number_and_a_unit() {
        assert_eq!(time("7d").unwrap(), Duration::from_secs(7 * 86_400));
        assert_eq!(time("90s").unwrap(), Duration::from_secs(90));
        for wrong in ["", "7", "d", "7w", "-1d", "7 d", "99999999999999999999d", "7é"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }
}
