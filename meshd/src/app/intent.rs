//! What is asked of the kernel, and of discovery, out of meshd.toml and enrol.d.

use std::collections::BTreeSet;

use crate::capture::{self, Caller, StrictPort, Wanted};
use crate::config::Config;
use crate::enrol::{ClientAddress, Delivery, Enrolment, Mode, Selector};

/// What is wanted, if it locks nobody out.
pub(super) fn planned(config: &Config, enrolment: &Enrolment) -> Result<Wanted, capture::CaptureError> {
    let wanted = wanted(config, enrolment);
    capture::refuse_lockout(enrolment, &wanted, &capture::look(&wanted, None)?)?;
    Ok(wanted)
}

/// What remote sources are asked for in any case: what is declared, and services whose raw addresses are captured.
pub(super) fn imported(config: &Config) -> meshd_discovery::Wanted {
    let mut wanted = config.imports.declared().cloned().unwrap_or_default();
    wanted.services.extend(config.capture.raw.iter().cloned());
    wanted
}

/// What the configuration and the enrolled workloads ask of the kernel.
pub fn wanted(config: &Config, enrolment: &Enrolment) -> Wanted {
    let enrolled: BTreeSet<Caller> = enrolment.workloads().iter().map(|workload| caller(&workload.selector)).collect();
    let of_mode = |mode| enrolment.claimed_deliveries().filter(move |delivery| delivery.mode == mode);
    Wanted {
        strict: of_mode(Mode::Strict).map(|delivery| strict_port(delivery)).collect(),
        raw_callers: match config.capture.raw.is_empty() {
            true => BTreeSet::new(),
            false => enrolled.clone(),
        },
        enrolled,
        permissive: of_mode(Mode::Permissive).map(|delivery| delivery.deliver.port()).collect(),
        transparent: enrolment
            .deliveries()
            .iter()
            .filter(|delivery| delivery.client_address == ClientAddress::Transparent)
            .map(|delivery| delivery.deliver)
            .collect(),
        ..config.capture.bare(config.proxy.capture_port)
    }
}

fn strict_port(delivery: &Delivery) -> StrictPort {
    let owner = caller(&delivery.owner.selector);
    let local = delivery.local_ok.iter().map(|uid| Caller::Uid(*uid)).chain([owner.clone()]).collect();
    StrictPort {
        port: delivery.deliver.port(),
        owner,
        local,
        plaintext_from: delivery.plaintext_from.iter().copied().collect(),
    }
}

/// The processes of a workload, as rules can tell them.
fn caller(selector: &Selector) -> Caller {
    match selector {
        Selector::Unit(_) | Selector::Scope(_) => Caller::Unit(selector.to_string()),
        Selector::Uid(uid) => Caller::Uid(*uid),
        Selector::Port(port) => Caller::Port(*port),
    }
}
