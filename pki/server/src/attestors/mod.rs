//! By what else than tokens hosts come in: certificates that machines have already, and tokens of Kubernetes. Which, is in
//! a file that is read again every 30 s together with all it names: no event can be missed, and a bad file changes nothing.

mod config;
mod fetch;
mod kubernetes;
mod template;
mod x509pop;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use meshd_identity::TrustDomain;
use meshd_identity::statements::machine_challenge;
use meshd_pki_api::v1;

use crate::enrol::Invited;
use crate::istio::grants::Grants;
use crate::join_token::is_from;
use crate::pki::{Pki, PkiError};
use crate::refused::Refused;
use crate::store::View;
use crate::store::hosts;
use config::Becomes;
pub(crate) use kubernetes::Pod;
use kubernetes::{Awaited, Cluster};
use x509pop::Authority;

/// How often everything is read again.
pub(crate) const READ_EVERY: Duration = Duration::from_secs(30);

/// What the file says, as it was last good, part by part.
#[derive(Default)]
pub(crate) struct Attestors {
    path: Option<PathBuf>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    authorities: BTreeMap<String, Arc<Authority>>,
    clusters: BTreeMap<String, Arc<Cluster>>,
    istio: Option<Arc<Grants>>,
    awaited: Vec<Awaited>,
    /// JWK Sets by the name of their cluster, from those who are asked for them.
    fetched: HashMap<String, Vec<u8>>,
    /// What was last complained about, and when the file was last looked at.
    problems: Vec<String>,
    read_at: Option<SystemTime>,
}

/// Who has proved to be what.
#[derive(Debug, Clone)]
pub(crate) struct Attested {
    /// `x509pop:machines`
    pub(crate) way: String,
    invited: Invited,
}

impl Attested {
    fn new(way: String, host_id: String, becomes: &Becomes) -> Attested {
        let invited =
            Invited { host_id, allow: becomes.allow.clone(), labels: becomes.labels.clone(), enrolled_by: way.clone() };
        Attested { way, invited }
    }

    /// A proof of one kind replaces no host that came in by another: whoever names machines in one directory must not
    /// take over hosts named elsewhere.
    pub(crate) fn invite(&self, view: &mut dyn View, asked: &str) -> Result<Invited, Refused> {
        let host = &self.invited.host_id;
        if !asked.is_empty() && asked != host {
            let asked = crate::enrol::excerpt(asked);
            return Err(Refused::Forbidden(format!(
                "the host claims to be `{asked}`, by {} it is `{host}`; join without a host id",
                self.way
            )));
        }
        match hosts::host(view, host)? {
            Some(known) if known.enrolled_by != self.way => {
                let before = if known.enrolled_by.is_empty() { "a join token" } else { &known.enrolled_by };
                Err(Refused::Forbidden(format!(
                    "host `{host}` is enrolled already, by {before}, and {} replaces only its own; use a token of \
                     `meshd-pki token create --host {host}`, or another `host` in --attestors",
                    self.way
                )))
            }
            _ => Ok(self.invited.clone()),
        }
    }
}

impl Attestors {
    pub(crate) fn new(path: Option<PathBuf>) -> Attestors {
        Attestors { path, ..Attestors::default() }
    }

    /// What proxies of Istio may have here, if anything.
    pub(crate) fn istio(&self) -> Option<Arc<Grants>> {
        self.state().istio.clone()
    }

    /// Whose token it is, of one of these clusters.
    pub(crate) fn pod(&self, grants: &Grants, token: &str, now: SystemTime) -> Result<Pod, Refused> {
        let (mut clusters, mut awaited) = self.clusters();
        clusters.retain(|cluster| grants.clusters.iter().any(|name| name == cluster.name()));
        awaited.retain(|one| grants.clusters.contains(&one.name));
        Ok(kubernetes::believe(&clusters, &awaited, token, Some(&grants.audience), now)?.1)
    }

