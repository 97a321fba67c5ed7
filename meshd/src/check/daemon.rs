//! The daemon of this host: certificates, enrolment, rules, PKI, sources.

use std::net::TcpStream;
use std::time::{Duration, SystemTime};

use meshd_discovery::RegistrationHealth;
use meshd_pki_client::Credentials;

use super::finding::Finding;
use super::rules::RuleFacts;
use super::ruleset::Chain;
use crate::admin::{AdminError, PkiView, StatusView, TaskView};
use crate::capture::{self, Applied, BackendKind, CaptureError, StateFile, Wanted};
use crate::config::Config;
use crate::enrol::{EnrolError, Enrolment, Sight};
use crate::unix_time::unix_now;

/// A PKI address that does not answer within this time is reported.
const PKI_TIMEOUT: Duration = Duration::from_secs(2);
/// Certificates renew at 30-45 % of their life; one below this has missed many tries.
const EXPIRY_WARNING: Duration = Duration::from_secs(6 * 3600);

pub(super) fn certificates(credentials: &Credentials, now: SystemTime) -> Finding {
    let check = "certificates are valid for at least 6 h";
    let svids = std::iter::once(&credentials.host).chain(credentials.workloads.values());
    let short: Vec<String> = svids
        .filter(|svid| svid.not_after < now + EXPIRY_WARNING)
        .map(|svid| match svid.not_after.duration_since(now) {
            Ok(left) => format!("{} ends in {} min", svid.id, left.as_secs() / 60),
            Err(ended) => format!("{} EXPIRED {} min ago", svid.id, ended.duration().as_secs() / 60),
        })
        .collect();
    match short.is_empty() {
        true => Finding::ok(check, ""),
        false => Finding::failed(check, short.join(", "), "is the PKI reachable, and the clock right?"),
    }
}

/// `sight`: whether the daemon sees programs.
pub(super) fn permitted(credentials: &Credentials, enrolment: Option<&Enrolment>, sight: Sight) -> Finding {
    let check = "the PKI permits every enrolled identity";
    let mut refused: Vec<&str> = credentials.refused.values().map(String::as_str).collect();
    let mut enrolment = enrolment.cloned().unwrap_or_default();
    enrolment.withhold(&credentials.host_id, &credentials.selectors, sight);
    refused.extend(enrolment.withheld().iter().map(|withheld| &*withheld.why));
    match refused.is_empty() {
        true => Finding::ok(check, ""),
        false => Finding::failed(check, refused.join("; "), "each says what to do, here or on the PKI"),
    }
}

/// Nothing where nobody asked for it.
pub(super) fn programs(sight: Sight) -> Option<Finding> {
    let check = "programs can be seen ([workload_api] path_selectors)";
    match (sight, sight.remedy()) {
        (Sight::Off, _) => None,
        (_, None) => Some(Finding::ok(check, "CAP_SYS_PTRACE")),
        (_, Some(remedy)) => {
            let detail = "it is switched on, and meshd lacks CAP_SYS_PTRACE: identities whose entries name a program are had by \
                          nobody";
            Some(Finding::failed(check, detail, remedy))
        }
    }
}

/// Of the running daemon; without one, as it is configured.
pub(super) fn sight(config: &Config, status: &Result<StatusView, AdminError>) -> Sight {
    let labels = [Sight::Off, Sight::Blind, Sight::On];
    let told =
        status.as_ref().ok().and_then(|status| labels.into_iter().find(|one| one.label() == status.path_selectors));
    told.unwrap_or(if config.workload_api.path_selectors { Sight::On } else { Sight::Off })
}

pub(super) fn enrolment(loaded: &Result<Enrolment, EnrolError>) -> Finding {
    let check = "enrolment files are valid";
    match loaded {
        Ok(enrolment) => Finding::ok(check, format!("{} workloads", enrolment.workloads().len())),
        Err(error) => Finding::failed(check, error.to_string(), ""),
    }
}

pub(super) fn pki(credentials: &Credentials) -> Finding {
    let check = "the PKI is reachable";
    match credentials.pki.iter().any(|address| reach(address)) {
        true => Finding::ok(check, ""),
        false => Finding::warning(
            check,
            format!("none of {} answers", credentials.pki.join(", ")),
            "traffic goes on, but certificates are not renewed until one does",
        ),
    }
}

