//! `meshd bypass`: the kill switch.

use std::process::ExitCode;

use clap::ValueEnum;
use meshd::admin::AdminError;
use meshd::capture::{Caller, StateFile, manual};
use meshd::config::Config;
use meshd::enrol::Selector;

use super::intercept::{ensure_raw_is_let_go, follow};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

pub(crate) fn bypass(config: &Config, switch: Switch, unit: Option<&str>) -> anyhow::Result<ExitCode> {
    // The way out is kept by the word the plan has for it.
    let unit = unit.map(|unit| unit.parse::<Selector>().map(|selector| selector.to_string())).transpose()?;
    let unit = unit.as_deref();
    manual::switch_bypass(&config.state_dir, unit, switch == Switch::On)?;
    let followed = match follow(config) {
        Ok(()) => true,
        Err(error @ AdminError::Refused(_)) => return Err(error.into()),
        // It is not there, or hangs.
        Err(_) => {
            manual::settle_without_daemon(&config.state_dir)?;
            false
        }
    };
    let state = StateFile::new(&config.state_dir).read()?;
    let is_meant = |caller: &Caller| unit.is_none_or(|unit| caller.label() == unit);
    let calls_raw = state.intent.as_ref().is_some_and(|plan| plan.raw_callers.iter().any(is_meant));
    if !followed && switch == Switch::On && calls_raw {
        ensure_raw_is_let_go(config, "Strict ports take plaintext")?;
    }
    let is_server = || state.intent.as_ref().is_some_and(|plan| plan.strict.iter().any(|port| is_meant(&port.owner)));
    match (switch, unit) {
        (Switch::On, None) => {
            println!("meshd is out of the way: strict ports take plaintext, raw addresses go direct.");
        }
        (Switch::On, Some(unit)) => {
            println!(
                "meshd is out of the way of {unit}: its strict ports take plaintext, its raw addresses go direct."
            );
            if !calls_raw && !is_server() {
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
