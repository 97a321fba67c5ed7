//! The Prometheus endpoint's text (OpenMetrics 1.0), with Linkerd's TCP names and meanings.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::edges::{EdgeKey, EdgeRow};
use super::{Direction, DnsOutcome, Telemetry, Tls, process};
use crate::fault::Fault;

type Labels = Vec<(&'static str, Cow<'static, str>)>;

/// One metric with all its series, computed when somebody scrapes.
#[derive(Debug)]
pub struct Exposition {
    pub name: &'static str,
    pub help: &'static str,
    pub counter: bool,
    pub series: Vec<(Labels, f64)>,
}

impl Exposition {
    pub fn counter(name: &'static str, help: &'static str, series: Vec<(Labels, f64)>) -> Exposition {
        Exposition { name, help, counter: true, series }
    }

    pub fn gauge(name: &'static str, help: &'static str, series: Vec<(Labels, f64)>) -> Exposition {
        Exposition { name, help, counter: false, series }
    }
}

/// The text of one scrape: the data plane's metrics, then `more` (identity, discovery).
pub fn encode(telemetry: &Arc<Telemetry>, more: Vec<Exposition>) -> Result<String, fmt::Error> {
    let mut all = data_plane(telemetry);
    all.extend(more);
    all.extend(process::metrics());
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape(all)));
    let mut text = String::with_capacity(16 * 1024);
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Scrape(Vec<Exposition>);

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for metric in &self.0 {
            let kind = if metric.counter { MetricType::Counter } else { MetricType::Gauge };
            let mut family = encoder.encode_descriptor(metric.name, metric.help, None, kind)?;
            for (labels, value) in &metric.series {
                if labels.is_empty() {
                    encode_value(metric.counter, *value, family)?;
                    break;
                }
                encode_value(metric.counter, *value, family.encode_family(labels)?)?;
            }
        }
        Ok(())
    }
}

/// Counts and bytes are whole numbers and look like it.
fn encode_value(counter: bool, value: f64, series: MetricEncoder<'_>) -> fmt::Result {
    match (counter, value.fract() == 0.0 && value >= 0.0) {
        (true, true) => ConstCounter::new(value as u64).encode(series),
        (true, false) => ConstCounter::new(value).encode(series),
        (false, true) => ConstGauge::new(value as i64).encode(series),
        (false, false) => ConstGauge::new(value).encode(series),
    }
}

fn data_plane(telemetry: &Telemetry) -> Vec<Exposition> {
    let mut metrics = tcp_metrics(telemetry);
    metrics.push(refused(telemetry));
    metrics.push(unknown(telemetry));
    metrics.push(handshakes(telemetry));
    metrics.push(cut(telemetry));
    metrics.extend(telemetry.self_handshakes.metrics());
    metrics.push(dns_queries(telemetry));
    metrics.extend(telemetry.workload_api.metrics());
    metrics.extend(telemetry.tasks.metrics());
    let single = |value: u64| vec![(Labels::new(), value as f64)];
    metrics.push(Exposition::counter(
        "meshd_panics",
        "Defects that ended one connection each; the log has the place",
        single(telemetry.panics.load(Ordering::Relaxed)),
    ));
    metrics.push(Exposition::counter(
        "meshd_hidden_callers",
        "Streams whose application asked for the caller's address and saw this host's",
        single(telemetry.hidden_callers.load(Ordering::Relaxed)),
    ));
    metrics.push(Exposition::counter(
        "meshd_access_log_dropped",
        "Access log events lost because the disk did not keep up",
        single(telemetry.access_log.dropped()),
    ));
    metrics.push(Exposition::gauge(
        "meshd_buffered_bytes",
        "Bytes from peers the local side has not taken yet",
        single(telemetry.buffered_bytes.load(Ordering::Relaxed)),
    ));
    metrics
}