fn reach(address: &str) -> bool {
    let Ok(addresses) = std::net::ToSocketAddrs::to_socket_addrs(address) else { return false };
    addresses.into_iter().any(|address| TcpStream::connect_timeout(&address, PKI_TIMEOUT).is_ok())
}

/// What was recorded as applied, and whether the kernel still has it.
pub(super) fn rules(config: &Config, facts: &RuleFacts) -> Finding {
    let recorded = StateFile::new(&config.state_dir).read().map(|state| state.applied);
    let routed = recorded.as_ref().ok().and_then(Option::as_ref).map(capture::routes_are_there);
    judge_rules(recorded, facts.chains.iter().any(Chain::is_ours), routed)
}

/// `routed`: whether virtual IPs lead to this host.
fn judge_rules(
    applied: Result<Option<Applied>, CaptureError>,
    has_chains: bool,
    routed: Option<Result<bool, CaptureError>>,
) -> Finding {
    let check = "capture rules are installed";
    let gone = |what: &str| {
        Finding::failed(check, what.to_owned(), "start meshd; while it runs, it puts back what others remove")
    };
    let applied = match applied {
        Ok(Some(applied)) => applied,
        Ok(None) => {
            let remedy = "start meshd; after a revert, `meshd intercept apply`";
            return Finding::failed(check, "none are applied", remedy);
        }
        Err(error) => return Finding::failed(check, error.to_string(), ""),
    };
    match routed {
        Some(Err(error)) => Finding::failed(check, error.to_string(), ""),
        Some(Ok(true)) if has_chains || applied.backend == BackendKind::Tun => {
            Finding::ok(check, applied.backend.label())
        }
        Some(Ok(true)) => gone("meshd's chains are gone from the packet filter"),
        Some(Ok(false)) | None => gone("meshd's routes are gone"),
    }
}

/// What operators decided about capture, and may have forgotten.
pub(super) fn decisions(config: &Config) -> Vec<Finding> {
    let (as_configured, bypassed) = ("capture is as configured", "nothing bypasses the mesh");
    // A record that cannot be read is told above.
    let Ok(state) = StateFile::new(&config.state_dir).read() else { return Vec::new() };
    let plan = state.intent.as_ref().map(Wanted::hash).unwrap_or_default();
    let capture = if let Some(held) = state.held_as(&plan) {
        let detail = format!("the configured plan is held back: {}", held.why);
        let remedy = "change enrol.d, or run `meshd intercept apply` and then `meshd intercept confirm`";
        Finding::failed(as_configured, detail, remedy)
    } else if let Some(reverted) = &state.reverted {
        let detail = format!("all rules are removed ({})", reverted.why);
        Finding::failed(as_configured, detail, "`meshd intercept apply` puts them back")
    } else {
        Finding::ok(as_configured, "")
    };
    let bypass = match state.bypass.is_on() {
        false => Finding::ok(bypassed, ""),
        true => {
            let detail = format!("meshd is out of the way of {}", state.bypass.labels().join(", "));
            Finding::warning(bypassed, detail, "`meshd bypass off` ends it")
        }
    };
    vec![capture, bypass]
}

pub(super) fn running(status: &Result<StatusView, AdminError>) -> Vec<Finding> {
    let check = "the daemon is running";
    match status {
        Ok(status) => {
            let federation = federation(&status.pki, unix_now().cast_signed());
            vec![Finding::ok(check, ""), tasks(&status.tasks), sources(status), registrations(status), federation]
        }
        Err(error) => vec![Finding::failed(check, error.to_string(), "")],
    }
}

fn tasks(ended: &[TaskView]) -> Finding {
    let check = "no part of the daemon has ended";
    let said = ended.iter().map(TaskView::said).collect::<Vec<_>>().join("; ");
    match (ended.is_empty(), ended.iter().all(|task| task.is_running)) {
        (true, _) => Finding::ok(check, ""),
        (_, true) => Finding::warning(check, said, "that is a defect of meshd; please report it with the log"),
        (_, false) => Finding::failed(check, said, "restart meshd, and please report it with the log"),
    }
}

