//! `meshd ledger`: who still calls which port in clear, and which ports nobody does.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use super::show::{duration, table};
use super::view::View;
use crate::capture::{Book, KeeperHandle, PlainCaller, PortRecord};
use crate::enrol::{Delivery, Enrolment, Mode};
use crate::telemetry::Exposition;
use crate::unix_time::unix_seconds;

/// Times are Unix seconds.
#[derive(Debug, Serialize, Deserialize)]
pub struct LedgerView {
    /// When the kernel was last asked; null if it never was, or cannot count.
    pub counted_at: Option<u64>,
    /// By port.
    pub ports: Vec<PortView>,
    /// Callers forgotten because there were too many to remember.
    pub dropped_callers: u64,
}

/// A port of this host that a service is delivered to.
#[derive(Debug, Serialize, Deserialize)]
pub struct PortView {
    pub port: u16,
    /// The services behind it; usually one.
    pub services: Vec<String>,
    pub unit: String,
    pub mode: Mode,
    /// Since when callers of a permissive port are counted; null if nobody counts.
    pub observed_since: Option<u64>,
    /// How long of the time since then nobody counted.
    pub unobserved_s: u64,
    /// Observed time since the last plaintext call, or since observation began.
    pub clean_for_s: u64,
    /// The last plaintext call, to within ten seconds (after an absence of meshd: when it was back).
    pub last_plaintext: Option<u64>,
    pub plaintext_connections: u64,
    /// Connections refused because the port is strict.
    pub refused: u64,
    /// Most connections first.
    pub callers: Vec<CallerView>,
}

/// One who called in clear: another host by `address`, a local process by `uid`, neither for the rest.
#[derive(Debug, Serialize, Deserialize)]
pub struct CallerView {
    pub address: Option<IpAddr>,
    pub uid: Option<u32>,
    pub connections: u64,
    pub first_seen: u64,
    pub last_seen: u64,
}

/// Asks the kernel first, so that whoever asks sees what just happened.
pub(super) fn routes(view: Arc<View>, keeper: KeeperHandle) -> Router {
    let answer = |State((view, keeper)): State<(Arc<View>, KeeperHandle)>| async move {
        keeper.count().await;
        Json(view.ledger(Callers::Listed))
    };
    Router::new().route("/ledger", get(answer)).with_state((view, keeper))
}

/// There may be ten thousand.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Callers {
    Listed,
    LeftOut,
}

impl LedgerView {
    /// `book`: None where nobody counts.
    pub(super) fn of(book: Option<&Book>, enrolment: &Enrolment, callers: Callers) -> LedgerView {
        let mut ports: Vec<PortView> = Vec::new();
        for delivery in enrolment.deliveries() {
            match ports.iter_mut().find(|known| known.port == delivery.deliver.port()) {
                Some(known) => known.add(delivery),
                None => ports.push(PortView::of(delivery, book, callers)),
            }
        }
        ports.sort_by_key(|port| port.port);
        LedgerView {
            counted_at: book.and_then(|book| book.entered),
            ports,
            dropped_callers: book.map_or(0, |book| book.dropped),
        }
    }

    pub(super) fn metrics(&self) -> Vec<Exposition> {
        let of_mode = |mode: Mode| self.ports.iter().filter(move |port| port.mode == mode);
        let plaintext = of_mode(Mode::Permissive).filter(|port| port.observed_since.is_some()).map(|port| {
            let labels = vec![("port", port.port.to_string().into()), ("service", port.services.join(",").into())];
            (labels, port.plaintext_connections as f64)
        });
        let refused =
            of_mode(Mode::Strict).map(|port| (vec![("port", port.port.to_string().into())], port.refused as f64));
        vec![
            Exposition::counter(
                "meshd_plaintext_connections",
                "Connections to permissive ports in clear, not through the mesh",
                plaintext.collect(),
            ),
            Exposition::counter(
                "meshd_strict_refused",
                "Plaintext connections the kernel refused at strict ports",
                refused.collect(),
            ),
            Exposition::counter(
                "meshd_ledger_dropped",
                "Plaintext callers `meshd ledger` forgot because there were too many",
                vec![(Vec::new(), self.dropped_callers as f64)],
            ),
        ]
    }
}

impl PortView {
    fn of(delivery: &Delivery, book: Option<&Book>, listed: Callers) -> PortView {
        let port = delivery.deliver.port();
        let record = book.and_then(|book| book.ports.get(&port));
        let count = |field: fn(&PortRecord) -> u64| record.map_or(0, field);
        let mut view = PortView {
            port,
            services: Vec::new(),
            unit: delivery.owner.unit.to_string(),
            mode: Mode::Permissive,
            observed_since: record.map(|record| record.observed_since),
            unobserved_s: count(|record| record.unobserved_s),
            clean_for_s: count(|record| record.clean_s),
            last_plaintext: record.and_then(|record| record.last_seen),
            plaintext_connections: count(|record| record.connections),
            refused: book.and_then(|book| book.refused.get(&port)).map_or(0, |refused| refused.connections),
            callers: record.filter(|_| listed == Callers::Listed).map(callers).unwrap_or_default(),
        };
        view.add(delivery);
        view
    }

    fn add(&mut self, delivery: &Delivery) {
        self.services.push(delivery.service.to_string());
        // A port that is strict for one service is strict.
        if delivery.mode == Mode::Strict {
            self.mode = Mode::Strict;
        }
    }

