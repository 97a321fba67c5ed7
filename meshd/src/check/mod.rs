//! `meshd check`: what is wrong on this host, and what to do about it.
//!
//! With `--pre`, before meshd is installed: can it run here, and what is in its way. One file per family of checks;
//! each first gathers facts, then judges them, so that judging needs no host. Nothing on the host is changed.

mod backend;
mod clock;
mod daemon;
mod finding;
mod host;
mod kernel;
mod marks;
mod network;
mod ports;
mod rules;
mod ruleset;
mod ssh;
mod tools;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::SystemTime;

use meshd_identity::TrustDomain;
use meshd_pki_client::{Agent, Credentials};

pub use finding::{Finding, Verdict, worst};

use crate::admin::{self, AdminError, StatusView};
use crate::app;
use crate::capture;
use crate::config::Config;
use crate::enrol::{self, EnrolError, Enrolment, Mode};
use marks::OurMark;

const CONFIGURATION: &str = "configuration is valid";

/// Whether this host, with its daemon, is all right.
pub async fn check(path: &Path) -> Vec<Finding> {
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) => return vec![Finding::failed(CONFIGURATION, error.to_string(), "")],
    };
    let mut findings = vec![Finding::ok(CONFIGURATION, path.display().to_string())];
    let joined = "host has joined the mesh";
    let status = status(&config).await;
    let sight = daemon::sight(&config, &status);
    match credentials(&config) {
        Ok(credentials) => {
            findings.push(Finding::ok(joined, credentials.host.id.to_string()));
            findings.push(daemon::certificates(&credentials, SystemTime::now()));
            let enrolment = enrolment(&config, &credentials.trust_domain);
            findings.push(daemon::permitted(&credentials, enrolment.as_ref().ok(), sight));
            findings.push(daemon::enrolment(&enrolment));
            findings.push(daemon::pki(&credentials));
            findings.extend(clock::judge(&clock::ClockFacts::gather(Some(&credentials))));
        }
        Err(error) => findings.push(Finding::failed(joined, error, "")),
    }
    findings.extend(daemon::programs(sight));
    let rules = rules::RuleFacts::gather(status.is_ok());
    findings.push(daemon::rules(&config, &rules));
    findings.extend(daemon::decisions(&config));
    findings.push(marks(&config, &rules));
    findings.extend(daemon::running(&status));
    findings
}

/// Whether meshd can run on this host, and what is in its way. The host need not have joined, nor have a
/// configuration: the defaults are judged then.
pub async fn before_install(path: &Path) -> Vec<Finding> {
    let (config, configuration) = match path.exists() {
        false => (Config::default(), Finding::ok("the default configuration will do", "")),
        true => match Config::load(path) {
            Ok(config) => (config, Finding::ok(CONFIGURATION, path.display().to_string())),
            Err(error) => (Config::default(), Finding::failed(CONFIGURATION, error.to_string(), "")),
        },
    };
    let credentials = credentials(&config).ok();
    let rules = rules::RuleFacts::gather(status(&config).await.is_ok());
    let listeners = ports::gather();
    let enrolment = claimed(&config, credentials.as_ref());
    let mut findings = vec![configuration];
    findings.extend(host::judge(&host::HostFacts::gather(&config)));
    let (capture, backend) = backend::check(config.capture.backend, &app::wanted(&config, &enrolment));
    findings.extend(tools::judge(&tools::ToolFacts::gather(), backend));
    findings.extend(kernel::judge(&kernel::KernelFacts::gather()));
    findings.push(capture);
    findings.extend(rules::judge(&rules, config.proxy.mesh_listen.first().map_or(0, std::net::SocketAddr::port)));
    findings.push(marks(&config, &rules));
    findings.extend(ports::judge(listeners.as_deref(), &ports::wishes(&config)));
    findings.push(ssh::judge(capture::lifeline(capture::own_session()), &strict(&enrolment)));
    findings.extend(network::judge(&network::NetworkFacts::gather(), &config.capture));
    findings.extend(clock::judge(&clock::ClockFacts::gather(credentials.as_ref())));
    findings
}

async fn status(config: &Config) -> Result<StatusView, AdminError> {
    admin::fetch(&config.admin_socket(), "/status").await
}

fn credentials(config: &Config) -> Result<Credentials, String> {
    let agent = Agent::open(&config.identity_dir()).map_err(|error| error.to_string())?;
    Ok(Credentials::clone(&agent.watch().borrow()))
}

fn enrolment(config: &Config, trust_domain: &TrustDomain) -> Result<Enrolment, EnrolError> {
    enrol::load(&config.enrol_dir, trust_domain, &config.reserved())
}

/// What enrol.d asks for, if it is there already; a mistake in it is `check`'s to report.
fn claimed(config: &Config, credentials: Option<&Credentials>) -> Enrolment {
    // Before joining there is no trust domain, and ports do not depend on it.
    let trust_domain = credentials.map_or_else(|| "not-joined.invalid".parse().ok(), |c| Some(c.trust_domain.clone()));
    trust_domain.and_then(|trust_domain| enrolment(config, &trust_domain).ok()).unwrap_or_default()
}

fn strict(enrolment: &Enrolment) -> BTreeSet<u16> {
    let strict = enrolment.deliveries().iter().filter(|delivery| delivery.mode == Mode::Strict);
    strict.map(|delivery| delivery.deliver.port()).collect()
}

fn marks(config: &Config, rules: &rules::RuleFacts) -> Finding {
    let ours = OurMark::of(&config.capture);
    let listed = ["-4", "-6"].into_iter().filter_map(|family| tools::look("ip", &["-j", family, "rule", "show"]));
    let mut uses = marks::in_chains(&rules.chains);
    uses.extend(listed.flat_map(|json| marks::in_policy_rules(&json, ours)));
    marks::judge(&uses, ours)
}
