//! What Prometheus sees of the PKI.

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::health::metrics::HealthMetrics;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Outcome {
    pub(crate) method: &'static str,
    pub(crate) result: &'static str,
}

pub struct Metrics {
    registry: Registry,
    pub(crate) requests: Family<Outcome, Counter>,
    pub(crate) issued: Counter,
    pub(crate) items_refused: Counter,
    pub(crate) audit_failures: Counter,
    pub(crate) maintenance_failures: Counter,
    pub(crate) note_failures: Counter,
    pub(crate) clones_seen: Counter,
    pub(crate) attestors_bad: Gauge,
    pub(crate) clock_distrusted: Gauge,
    pub(crate) clock_unconfirmed: Gauge,
    pub(crate) tls_failures: Counter,
    pub(crate) leads: Gauge,
    pub(crate) replicas: Gauge,
    pub(crate) store_trouble: Gauge,
    pub(crate) backup: Gauge,
    pub(crate) backup_failures: Counter,
    pub(crate) restored: Gauge,
    pub(crate) hosts_ahead: Counter,
    pub(crate) connections: Gauge,
    pub(crate) health: HealthMetrics,
}

impl Metrics {
    pub(crate) fn new() -> Metrics {
        let mut metrics = Metrics {
            registry: Registry::with_prefix("meshd_pki"),
            requests: Family::default(),
            issued: Counter::default(),
            items_refused: Counter::default(),
            audit_failures: Counter::default(),
            maintenance_failures: Counter::default(),
            note_failures: Counter::default(),
            clones_seen: Counter::default(),
            attestors_bad: Gauge::default(),
            clock_distrusted: Gauge::default(),
            clock_unconfirmed: Gauge::default(),
            tls_failures: Counter::default(),
            leads: Gauge::default(),
            replicas: Gauge::default(),
            store_trouble: Gauge::default(),
            backup: Gauge::default(),
            backup_failures: Counter::default(),
            restored: Gauge::default(),
            hosts_ahead: Counter::default(),
            connections: Gauge::default(),
            health: HealthMetrics::default(),
        };
        let m = &mut metrics;
        let registry = &mut m.registry;
        registry.register("requests", "Requests by method and result", m.requests.clone());
        registry.register("certificates_issued", "Leaf certificates issued", m.issued.clone());
        registry.register("items_refused", "Certificates refused within served batches", m.items_refused.clone());
        registry.register(
            "audit_failures",
            "Acts that could not be written to the audit log",
            m.audit_failures.clone(),
        );
        registry.register("maintenance_failures", "Failed rotations", m.maintenance_failures.clone());
        registry.register(
            "note_failures",
            "Answers given to hosts that the database could not note",
            m.note_failures.clone(),
        );
        registry.register("clones_seen", "Times two machines used one host's key", m.clones_seen.clone());
        registry.register(
            "attestors_bad",
            "Attestors whose file, authority or keys are bad; the last good ones stay",
            m.attestors_bad.clone(),
        );
        registry.register(
            "clock_distrusted",
            "1 while nothing is issued or rotated because this machine's clock may be wrong",
            m.clock_distrusted.clone(),
        );
        registry.register(
            "clock_unconfirmed",
            "1 from a start until hosts agree with this machine's clock, or long enough passed; rotation waits",
            m.clock_unconfirmed.clone(),
        );
        registry.register("tls_failures", "Handshakes that failed", m.tls_failures.clone());
        registry.register("leads", "1 where this server takes the steps of authorities", m.leads.clone());
        registry.register("replicas", "Servers of this PKI that run", m.replicas.clone());
        let trouble = "1 while nothing can be written to etcd; renewals go on";
        registry.register("store_trouble", trouble, m.store_trouble.clone());
        let made = "Unix time of the last backup this process made; 0 before the first";
        registry.register("backup_timestamp_seconds", made, m.backup.clone());
        registry.register("backup_failures", "Backups that could not be made", m.backup_failures.clone());
        let restored = "Unix time at which a backup took the place of the database; 0 if none did";
        registry.register("restored_timestamp_seconds", restored, m.restored.clone());
        let ahead = "Times a host had a newer bundle than the PKI";
        registry.register("hosts_ahead", ahead, m.hosts_ahead.clone());
        registry.register("connections", "Open connections", m.connections.clone());
        m.health = HealthMetrics::register(registry);
        metrics
    }

    pub(crate) fn count(&self, method: &'static str, result: &'static str) {
        self.requests.get_or_create(&Outcome { method, result }).inc();
    }

    pub fn encode(&self) -> String {
        let mut page = String::new();
        text::encode(&mut page, &self.registry).expect("writing to a string cannot fail");
        page
    }
}
