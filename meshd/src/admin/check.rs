//! `meshd check`: is this host all right, and if not, what to do.

use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, SystemTime};

use meshd_pki_client::{Agent, Credentials};
use serde::Serialize;

use super::client::fetch;
use super::view::StatusView;
use crate::config::Config;
use crate::enrol;

/// A PKI address that does not answer within this time is reported.
const PKI_TIMEOUT: Duration = Duration::from_secs(2);
/// Certificates renew at 30-45 % of their life; one below this has missed many tries.
const EXPIRY_WARNING: Duration = Duration::from_secs(6 * 3600);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    Warning,
    Failed,
}

/// One checked thing.
#[derive(Debug, Serialize)]
pub struct Finding {
    pub check: &'static str,
    pub verdict: Verdict,
    /// What is wrong, and what to do about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

impl Finding {
    fn new(check: &'static str, result: Result<(), String>, otherwise: Verdict) -> Finding {
        match result {
            Ok(()) => Finding { check, verdict: Verdict::Ok, detail: String::new() },
            Err(detail) => Finding { check, verdict: otherwise, detail },
        }
    }

    /// As Linkerd prints it: `√ ok`, `‼ warning`, `× failed`.
    pub fn line(&self) -> String {
        let mark = match self.verdict {
            Verdict::Ok => "√",
            Verdict::Warning => "‼",
            Verdict::Failed => "×",
        };
        match self.detail.is_empty() {
            true => format!("{mark} {}", self.check),
            false => format!("{mark} {}\n    {}", self.check, self.detail),
        }
    }
}

/// Everything that can be looked at from this host, worst last in no particular order.
pub async fn check(config_path: &Path) -> Vec<Finding> {
    let config = match Config::load(config_path) {
        Ok(config) => config,
        Err(error) => return vec![Finding::new("configuration is valid", Err(error.to_string()), Verdict::Failed)],
    };
    let mut findings = vec![Finding::new("configuration is valid", Ok(()), Verdict::Failed)];
    match Agent::open(&config.identity_dir()) {
        Ok(agent) => {
            let credentials = agent.watch().borrow().clone();
            findings.push(Finding::new("host has joined the mesh", Ok(()), Verdict::Failed));
            findings.push(expiry(&credentials));
            findings.push(permitted(&credentials));
            findings.push(enrolment(&config, &credentials));
            findings.push(pki(&credentials));
        }
        Err(error) => findings.push(Finding::new("host has joined the mesh", Err(error.to_string()), Verdict::Failed)),
    }
    findings.push(rules());
    findings.extend(daemon(&config).await);
    findings
}

fn expiry(credentials: &Credentials) -> Finding {
    let now = SystemTime::now();
    let svids = std::iter::once(&credentials.host).chain(credentials.workloads.values());
    let short: Vec<String> = svids
        .filter(|svid| svid.not_after < now + EXPIRY_WARNING)
        .map(|svid| match svid.not_after.duration_since(now) {
            Ok(left) => format!("{} ends in {} min", svid.id, left.as_secs() / 60),
            Err(ended) => format!("{} EXPIRED {} min ago", svid.id, ended.duration().as_secs() / 60),
        })
        .collect();
    let result = match short.is_empty() {
        true => Ok(()),
        false => Err(format!("{}; is the PKI reachable, and the clock right?", short.join(", "))),
    };
    Finding::new("certificates are valid for at least 6 h", result, Verdict::Failed)
}

fn permitted(credentials: &Credentials) -> Finding {
    let refused: Vec<&str> = credentials.refused.values().map(String::as_str).collect();
    let result = if refused.is_empty() { Ok(()) } else { Err(refused.join("; ")) };
    Finding::new("the PKI permits every enrolled identity", result, Verdict::Failed)
}

fn enrolment(config: &Config, credentials: &Credentials) -> Finding {
    let result = enrol::load(&config.enrol_dir, &credentials.trust_domain, &config.own_listeners())
        .map(|_| ())
        .map_err(|e| e.to_string());
    Finding::new("enrolment files are valid", result, Verdict::Failed)
}

fn pki(credentials: &Credentials) -> Finding {
    let reachable = credentials.pki.iter().any(|address| reach(address));
    let result = if reachable {
        Ok(())
    } else {
        let addresses = credentials.pki.join(", ");
        Err(format!("none of {addresses} answers; traffic goes on, certificates are not renewed until one does"))
    };
    Finding::new("the PKI is reachable", result, Verdict::Warning)
}

fn reach(address: &str) -> bool {
    let Ok(addresses) = std::net::ToSocketAddrs::to_socket_addrs(address) else { return false };
    addresses.into_iter().any(|address| TcpStream::connect_timeout(&address, PKI_TIMEOUT).is_ok())
}

fn rules() -> Finding {
    let listed = std::process::Command::new("nft")
        .args(["list", "table", "inet", "meshd"])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .output();
    let result = match listed {
        Ok(output) if output.status.success() => Ok(()),
        Ok(_) => Err("table inet meshd is absent; start meshd, which installs it".to_owned()),
        Err(error) => Err(format!("cannot run nft: {error}; install the package nftables")),
    };
    Finding::new("capture rules are installed", result, Verdict::Failed)
}

async fn daemon(config: &Config) -> Vec<Finding> {
    let status: Result<StatusView, _> = fetch(&config.admin_socket(), "/status").await;
    match status {
        Ok(status) => {
            let errors: Vec<String> = status
                .sources
                .iter()
                .flat_map(|source| source["errors"].as_array().cloned().unwrap_or_default())
                .filter_map(|error| error.as_str().map(str::to_owned))
                .collect();
            let sources = if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) };
            vec![
                Finding::new("the daemon is running", Ok(()), Verdict::Failed),
                Finding::new("discovery sources are healthy", sources, Verdict::Warning),
            ]
        }
        Err(error) => vec![Finding::new("the daemon is running", Err(error.to_string()), Verdict::Failed)],
    }
}