fn federation(pki: &PkiView, now: i64) -> Finding {
    let check = "bundles of federated trust domains are fresh";
    let refused =
        pki.federation_refused.iter().map(|(domain, why)| format!("that sent for {domain} is refused: {why}"));
    // While the PKI is away, which is told elsewhere, nobody knows how its publishers fare.
    let known_at = now.min(pki.last_heard_unix.unwrap_or(0));
    let stale = pki.federation.iter().filter_map(|one| one.stale(known_at));
    let problems: Vec<String> = refused.chain(stale).collect();
    match problems.is_empty() {
        true => Finding::ok(check, format!("{} of them", pki.federation.len())),
        false => Finding::warning(
            check,
            problems.join("; "),
            "the last good bundle stays in force; `meshd-pki federation list` says why",
        ),
    }
}

fn sources(status: &StatusView) -> Finding {
    let check = "discovery sources are healthy";
    let errors: Vec<String> = status
        .sources
        .iter()
        .flat_map(|source| source["errors"].as_array().cloned().unwrap_or_default())
        .filter_map(|error| error.as_str().map(str::to_owned))
        .collect();
    match errors.is_empty() {
        true => Finding::ok(check, ""),
        false => Finding::warning(check, errors.join("; "), "the last good state stays in force meanwhile"),
    }
}

fn registrations(status: &StatusView) -> Finding {
    let check = "what this host serves is registered";
    let said = |row: &RegistrationHealth| Some(format!("{} in {}: {}", row.service, row.source, row.error.as_ref()?));
    let errors: Vec<String> = status.registrations.iter().filter_map(said).collect();
    match errors.is_empty() {
        true => Finding::ok(check, format!("{} times", status.registrations.len())),
        false => {
            Finding::warning(check, errors.join("; "), "it is tried again by itself; what is registered stays for 10 s")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;
    use crate::admin::FederationView;
    use crate::capture::CaptureConfig;

    #[test]
    fn a_switch_without_the_capability_is_an_error_and_without_the_switch_nothing_is_said() {
        assert_eq!(programs(Sight::Off), None);
        assert_eq!(programs(Sight::On).unwrap().verdict, Verdict::Ok);
        let blind = programs(Sight::Blind).unwrap();
        assert!(blind.verdict == Verdict::Failed && blind.remedy.contains("AmbientCapabilities=CAP_SYS_PTRACE"));
    }

    #[test]
    fn a_part_that_ended_is_a_warning_once_it_runs_again_and_an_error_until_then() {
        assert_eq!(tasks(&[]).verdict, Verdict::Ok);
        let mut task = TaskView { task: "renewal".to_owned(), is_running: true, failures: 1, ..TaskView::default() };
        assert_eq!(tasks(&[task.clone()]).verdict, Verdict::Warning);
        task.is_running = false;
        assert_eq!(tasks(&[task]).verdict, Verdict::Failed);
    }

    fn verdict(backend: Option<BackendKind>, has_chains: bool, routed: bool) -> Verdict {
        let wanted = CaptureConfig::default().bare(15001);
        let applied = backend.map(|backend| Applied { backend, wanted });
        judge_rules(Ok(applied), has_chains, Some(Ok(routed))).verdict
    }

    #[test]
    fn a_bundle_that_is_refused_or_not_refreshed_is_a_warning() {
        let fresh = FederationView {
            trust_domain: "other.example".to_owned(),
            refresh_every_s: 300,
            last_good_unix: Some(1000),
            ..FederationView::default()
        };
        let heard = Some(1090);
        let mut pki = PkiView { federation: vec![fresh], last_heard_unix: heard, ..PkiView::default() };
        assert_eq!(federation(&pki, 1100).verdict, Verdict::Ok);
        assert_eq!(federation(&pki, 9000).verdict, Verdict::Ok, "the PKI was not heard of since");
        pki.last_heard_unix = Some(8990);
        assert_eq!(federation(&pki, 9000).verdict, Verdict::Warning);
        pki.federation_refused.insert("third.example".to_owned(), "no root".to_owned());
        assert_eq!(federation(&pki, 1100).verdict, Verdict::Warning);
    }

    #[test]
    fn rules_are_installed_when_chains_and_routes_are_there() {
        let tproxy = Some(BackendKind::NftTproxy);
        assert_eq!(verdict(tproxy, true, true), Verdict::Ok);
        assert_eq!(verdict(tproxy, false, true), Verdict::Failed);
        assert_eq!(verdict(tproxy, true, false), Verdict::Failed);
        assert_eq!(verdict(Some(BackendKind::Tun), false, true), Verdict::Ok);
        assert_eq!(verdict(None, true, true), Verdict::Failed);
    }
}
