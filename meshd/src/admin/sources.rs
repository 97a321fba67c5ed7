//! How the sources of discovery are doing, for `meshd status` and Prometheus.

use std::time::SystemTime;

use meshd_discovery::{Import, SourceHealth, Why};
use serde_json::Value;

use super::show::{duration, section};
use super::view::unix;
use crate::telemetry::Exposition;
use crate::unix_time::unix_now;

const DAY: u64 = 86_400;

/// As a section of the status page, errors below it.
pub(super) fn show(sources: &[Value]) -> String {
    let now = unix_now();
    let rows = sources.iter().map(|source| {
        let text = |field: &str| source[field].as_str().unwrap_or_default().to_owned();
        let count = |field: &str| source[field].as_u64().unwrap_or_default().to_string();
        let since = |field: &str| match source[field].as_u64() {
            Some(at) => duration(now.saturating_sub(at).cast_signed()),
            None => "never".to_owned(),
        };
        let [services, endpoints, stale] = ["services", "endpoints", "stale"].map(count);
        let resources = match source["refused_resources"].as_u64() {
            Some(refused) if refused > 0 => format!("{} ({refused} refused)", count("resources")),
            _ => count("resources"),
        };
        let times = [since("last_ok"), since("last_listed")];
        let row = [text("name"), text("kind"), services, endpoints, stale].into_iter().chain(times);
        row.chain([resources]).collect()
    });
    let columns = ["SOURCE", "KIND", "SERVICES", "ENDPOINTS", "STALE", "HEARD", "LISTED", "ROUTES+POLICIES"];
    let mut page = section("sources", &columns, rows.collect());
    for source in sources {
        for error in source["errors"].as_array().into_iter().flatten() {
            let error = error.as_str().unwrap_or_default();
            page += &format!("  ‼ source {}: {error}\n", source["name"].as_str().unwrap_or_default());
        }
    }
    page
}

/// What sources on other machines are asked for, and why; nothing where there are none.
pub(super) fn imports(imports: &[Import]) -> String {
    let today = unix_now() / DAY;
    let rows = imports.iter().map(|import| {
        let why = match import.why {
            Why::Declared => "declared",
            Why::LookedUp => "looked up",
        };
        let used = match import.last_used.map(|at| today.saturating_sub(at / DAY)) {
            None => "-".to_owned(),
            Some(0) => "today".to_owned(),
            Some(days) => format!("{days}d ago"),
        };
        vec![import.name.clone(), why.to_owned(), if import.known { "yes" } else { "no" }.to_owned(), used]
    });
    match imports {
        [] => String::new(),
        _ => section("imports", &["NAME", "WHY", "KNOWN", "USED"], rows.collect()),
    }
}

pub(crate) fn metrics(sources: &[SourceHealth]) -> Vec<Exposition> {
    let now = SystemTime::now();
    let each = |value: &dyn Fn(&SourceHealth) -> Option<f64>| {
        let rows =
            sources.iter().filter_map(|health| Some((vec![("source", health.name.clone().into())], value(health)?)));
        rows.collect()
    };
    let age = |at: Option<SystemTime>| Some(now.duration_since(at?).unwrap_or_default().as_secs_f64());
    vec![
        Exposition::gauge("meshd_source_services", "Services by source", each(&|health| Some(health.services as f64))),
        Exposition::gauge(
            "meshd_source_endpoints",
            "Endpoints by source",
            each(&|health| Some(health.endpoints as f64)),
        ),
        Exposition::gauge(
            "meshd_source_resources",
            "Routes and policies by source",
            each(&|health| Some(health.resources as f64)),
        ),
        Exposition::gauge(
            "meshd_source_refused_resources",
            "Documents of routes and policies that cannot be understood; the last good version stays in force",
            each(&|health| Some(health.refused_resources as f64)),
        ),
        Exposition::gauge(
            "meshd_source_stale_records",
            "Endpoints and documents a source no longer names, which is not believed yet",
            each(&|health| Some(health.stale as f64)),
        ),
        Exposition::gauge(
            "meshd_source_errors",
            "What is wrong with a source now",
            each(&|health| Some(health.errors.len() as f64)),
        ),
        Exposition::gauge(
            "meshd_source_last_ok_timestamp_seconds",
            "When a source was last known to be current (Unix time)",
            each(&|health| Some(health.last_ok.map_or(0.0, unix))),
        ),
        Exposition::gauge(
            "meshd_source_staleness_seconds",
            "Since a source was last known to be current; absent until it was",
            each(&|health| age(health.last_ok)),
        ),
        Exposition::gauge(
            "meshd_source_list_age_seconds",
            "Since the oldest complete list of a source that holds was read; absent before",
            each(&|health| age(health.last_listed)),
        ),
        Exposition::counter(
            "meshd_source_suspected",
            "Times a service of a source, or all of it, was to be read again because endpoints could not be reached",
            each(&|health| Some(health.suspected as f64)),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_import_shows_why_it_is_one_and_when_it_was_used() {
        let import = |name: &str, why, known, last_used| Import { name: name.into(), why, known, last_used };
        let page = imports(&[
            import("*.shop", Why::Declared, true, None),
            import("a.bank", Why::LookedUp, true, Some(unix_now() - 3 * DAY)),
            import("x.bank", Why::LookedUp, false, Some(unix_now())),
        ]);
        let lines: Vec<String> =
            page.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(lines[2..], ["*.shop declared yes -", "a.bank looked up yes 3d ago", "x.bank looked up no today"]);
        assert_eq!(imports(&[]), "");
    }

    #[test]
    fn a_source_shows_when_it_was_heard_of_and_what_is_wrong_with_it() {
        let now = unix_now();
        let etcd = json!({"name": "store", "kind": "etcd", "services": 3, "endpoints": 7, "stale": 1,
            "resources": 5, "refused_resources": 2, "last_ok": now - 61, "last_listed": now - 3700, "errors": ["cannot be reached"]});
        let files = json!({"name": "files", "kind": "files", "services": 0, "endpoints": 0, "stale": 0,
            "last_ok": null, "last_listed": null, "errors": []});
        let page = show(&[etcd, files]);
        let lines: Vec<Vec<&str>> = page.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[2][..5], ["store", "etcd", "3", "7", "1"]);
        assert!(lines[2][5].starts_with("1m") && lines[2][6].starts_with("1h1m"), "{page}");
        assert_eq!(lines[2][7..], ["5", "(2", "refused)"]);
        assert_eq!(lines[3][5..], ["never", "never", "0"]);
        assert!(page.ends_with("‼ source store: cannot be reached\n"), "{page}");
    }
}
