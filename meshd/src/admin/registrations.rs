//! What this host has registered, and how that goes.

use meshd_discovery::{Health, Phase, RegistrationHealth};

use super::show::{duration, section};
use crate::telemetry::Exposition;
use crate::unix_time::unix_now;

/// Nothing where this host registers nothing.
pub(super) fn show(rows: &[RegistrationHealth]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let now = unix_now();
    let shown = rows.iter().map(|row| {
        let age = row.last_ok.map_or("never".to_owned(), |at| duration(now.saturating_sub(at).cast_signed()));
        vec![row.service.clone(), row.source.clone(), row.instance.clone(), word(row.phase), health(row), age]
    });
    let columns = ["SERVICE", "SOURCE", "AS", "STATE", "HEALTH", "CONFIRMED AGO"];
    let mut page = section("registrations", &columns, shown.collect());
    for row in rows {
        if let Some(reason) = &row.unwell {
            page += &format!("  ‼ {} is unhealthy here: {reason}\n", row.service);
        }
        if let Some(error) = &row.error {
            page += &format!("  ‼ registering {} in {}: {error}\n", row.service, row.source);
        }
    }
    page
}

fn word(phase: Phase) -> String {
    match phase {
        Phase::Absent => "absent",
        Phase::Registering => "registering",
        Phase::Held => "held",
        Phase::Superseded => "superseded",
        Phase::Draining => "draining",
        Phase::Gone => "gone",
    }
    .to_owned()
}

fn health(row: &RegistrationHealth) -> String {
    match row.health {
        Health::Healthy => "healthy",
        Health::Unhealthy => "unhealthy",
    }
    .to_owned()
}

pub(super) fn metrics(rows: &[RegistrationHealth]) -> [Exposition; 3] {
    let per_row = |value: fn(&RegistrationHealth) -> f64| {
        let labels = |row: &RegistrationHealth| {
            vec![
                ("source", row.source.clone().into()),
                ("service", row.service.clone().into()),
                ("instance", row.instance.clone().into()),
            ]
        };
        rows.iter().map(|row| (labels(row), value(row))).collect()
    };
    [
        Exposition::gauge(
            "meshd_registration_held",
            "1 while a source has what this host registered there",
            per_row(|row| f64::from(u8::from(row.phase == Phase::Held))),
        ),
        Exposition::gauge(
            "meshd_registration_healthy",
            "1 while it is registered, or would be, as healthy",
            per_row(|row| f64::from(u8::from(row.health == Health::Healthy))),
        ),
        Exposition::gauge(
            "meshd_registration_last_ok_timestamp_seconds",
            "When a source last confirmed that it has it (Unix time, 0 never)",
            per_row(|row| row.last_ok.unwrap_or(0) as f64),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_registration_is_a_line_and_its_trouble_another() {
        let row = RegistrationHealth {
            source: "etcd".to_owned(),
            service: "payments.shop".to_owned(),
            instance: "api-1".to_owned(),
            phase: Phase::Registering,
            health: Health::Healthy,
            unwell: Some("its check fails: exit status: 3".to_owned()),
            epoch: 7,
            last_ok: None,
            error: Some("no etcd member can be reached".to_owned()),
        };
        assert_eq!(show(&[]), "");
        let page = show(std::slice::from_ref(&row));
        assert!(page.contains("registering") && page.contains("never"), "{page}");
        assert!(page.contains("‼ registering payments.shop in etcd: no etcd member"), "{page}");
        assert!(page.contains("‼ payments.shop is unhealthy here: its check fails"), "{page}");
        assert_eq!(metrics(&[row]).map(|metric| metric.series[0].1), [0.0, 1.0, 0.0]);
    }
}
