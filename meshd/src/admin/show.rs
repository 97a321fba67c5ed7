//! `meshd status` and `meshd edges` as tables.

use super::view::{EdgeView, StatusView};
use super::{registrations, sources, tasks, withheld};
use crate::capture::KeeperView;

/// The status as a page of text.
pub fn status(status: &StatusView) -> String {
    let mut page = format!(
        "host {} in {} (meshd {}, up {}, {} workers, {} open connections)\n",
        status.host_id,
        status.trust_domain,
        status.version,
        duration(status.uptime_s as i64),
        status.workers,
        status.open_connections,
    );
    let identities = status.identities.iter().map(|identity| {
        let life = match identity.expires_in_s {
            ..=0 => "EXPIRED".to_owned(),
            left => duration(left),
        };
        vec![identity.unit.clone(), identity.id.clone(), life]
    });
    page += &section("identities", &["UNIT", "IDENTITY", "EXPIRES IN"], identities.collect());
    let is_claimed = |id: &String| status.withheld.iter().any(|withheld| withheld.identity == *id);
    for (id, reason) in status.refused_identities.iter().filter(|(id, _)| !is_claimed(id)) {
        page += &format!("  ‼ {id}: {reason}\n");
    }
    page += &withheld::show(&status.withheld);
    let ports = status.enrolled.iter().filter_map(|row| Some(vec![row.selector.clone(), row.owner.clone()?]));
    let ports: Vec<Vec<String>> = ports.collect();
    if !ports.is_empty() {
        page += &section("enrolled ports", &["PORT", "OWNER"], ports);
    }
    let serves = status.serves.iter().map(|row| {
        vec![
            format!("{}:{}", row.service, row.port),
            row.unit.clone(),
            row.deliver.clone(),
            row.mode.label().to_owned(),
        ]
    });
    page += &section("serves", &["SERVICE", "UNIT", "DELIVERS TO", "MODE"], serves.collect());
    let services = status.services.iter().map(|service| {
        let ports: Vec<String> = service.ports.iter().map(u16::to_string).collect();
        let vip = service.vip.clone().unwrap_or_else(|| "-".into());
        let endpoints = service.endpoints.to_string();
        let (routes, policies) = (service.routes, service.authorization + usize::from(service.policy.is_some()));
        let (routes, policies) = (routes.to_string(), policies.to_string());
        vec![service.dns.clone(), vip, ports.join(","), endpoints, service.source.clone(), routes, policies]
    });
    let columns = ["NAME", "VIP", "PORTS", "ENDPOINTS", "SOURCE", "ROUTES", "POLICIES"];
    page += &section("services", &columns, services.collect());
    page += &sources::show(&status.sources);
    page += &sources::imports(&status.imports);
    page += &registrations::show(&status.registrations);
    page += &capture(&status.capture);
    page += &tasks::show(&status.tasks);
    page += &status.pki.show();
    page += &format!("  {} renewals, {} attempts failed\n", status.renewals_ok, status.renewals_failed);
    page
}

/// What of capture is not as configured stands out; `meshd intercept status` says more.
fn capture(capture: &KeeperView) -> String {
    let mut page =
        format!("capture: {}, plan {}\n", capture.backend.label(), capture.plan.as_deref().unwrap_or("none"));
    if capture.held {
        page += "  ‼ the configured plan is held back: it was not confirmed in time\n";
    }
    if capture.reverted {
        page += "  ‼ all rules are reverted; `meshd intercept apply` puts them back\n";
    }
    if !capture.bypass.is_empty() {
        page += &format!("  ‼ bypass is on for {}; `meshd bypass off` ends it\n", capture.bypass.join(", "));
    }
    page
}

/// Edges as a table with Linkerd's columns.
pub fn edges(edges: &[EdgeView]) -> String {
    let dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
    let rows = edges.iter().map(|edge| {
        vec![
            edge.direction.clone(),
            dash(&edge.client_id),
            dash(&edge.server_id),
            dash(&edge.service),
            if edge.secured { "√".into() } else { "×".into() },
            edge.open.to_string(),
            edge.opened.to_string(),
            edge.failed.to_string(),
            edge.bytes_sent.to_string(),
            edge.bytes_received.to_string(),
        ]
    });
    let columns =
        ["DIRECTION", "CLIENT_ID", "SERVER_ID", "SERVICE", "SECURED", "OPEN", "TOTAL", "FAILED", "SENT", "RECEIVED"];
    table(&columns, rows.collect())
}

pub(super) fn section(title: &str, columns: &[&str], rows: Vec<Vec<String>>) -> String {
    if rows.is_empty() {
        return format!("{title}: none\n");
    }
    format!("{title}\n{}", table(columns, rows))
}

pub(super) fn table(columns: &[&str], rows: Vec<Vec<String>>) -> String {
    let header: Vec<String> = columns.iter().map(|column| (*column).to_owned()).collect();
    let lines: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text += &format!("  {}\n", cells.join("  ").trim_end());
    }
    text
}

pub(super) fn duration(seconds: i64) -> String {
    match seconds {
        ..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..172_800 => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_unsecured_edges_stand_out() {
        let edge = EdgeView {
            direction: "outbound".into(),
            client_id: Some("spiffe://m/ns/shop/sa/web".into()),
            server_id: None,
            unit: None,
            service: Some("payments.shop".into()),
            secured: false,
            open: 1,
            opened: 2,
            failed: 0,
            bytes_sent: 3,
            bytes_received: 4,
        };
        let text = edges(&[edge]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0].find("SERVER_ID"), lines[1].find("-  "));
        assert!(lines[1].contains('×'));
    }
}
