//! Hosts, each with a directory of its own that one source fills.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use meshd_discovery::{Directory, Imports, SourceConfig, Watcher};
use meshd_identity::TrustDomain;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::Follow;
use crate::write::{Board, NAMESPACE, service_name};

/// What a failing run is bounded by.
const PATIENCE: Duration = Duration::from_secs(180);

pub(crate) struct Watchers {
    hosts: Vec<Host>,
    endpoints: usize,
    board: Arc<Board>,
    delays: Arc<Mutex<Vec<Duration>>>,
}

struct Host {
    imports: Vec<usize>,
    directory: watch::Receiver<Arc<Directory>>,
}

impl Watchers {
    /// One host after the other, as hosts boot: what they do all at once is not what is measured.
    pub(crate) async fn start(
        args: &Follow,
        source: &SourceConfig,
        trust_domain: &TrustDomain,
        board: Arc<Board>,
    ) -> Result<Self> {
        let delays = Arc::default();
        let mut hosts = Vec::new();
        // The same services in every run.
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..args.hosts {
            let imports = match args.imports {
                0 => (0..args.services).collect(),
                some => random.choose_multiple(0..args.services, some),
            };
            let names = match args.imports {
                0 => vec![format!("*.{NAMESPACE}")],
                _ => imports.iter().map(|service| service_name(*service).to_string()).collect(),
            };
            let configured = source.open(trust_domain)?;
            let wanted = Imports::try_from(names).map_err(anyhow::Error::msg)?.declared().cloned().unwrap_or_default();
            let watcher = Watcher::new(vec![configured], trust_domain.clone()).wanting(wanted);
            let directory = watcher.directory();
            tokio::spawn(watcher.run());
            tokio::spawn(note_delays(directory.clone(), board.clone(), Arc::clone(&delays)));
            let host = Host { imports, directory };
            wait("a host to know all it imports", std::slice::from_ref(&host), |host| {
                endpoints_of(&host.directory.borrow()).len() == host.imports.len() * args.endpoints
            })
            .await?;
            hosts.push(host);
        }
        Ok(Self { hosts, endpoints: args.endpoints, board, delays })
    }

    /// Until every host has exactly what was written last.
    pub(crate) async fn wait_until_right(&self) -> Result<()> {
        wait("every host to know what was written last", &self.hosts, |host| {
            let written: HashSet<IpAddr> =
                host.imports.iter().flat_map(|service| self.board.addresses(*service)).collect();
            endpoints_of(&host.directory.borrow()) == written
        })
        .await
    }

    pub(crate) fn endpoints_held(&self) -> usize {
        self.hosts.iter().map(|host| host.imports.len() * self.endpoints).sum()
    }

    /// How many hosts import the service.
    pub(crate) fn concerned(&self, service: usize) -> usize {
        self.hosts.iter().filter(|host| host.imports.contains(&service)).count()
    }

    pub(crate) fn delays(&self) -> Vec<Duration> {
        let mut delays = self.delays.lock().unwrap_or_else(PoisonError::into_inner).clone();
        delays.sort_unstable();
        delays
    }
}

async fn wait(what: &str, hosts: &[Host], is_there: impl Fn(&Host) -> bool) -> Result<()> {
    let began = Instant::now();
    while let Some(host) = hosts.iter().find(|host| !is_there(host)) {
        if began.elapsed() > PATIENCE {
            let (services, endpoints) = (host.directory.borrow().len(), endpoints_of(&host.directory.borrow()).len());
            bail!("waited {} s for {what}: {services} services, {endpoints} endpoints", PATIENCE.as_secs());
        }
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

fn endpoints_of(directory: &Directory) -> HashSet<IpAddr> {
    directory.services().flat_map(|service| service.endpoints.iter().map(|endpoint| endpoint.dial.ip())).collect()
}

/// Of each address that was not there before, how long ago it was written.
async fn note_delays(
    mut directory: watch::Receiver<Arc<Directory>>,
    board: Arc<Board>,
    delays: Arc<Mutex<Vec<Duration>>>,
) {
    let mut known = Arc::new(Directory::default());
    while directory.changed().await.is_ok() {
        let now = Instant::now();
        let news = directory.borrow_and_update().clone();
        let mut found = Vec::new();
        for service in news.services() {
            let before = known.get(&service.name);
            if before.is_some_and(|before| Arc::ptr_eq(before, service)) {
                continue;
            }
            let was_there = |address| {
                before.is_some_and(|before| before.endpoints.iter().any(|endpoint| endpoint.dial.ip() == address))
            };
            let new =
                service.endpoints.iter().map(|endpoint| endpoint.dial.ip()).filter(|address| !was_there(*address));
            found
                .extend(new.filter_map(|address| board.changed_at(address)).map(|changed| now.duration_since(changed)));
        }
        known = news;
        delays.lock().unwrap_or_else(PoisonError::into_inner).extend(found);
    }
}
