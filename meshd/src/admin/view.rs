//! The daemon's state as operators see it: one struct per answer, serialized as it is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use meshd_discovery::{Import, RegistrationHealth, Registrations, SourceHealth};
use meshd_identity::SpiffeId;
use meshd_pki_client::{Credentials, RenewalMetrics};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use super::endpoints::{self, EndpointView};
use super::ledger::{Callers, LedgerView};
use super::pki::PkiView;
use super::tasks::TaskView;
use super::withheld::WithheldView;
use super::{registrations, sources};
use crate::capture::{KeeperHandle, KeeperView, Recovery};
use crate::config::Config;
use crate::enrol::{Mode, Selector, Workload};
use crate::lifecycle::{Lifecycle, Stage};
use crate::proxy::Shared;
use crate::telemetry::{Direction, Exposition, Telemetry, Tls};

/// Everything answers are made of.
pub struct View {
    started: Instant,
    shared: Arc<Shared>,
    lifecycle: Lifecycle,
    credentials: watch::Receiver<Arc<Credentials>>,
    sources: watch::Receiver<Arc<Vec<SourceHealth>>>,
    imports: watch::Receiver<Arc<Vec<Import>>>,
    renewals: Arc<RenewalMetrics>,
    keeper: KeeperHandle,
    domain: String,
    recovery: Recovery,
    registrations: Arc<Registrations>,
}

/// `meshd status`.
#[derive(Debug, Serialize, Deserialize)]
pub struct StatusView {
    pub version: String,
    pub host_id: String,
    pub trust_domain: String,
    pub uptime_s: u64,
    pub workers: usize,
    pub open_connections: u64,
    pub identities: Vec<IdentityView>,
    pub refused_identities: BTreeMap<String, String>,
    #[serde(default)]
    pub enrolled: Vec<EnrolledView>,
    #[serde(default)]
    pub withheld: Vec<WithheldView>,
    /// Whether meshd sees programs, for entries that ask for them: on, off, or why not.
    #[serde(default)]
    pub path_selectors: String,
    pub serves: Vec<DeliveryView>,
    pub services: Vec<ServiceView>,
    pub sources: Vec<Value>,
    /// What sources on other machines are asked for.
    #[serde(default)]
    pub imports: Vec<Import>,
    #[serde(default)]
    pub registrations: Vec<RegistrationHealth>,
    pub capture: KeeperView,
    pub renewals_ok: u64,
    pub renewals_failed: u64,
    #[serde(default)]
    pub pki: PkiView,
    #[serde(default)]
    pub tasks: Vec<TaskView>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct IdentityView {
    pub id: String,
    /// The unit that holds it; `meshd` for the host's own.
    pub unit: String,
    /// Seconds until the certificate chain expires; negative when it has.
    pub expires_in_s: i64,
    pub serial: String,
}

/// A workload of this host, as its files claim it.
#[derive(Debug, Serialize, Deserialize)]
pub struct EnrolledView {
    /// A unit, a pattern of scopes, `uid:1001` or `port:5432`.
    pub selector: String,
    pub identity: String,
    /// File and line.
    pub origin: String,
    /// For a port: who holds it, or why nobody is known to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct DeliveryView {
    pub service: String,
    pub port: u16,
    pub unit: String,
    pub deliver: String,
    pub mode: Mode,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct ServiceView {
    pub name: String,
    pub dns: String,
    pub vip: Option<String>,
    pub ports: Vec<u16>,
    pub endpoints: usize,
    pub source: String,
    /// Endpoints that are reached in clear.
    pub plaintext: bool,
    /// How many there are, also for clients of single namespaces.
    #[serde(default)]
    pub routes: usize,
    /// `namespace/name` of its ServicePolicy.
    #[serde(default)]
    pub policy: Option<String>,
    /// AuthorizationPolicies that decide about it: its own, those of its namespace, those for everybody.
    #[serde(default)]
    pub authorization: usize,
}

/// A row of `meshd edges`.
#[derive(Debug, Serialize, Deserialize)]
pub struct EdgeView {
    pub direction: String,
    pub client_id: Option<String>,
    pub server_id: Option<String>,
    pub unit: Option<String>,
    pub service: Option<String>,
    pub secured: bool,
    pub open: u64,
    pub opened: u64,
    pub failed: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
}

impl View {
    pub fn new(
        config: &Config,
        shared: Arc<Shared>,
        lifecycle: Lifecycle,
        credentials: watch::Receiver<Arc<Credentials>>,
        sources: watch::Receiver<Arc<Vec<SourceHealth>>>,
        renewals: Arc<RenewalMetrics>,
        (keeper, recovery): (KeeperHandle, Recovery),
    ) -> View {
        let domain = config.dns.domain.to_string();
        let registrations = Arc::new(Registrations::new(Vec::new()));
        View {
            started: Instant::now(),
            shared,
            lifecycle,
            credentials,
            sources,
            renewals,
            keeper,
            domain,
            recovery,
            registrations,
            imports: watch::channel(Arc::default()).1,
        }
    }