/// Both transports of each connection: `peer="src"` faces whoever opened it, `peer="dst"` whoever serves it.
fn tcp_metrics(telemetry: &Telemetry) -> Vec<Exposition> {
    let rows = telemetry.edges.rows();
    let mut open = Vec::new();
    let mut close = Vec::new();
    let mut current = Vec::new();
    let mut read = Vec::new();
    let mut write = Vec::new();
    for (key, row) in &rows {
        let (src, dst) = (labels(key, "src"), labels(key, "dst"));
        open.push((src.clone(), row.opened as f64));
        open.push((dst.clone(), row.connected as f64));
        current.push((src.clone(), row.opened.saturating_sub(row.closed()) as f64));
        current.push((dst.clone(), row.connected.saturating_sub(row.connected_closed) as f64));
        read.push((src.clone(), row.up_bytes as f64));
        read.push((dst.clone(), row.down_bytes as f64));
        write.push((src.clone(), row.down_bytes as f64));
        write.push((dst.clone(), row.up_bytes as f64));
        close.extend(closes(&src, row));
        close.push((with_error(&dst, ""), row.connected_closed as f64));
    }
    vec![
        Exposition::counter("tcp_open", "Connections opened", summed(open)),
        Exposition::counter("tcp_close", "Connections closed, by error", summed(close)),
        Exposition::gauge("tcp_open_connections", "Connections open now", summed(current)),
        Exposition::counter("tcp_read_bytes", "Bytes read from the peer", summed(read)),
        Exposition::counter("tcp_write_bytes", "Bytes written to the peer", summed(write)),
    ]
}

/// Edges that differ on one leg only look the same on the other: a scrape has each series once.
fn summed(series: Vec<(Labels, f64)>) -> Vec<(Labels, f64)> {
    let mut sums: BTreeMap<Labels, f64> = BTreeMap::new();
    for (labels, value) in series {
        *sums.entry(labels).or_default() += value;
    }
    sums.into_iter().collect()
}

fn closes(labels: &Labels, row: &EdgeRow) -> Vec<(Labels, f64)> {
    let ok = (with_error(labels, ""), row.closed_ok as f64);
    let faults = row.closed_fault.iter().map(|(fault, count)| (with_error(labels, fault.label()), *count as f64));
    std::iter::once(ok).chain(faults).collect()
}

fn with_error(labels: &Labels, error: &'static str) -> Labels {
    let mut labels = labels.clone();
    labels.push(("error", error.into()));
    labels
}

fn labels(key: &EdgeKey, peer: &'static str) -> Labels {
    // The mesh leg is the far one: dst outbound, src inbound. The other leg never leaves the host.
    let mesh_leg = (key.direction == Direction::Outbound) == (peer == "dst");
    let tls = match (mesh_leg, key.tls) {
        (true, Tls::Mutual) => "true",
        (true, Tls::Disabled) => "disabled",
        (false, _) => "no_identity",
    };
    let mut labels: Labels =
        vec![("direction", key.direction.label().into()), ("peer", peer.into()), ("tls", tls.into())];
    let mut known = |name: &'static str, value: Option<String>| {
        if let Some(value) = value {
            labels.push((name, value.into()));
        }
    };
    known("srv_namespace", key.service.as_ref().map(|service| service.namespace().to_owned()));
    known("srv_name", key.service.as_ref().map(|service| service.name().to_owned()));
    known("unit", key.unit.as_deref().map(str::to_owned));
    let far = match key.overflow {
        true => Some("__overflow__".to_owned()),
        false => key.peer.as_ref().map(ToString::to_string),
    };
    let own = key.own.as_ref().map(ToString::to_string);
    let (client, server) = if key.direction == Direction::Outbound { (own, far) } else { (far, own) };
    known("client_id", client);
    known("server_id", server);
    labels
}

fn refused(telemetry: &Telemetry) -> Exposition {
    let series = [Direction::Inbound, Direction::Outbound]
        .into_iter()
        .flat_map(|direction| Fault::ALL.iter().map(move |fault| (direction, *fault)))
        .map(|(direction, fault)| (direction, fault, telemetry.refused.value(direction, fault)))
        .filter(|(_, _, count)| *count > 0)
        .map(|(direction, fault, count)| {
            (vec![("direction", direction.label().into()), ("error", fault.label().into())], count as f64)
        })
        .collect();
    Exposition::counter("meshd_refused", "Connections refused before they reached their other side", series)
}