    fn clusters(&self) -> (Vec<Arc<Cluster>>, Vec<Awaited>) {
        let state = self.state();
        (all(&state.clusters), state.awaited.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pki {
    /// Reads the attestors' file and all it names again, when it is time. What is bad stays as it was.
    pub fn read_attestors(&self) -> Result<(), PkiError> {
        let attestors = &self.attestors;
        let Some(path) = &attestors.path else { return Ok(()) };
        let now = self.now();
        let mut state = attestors.state();
        let is_fresh = |at: SystemTime| now.duration_since(at).is_ok_and(|age| age < READ_EVERY);
        if state.read_at.is_some_and(is_fresh) {
            return Ok(());
        }
        state.read_at = Some(now);
        let problems = state.read(path, &self.trust_domain, now);
        self.metrics.attestors_bad.set(i64::try_from(problems.len()).unwrap_or(i64::MAX));
        if state.problems != problems {
            for problem in &problems {
                tracing::error!(file = %path.display(), problem, "what an attestor is made of is bad; the last good stays");
            }
            if problems.is_empty() {
                tracing::info!(file = %path.display(), "attestors are good again");
            }
            state.problems = problems;
        }
        Ok(())
    }

    pub(crate) fn attest_machine(
        &self,
        proof: &v1::MachineCertificateProof,
        csr: &[u8],
        remote: &str,
    ) -> Result<Attested, Refused> {
        let (leaf, now) = (proof.chain.first().map_or(&[][..], Vec::as_slice), self.now());
        if !self.nonces.check(&machine_challenge(leaf), &proof.nonce, now) {
            let text =
                "the nonce is not from this PKI, for another certificate or older than a minute; ask for another";
            return Err(Refused::Unauthenticated(text.to_owned()));
        }
        let authorities = all(&self.attestors.state().authorities);
        x509pop::attest(&authorities, proof, csr, &self.trust_domain, remote, now)
    }

    pub(crate) fn attest_pod(&self, proof: &v1::KubernetesTokenProof, remote: &str) -> Result<Attested, Refused> {
        let (clusters, awaited) = self.attestors.clusters();
        kubernetes::attest(&clusters, &awaited, proof, remote, self.now())
    }

    /// Asks those clusters for their keys that are to be asked, until the server stops.
    pub(crate) async fn follow_clusters(self: Arc<Pki>) {
        let Some(path) = self.attestors.path.clone() else { return };
        let mut ticks = tokio::time::interval(READ_EVERY);
        let mut stopping = self.stopping();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                _ = stopping.wait_for(|stops| *stops) => return,
            }
            // Whatever is wrong with it is told by whoever reads all of it.
            let file = read_file(&path).unwrap_or_default();
            for cluster in file.kubernetes.iter().filter(|cluster| cluster.jwks_url.is_some()) {
                let fetched = tokio::select! {
                    fetched = fetch::keys(cluster) => fetched,
                    _ = stopping.wait_for(|stops| *stops) => return,
                };
                match fetched {
                    Ok(keys) => {
                        let mut state = self.attestors.state();
                        if state.fetched.insert(cluster.name.clone(), keys).is_none() {
                            // Nobody waits for the next reading.
                            state.read_at = None;
                        }
                    }
                    Err(error) => tracing::warn!(cluster = cluster.name, error, "no keys of a cluster; the last stay"),
                }
            }
        }
    }
}

fn read_file(path: &Path) -> Result<config::File, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    toml::from_str(&text).map_err(|error| error.to_string())
}

fn all<T>(held: &BTreeMap<String, Arc<T>>) -> Vec<Arc<T>> {
    held.values().cloned().collect()
}

fn merge<T>(
    held: &mut BTreeMap<String, Arc<T>>,
    read: BTreeMap<String, Result<T, String>>,
    kind: &str,
    problems: &mut Vec<String>,
) {
    held.retain(|name, _| read.contains_key(name));
    for (name, result) in read {
        match result {
            Ok(good) => drop(held.insert(name, Arc::new(good))),
            Err(why) => problems.push(format!("[[{kind}]] `{name}`: {why}")),
        }
    }
}

fn remote_is_allowed(way: &str, from: &[IpNet], remote: &str) -> Result<(), Refused> {
    if from.is_empty() || is_from(remote, from) {
        return Ok(());
    }
    let from: Vec<String> = from.iter().map(IpNet::to_string).collect();
    let from = from.join(", ");
    Err(Refused::Forbidden(format!("{way} is good from {from} only, and this host comes from {remote}")))
}

impl State {
    /// Takes over what is good, and says what is not.
    fn read(&mut self, path: &Path, domain: &TrustDomain, now: SystemTime) -> Vec<String> {
        let file = match read_file(path) {
            Ok(file) => file,
            Err(error) => return vec![error],
        };
        let mut problems = Vec::new();
        let bytes = |path: &Path| std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
        let mut authorities = BTreeMap::new();
        for config in &file.x509pop {
            let read = bytes(&config.ca_file).and_then(|pem| Authority::read(config, &pem, domain, now));
            authorities.insert(config.name.clone(), read);
        }
        let mut clusters = BTreeMap::new();
        for config in &file.kubernetes {
            let jwks = match (&config.jwks_file, &config.jwks_url) {
                (Some(path), None) => bytes(path),
                (None, Some(url)) => {
                    self.fetched.get(&config.name).cloned().ok_or_else(|| format!("no keys from {url} yet"))
                }
                _ => Err("give either `jwks_file` or `jwks_url`".to_owned()),
            };
            clusters.insert(config.name.clone(), jwks.and_then(|jwks| Cluster::read(config, &jwks, domain)));
        }
        merge(&mut self.authorities, authorities, "x509pop", &mut problems);
        merge(&mut self.clusters, clusters, "kubernetes", &mut problems);
        let is_awaited = |config: &&config::Kubernetes| {
            let is_asked = config.jwks_file.is_none() && config.jwks_url.is_some();
            is_asked && !self.fetched.contains_key(&config.name) && !self.clusters.contains_key(&config.name)
        };
        let awaited = file.kubernetes.iter().filter(is_awaited);
        let awaited = awaited.map(|config| Awaited { name: config.name.clone(), issuer: config.issuer.clone() });
        self.awaited = awaited.collect();
        let names: Vec<&str> = file.kubernetes.iter().map(|cluster| cluster.name.as_str()).collect();
        match file.istio.as_ref().map(|section| Grants::read(section, &names)) {
            None => self.istio = None,
            Some(Ok(grants)) => self.istio = Some(Arc::new(grants)),
            Some(Err(why)) => problems.push(format!("[istio]: {why}")),
        }
        problems
    }
}