    pub fn importing(self, imports: watch::Receiver<Arc<Vec<Import>>>) -> View {
        View { imports, ..self }
    }

    pub fn registering(self, registrations: Arc<Registrations>) -> View {
        View { registrations, ..self }
    }

    fn imports(&self) -> Vec<Import> {
        let directory = self.shared.directory.load();
        let now = |import: &Import| Import {
            known: import.known || directory.find(&import.name).is_some(),
            ..import.clone()
        };
        self.imports.borrow().iter().map(now).collect()
    }

    pub(super) fn telemetry(&self) -> &Arc<Telemetry> {
        &self.shared.telemetry
    }

    pub(super) fn ledger(&self, callers: Callers) -> LedgerView {
        // What another backend counted is not how things are.
        let book = self.keeper.backend.can().ledger.then(|| self.keeper.ledger.load());
        LedgerView::of(book.as_deref().map(|book| &**book), &self.shared.enrolment.load(), callers)
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(super) fn credentials(&self) -> Arc<Credentials> {
        self.credentials.borrow().clone()
    }

    pub(super) fn stage(&self) -> Stage {
        self.lifecycle.stage()
    }

    pub fn status(&self) -> StatusView {
        let credentials = self.credentials.borrow().clone();
        let rows = self.shared.telemetry.edges.rows();
        let refused = credentials.refused.iter().map(|(id, reason)| (id.to_string(), reason.clone()));
        let sources = self.sources.borrow().clone();
        StatusView {
            version: env!("CARGO_PKG_VERSION").into(),
            host_id: credentials.host_id.clone(),
            trust_domain: credentials.trust_domain.to_string(),
            uptime_s: self.started.elapsed().as_secs(),
            workers: self.shared.config.worker_count(),
            open_connections: rows.values().map(|row| row.opened.saturating_sub(row.closed())).sum(),
            identities: self.identities(&credentials),
            refused_identities: refused.collect(),
            enrolled: self.enrolled(),
            withheld: WithheldView::all(&self.shared.enrolment.load(), &credentials),
            path_selectors: self.shared.attestor.sight().label().to_owned(),
            serves: self.serves(),
            services: self.services(),
            sources: sources.iter().filter_map(|health| serde_json::to_value(health).ok()).collect(),
            imports: self.imports(),
            registrations: self.registrations.rows(),
            capture: self.capture(),
            renewals_ok: self.renewals.refreshes_ok(),
            renewals_failed: self.renewals.refreshes_failed(),
            pki: PkiView::of(&self.renewals, &credentials, &self.shared),
            tasks: TaskView::all(&self.shared.telemetry.tasks),
        }
    }

    pub(super) fn capture(&self) -> KeeperView {
        self.keeper.view()
    }

    fn identities(&self, credentials: &Credentials) -> Vec<IdentityView> {
        let enrolment = self.shared.enrolment.load();
        let unit_of = |id: &SpiffeId| {
            let workload = enrolment.workloads().iter().find(|workload| workload.identity == *id);
            workload.map_or_else(|| "(no longer enrolled)".to_owned(), |workload| workload.unit.to_string())
        };
        let host = std::iter::once((&credentials.host, "meshd".to_owned()));
        let workloads = credentials.workloads.values().map(|svid| (svid, unit_of(&svid.id)));
        host.chain(workloads)
            .map(|(svid, unit)| IdentityView {
                id: svid.id.to_string(),
                unit,
                expires_in_s: seconds_until(svid.not_after),
                serial: svid.serial.clone(),
            })
            .collect()
    }

    fn enrolled(&self) -> Vec<EnrolledView> {
        let owners = self.shared.ports.owners();
        let row = |workload: &Arc<Workload>| EnrolledView {
            selector: workload.selector.to_string(),
            identity: workload.identity.to_string(),
            origin: workload.origin.to_string(),
            owner: match workload.selector {
                Selector::Port(port) => Some(owners.of(port).to_string()),
                _ => None,
            },
        };
        self.shared.enrolment.load().workloads().iter().map(row).collect()
    }

    fn serves(&self) -> Vec<DeliveryView> {
        let enrolment = self.shared.enrolment.load();
        let row = |delivery: &Arc<crate::enrol::Delivery>| DeliveryView {
            service: delivery.service.to_string(),
            port: delivery.port,
            unit: delivery.owner.unit.to_string(),
            deliver: delivery.deliver.to_string(),
            mode: delivery.mode,
        };
        enrolment.deliveries().iter().map(row).collect()
    }

    fn services(&self) -> Vec<ServiceView> {
        let directory = self.shared.directory.load();
        let resources = directory.resources();
        let policy = |service| {
            let meta = &resources.of(service)?.policy.as_ref()?.metadata;
            Some(format!("{}/{}", meta.namespace, meta.name))
        };
        directory
            .services()
            .map(|service| ServiceView {
                routes: resources.of(&service.name).map_or(0, |attached| attached.routes()),
                policy: policy(&service.name),
                authorization: resources.authorization(&service.name).count(),
                name: service.name.to_string(),
                dns: format!("{}.{}", service.name, self.domain),
                vip: self.shared.vips.get(&service.name).map(|vip| vip.v4.to_string()),
                ports: service.ports.iter().map(|port| port.port).collect(),
                endpoints: service.endpoints.len(),
                source: service.source.to_string(),
                plaintext: service.allow_plaintext,
            })
            .collect()
    }

    pub fn endpoints(&self) -> Vec<EndpointView> {
        endpoints::rows(&self.shared, &self.sources)
    }

    pub fn edges(&self) -> Vec<EdgeView> {
        let rows = self.shared.telemetry.edges.rows();
        rows.into_iter()
            .map(|(key, row)| {
                let far =
                    if key.overflow { Some("__overflow__".to_owned()) } else { key.peer.map(|id| id.to_string()) };
                let own = key.own.map(|id| id.to_string());
                let outbound = key.direction == Direction::Outbound;
                let (client_id, server_id) = if outbound { (own, far) } else { (far, own) };
                EdgeView {
                    direction: key.direction.label().into(),
                    client_id,
                    server_id,
                    unit: key.unit.map(|unit| unit.to_string()),
                    service: key.service.map(|service| service.to_string()),
                    secured: key.tls == Tls::Mutual,
                    open: row.opened.saturating_sub(row.closed()),
                    opened: row.opened,
                    failed: row.closed_fault.values().sum(),
                    bytes_sent: row.up_bytes,
                    bytes_received: row.down_bytes,
                }
            })
            .collect()
    }

    /// Metrics of identity, discovery and capture; the data plane's are its own.
    pub(super) fn metrics(&self) -> Vec<Exposition> {
        let credentials = self.credentials.borrow().clone();
        let svids = std::iter::once(&credentials.host).chain(credentials.workloads.values());
        let expirations = svids.map(|svid| (vec![("id", svid.id.to_string().into())], unix(svid.not_after))).collect();
        let result = |result: &'static str, count: u64| (vec![("result", result.into())], count as f64);
        let mut metrics = vec![
            Exposition::gauge(
                "identity_cert_expiration_timestamp_seconds",
                "When each certificate chain ends (Unix time)",
                expirations,
            ),
            Exposition::counter(
                "identity_cert_refreshes",
                "Certificates asked of the PKI, by result",
                vec![result("ok", self.renewals.refreshes_ok()), result("failed", self.renewals.refreshes_failed())],
            ),
            Exposition::gauge(
                "identity_cert_refresh_timestamp_seconds",
                "When the PKI last answered (Unix time, 0 never since start)",
                vec![(Vec::new(), self.renewals.last_success_unix().unwrap_or(0) as f64)],
            ),
            Exposition::counter(
                "meshd_port_claims",
                "Times others came to listen on an enrolled port whose owner does not; they are not taken for it",
                vec![(Vec::new(), self.shared.ports.claims() as f64)],
            ),
        ];
        metrics.extend(sources::metrics(&self.sources.borrow()));
        metrics.extend(PkiView::of(&self.renewals, &credentials, &self.shared).metrics());
        metrics.push(Exposition::gauge(
            "meshd_withheld_claims",
            "Claims of enrol.d that nobody has, because the PKI does not agree; `meshd status` says why",
            vec![(Vec::new(), WithheldView::all(&self.shared.enrolment.load(), &credentials).len() as f64)],
        ));
        metrics.extend(registrations::metrics(&self.registrations.rows()));
        metrics.extend(self.ledger(Callers::LeftOut).metrics());
        metrics.extend(capture_metrics(&self.capture()));
        metrics.extend(self.recovery.metrics());
        metrics
    }
}

fn capture_metrics(view: &KeeperView) -> [Exposition; 5] {
    let one = |value: f64| vec![(Vec::new(), value)];
    let bypass = view.bypass.iter().map(|unit| (vec![("unit", unit.clone().into())], 1.0)).collect();
    [
        Exposition::gauge(
            "meshd_capture_info",
            "How connections are captured",
            vec![(vec![("backend", view.backend.label().into())], 1.0)],
        ),
        Exposition::counter(
            "meshd_capture_healed",
            "Times rules or routes were put back after another tool had removed them",
            one(view.healed as f64),
        ),
        Exposition::counter(
            "meshd_capture_heal_failed",
            "Times rules or routes could not be put back",
            one(view.heal_failed as f64),
        ),
        Exposition::gauge(
            "meshd_capture_held",
            "1 while the configured plan is held back because nobody confirmed it, or everything is reverted",
            one(f64::from(u8::from(view.held || view.reverted))),
        ),
        Exposition::gauge("meshd_bypass", "Units meshd is out of the way of; * for all", bypass),
    ]
}

pub(super) fn unix(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

pub(super) fn seconds_until(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::now()) {
        Ok(left) => left.as_secs() as i64,
        Err(past) => -(past.duration().as_secs() as i64),
    }
}