fn unknown(telemetry: &Telemetry) -> Exposition {
    let counts = telemetry.unknown.counts().filter(|(_, count)| *count > 0);
    let series = counts.map(|(state, count)| (vec![("state", state.into())], count as f64)).collect();
    Exposition::counter(
        "meshd_identify_unknown",
        "Connections whose opener the kernel did not know, by the state of its socket",
        series,
    )
}

fn handshakes(telemetry: &Telemetry) -> Exposition {
    let counters = &telemetry.handshakes;
    let series = [
        ("inbound", "ok", &counters.accepted),
        ("inbound", "failed", &counters.accept_failed),
        ("inbound", "limited", &counters.accept_limited),
        ("outbound", "ok", &counters.dialled),
        ("outbound", "failed", &counters.dial_failed),
    ]
    .into_iter()
    .map(|(direction, result, counter)| {
        let labels = vec![("direction", direction.into()), ("result", result.into())];
        (labels, counter.load(Ordering::Relaxed) as f64)
    })
    .collect();
    Exposition::counter("meshd_handshakes", "Mutual TLS handshakes with other hosts", series)
}

fn cut(telemetry: &Telemetry) -> Exposition {
    let series = [Direction::Inbound, Direction::Outbound].map(|direction| {
        let count = telemetry.handshakes.cut[direction as usize].load(Ordering::Relaxed);
        (vec![("direction", direction.label().into())], count as f64)
    });
    let help = "Open connections with other hosts ended because the peer came onto the deny list";
    Exposition::counter("meshd_connections_cut", help, series.into())
}

fn dns_queries(telemetry: &Telemetry) -> Exposition {
    let series = DnsOutcome::ALL
        .into_iter()
        .map(|outcome| (vec![("outcome", outcome.label().into())], telemetry.dns.value(outcome) as f64))
        .collect();
    Exposition::counter("meshd_dns_queries", "Questions to our DNS, by what became of them", series)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::AccessLog;

    #[test]
    fn a_closed_connection_is_counted_on_both_transports() {
        let telemetry = Telemetry::new(1, AccessLog::off());
        let key = EdgeKey {
            direction: Direction::Outbound,
            unit: Some("checkout.service".into()),
            service: Some("payments.shop".parse().unwrap()),
            peer: Some("spiffe://mesh.example/ns/shop/sa/payments".parse().unwrap()),
            own: None,
            tls: Tls::Mutual,
            overflow: false,
        };
        let edge = telemetry.edges.edge(0, key);
        edge.opened.fetch_add(1, Ordering::Relaxed);
        edge.connected.fetch_add(1, Ordering::Relaxed);
        edge.up_bytes.fetch_add(7, Ordering::Relaxed);
        edge.connected_closed.fetch_add(1, Ordering::Relaxed);
        edge.close(Err(Fault::PeerReset));
        telemetry.dns.count(DnsOutcome::ForwardFailed);
        let text = encode(&telemetry, vec![]).unwrap();
        for line in [
            r#"tcp_open_total{direction="outbound",peer="dst",tls="true",srv_namespace="shop",srv_name="payments",unit="checkout.service",server_id="spiffe://mesh.example/ns/shop/sa/payments"} 1"#,
            r#"tcp_read_bytes_total{direction="outbound",peer="src",tls="no_identity",srv_namespace="shop",srv_name="payments",unit="checkout.service",server_id="spiffe://mesh.example/ns/shop/sa/payments"} 7"#,
            r#"error="peer_reset"} 1"#,
            r#"meshd_dns_queries_total{outcome="forward_failed"} 1"#,
            r#"meshd_dns_queries_total{outcome="no_address"} 0"#,
        ] {
            assert!(text.contains(line), "missing {line} in\n{text}");
        }
    }
}