    /// Whether nobody has called in clear for that long, as far as was observed; a strict port cannot be called so.
    pub fn is_clean_for(&self, wanted: Duration) -> bool {
        self.mode == Mode::Strict || (self.observed_since.is_some() && self.clean_for_s >= wanted.as_secs())
    }
}

fn callers(record: &PortRecord) -> Vec<CallerView> {
    let mut callers: Vec<CallerView> = record
        .callers
        .iter()
        .map(|(caller, seen)| CallerView {
            address: if let PlainCaller::Address(address) = caller { Some(*address) } else { None },
            uid: if let PlainCaller::Uid(uid) = caller { Some(*uid) } else { None },
            connections: seen.connections,
            first_seen: seen.first_seen,
            last_seen: seen.last_seen,
        })
        .collect();
    callers.sort_by_key(|caller| std::cmp::Reverse((caller.connections, caller.last_seen)));
    callers
}

/// The ledger as two tables; `user` gives the name of a uid.
pub fn ledger(view: &LedgerView, now: SystemTime, user: impl Fn(u32) -> Option<String>) -> String {
    let now = unix_seconds(now);
    let ago = |time: u64| format!("{} ago", span(now.saturating_sub(time)));
    let ports = view.ports.iter().map(|port| {
        let strict = port.mode == Mode::Strict;
        let unless_strict = |text: String| if strict { "-".to_owned() } else { text };
        vec![
            port.port.to_string(),
            port.services.join(","),
            port.unit.clone(),
            port.mode.label().to_owned(),
            unless_strict(port.plaintext_connections.to_string()),
            unless_strict(port.last_plaintext.map_or_else(|| "never".into(), ago)),
            unless_strict(port.observed_since.map_or_else(|| "not counted".into(), |_| span(port.clean_for_s))),
            unless_strict(port.observed_since.map_or_else(|| "-".into(), ago)),
            unless_strict(if port.unobserved_s == 0 { "-".into() } else { span(port.unobserved_s) }),
            if strict { port.refused.to_string() } else { "-".into() },
        ]
    });
    let columns =
        ["PORT", "SERVICE", "UNIT", "MODE", "PLAINTEXT", "LAST", "CLEAN FOR", "OBSERVED SINCE", "GAPS", "REFUSED"];
    let mut page = table(&columns, ports.collect());
    let callers: Vec<Vec<String>> = view
        .ports
        .iter()
        .flat_map(|port| port.callers.iter().map(move |caller| (port, caller)))
        .map(|(port, caller)| {
            let who = named(caller, &user);
            vec![
                port.port.to_string(),
                who,
                caller.connections.to_string(),
                ago(caller.first_seen),
                ago(caller.last_seen),
            ]
        })
        .collect();
    if !callers.is_empty() {
        page += &format!("plaintext callers\n{}", table(&["PORT", "CALLER", "CONNECTIONS", "FIRST", "LAST"], callers));
    }
    if view.dropped_callers > 0 {
        page += &format!("  ‼ {} callers are forgotten: there were too many to remember\n", view.dropped_callers);
    }
    page
}

fn named(caller: &CallerView, user: impl Fn(u32) -> Option<String>) -> String {
    match (caller.address, caller.uid) {
        (Some(address), _) => address.to_string(),
        (None, Some(uid)) => match user(uid) {
            Some(name) => format!("local uid {uid} ({name})"),
            None => format!("local uid {uid}"),
        },
        (None, None) => "(others)".to_owned(),
    }
}

fn span(seconds: u64) -> String {
    duration(i64::try_from(seconds).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(port: u16, mode: Mode, observed_since: Option<u64>, clean_for_s: u64) -> PortView {
        let caller = |address: Option<&str>, uid| CallerView {
            address: address.and_then(|address| address.parse().ok()),
            uid,
            connections: 3,
            first_seen: 1000,
            last_seen: 1060,
        };
        PortView {
            port,
            services: vec!["smtp.shop".into()],
            unit: "smtp.service".into(),
            mode,
            observed_since,
            unobserved_s: 0,
            clean_for_s,
            last_plaintext: Some(1060),
            plaintext_connections: 6,
            refused: 4,
            callers: vec![caller(Some("10.0.0.9"), None), caller(None, Some(33)), caller(None, None)],
        }
    }

    #[test]
    fn only_observed_time_makes_a_permissive_port_clean() {
        let week = Duration::from_secs(7 * 86_400);
        assert!(port(25, Mode::Permissive, Some(0), week.as_secs()).is_clean_for(week));
        assert!(!port(25, Mode::Permissive, Some(0), week.as_secs() - 1).is_clean_for(week));
        assert!(!port(25, Mode::Permissive, None, 0).is_clean_for(Duration::ZERO));
        assert!(port(25, Mode::Strict, None, 0).is_clean_for(week));
    }

    #[test]
    fn callers_are_shown_by_address_or_user() {
        let view = LedgerView {
            counted_at: Some(1200),
            ports: vec![port(25, Mode::Permissive, Some(600), 140), port(80, Mode::Strict, None, 0)],
            dropped_callers: 1,
        };
        let page = ledger(&view, SystemTime::UNIX_EPOCH + Duration::from_secs(1200), |uid| {
            (uid == 33).then(|| "www-data".to_owned())
        });
        for text in ["10.0.0.9", "local uid 33 (www-data)", "(others)", "2m20s", "10m0s ago", "1 callers are forgotten"]
        {
            assert!(page.contains(text), "missing `{text}` in\n{page}");
        }
    }
}
