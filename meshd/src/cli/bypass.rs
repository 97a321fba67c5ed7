//! `meshd bypass`: the kill switch.

use std::process::ExitCode;

use anyhow::ensure;
use clap::ValueEnum;
use meshd::admin::AdminError;
use meshd::capture::{StateFile, manual};
use meshd::config::Config;

use super::intercept::follow;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

pub(crate) fn bypass(config: &Config, switch: Switch, unit: Option<&str>) -> anyhow::Result<ExitCode> {
    if let Some(unit) = unit {
        ensure!(
            ["uid:", "port:"].iter().any(|kind| unit.starts_with(kind)) || unit.contains('.'),
            "`{unit}` names no unit; write it with its kind, like `{unit}.service`, or `uid:1001`"
        );
    }
    manual::switch_bypass(&config.state_dir, unit, switch == Switch::On)?;
    match follow(config) {
        Err(AdminError::Connect { .. }) => manual::settle_without_daemon(&config.state_dir)?,
        followed => followed?,
    }
    let state = StateFile::new(&config.state_dir).read()?;
    let concerned = |unit: &str| {
        state.intent.as_ref().is_some_and(|plan| {
            plan.strict.iter().map(|strict| &strict.owner).chain(&plan.raw_callers).any(|caller| caller.label() == unit)
        })
    };
    match (switch, unit) {
        (Switch::On, None) => {
            println!("meshd is out of the way: strict ports take plaintext, raw addresses go direct.");
        }
        (Switch::On, Some(unit)) => {
            println!(
                "meshd is out of the way of {unit}: its strict ports take plaintext, its raw addresses go direct."
            );
            if !concerned(unit) {
                println!("Note: the plan in force has neither a strict port nor raw capture of {unit}.");
            }
        }
        (Switch::Off, _) if state.bypass.is_on() => {
            println!("The bypass is still on for {}.", state.bypass.labels().join(", "));
        }
        (Switch::Off, _) => println!("The bypass is off: what is configured is in force."),
    }
    if switch == Switch::On {
        println!(
            "Virtual IPs (names of the mesh) exist only in the mesh and stay captured.\nIt lasts, also over restarts, \
             until `meshd bypass off`."
        );
    }
    Ok(ExitCode::SUCCESS)
}
