//! Other trust domains this host believes, and how fresh their bundles are.

use meshd_pki_client::{Credentials, Federated, Freshness, RenewalMetrics};
use serde::{Deserialize, Serialize};

use super::show::{duration, section};
use crate::telemetry::Exposition;
use crate::unix_time::unix_seconds;

/// How often a publisher is asked that names no time, and within which bounds.
const DEFAULT_S: u64 = 300;
const BOUNDS_S: (u64, u64) = (30, 86_400);
/// A bundle not fetched for so many of these is worth a warning: its publisher was asked that often in vain.
const MISSED: u64 = 3;

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct FederationView {
    pub trust_domain: String,
    pub sequence: u64,
    pub roots: usize,
    /// Identities of this host that may have dealings with it.
    pub identities: Vec<String>,
    /// Unix time at which this bundle came here.
    pub since_unix: i64,
    /// How often the PKI asks the publisher.
    pub refresh_every_s: u64,
    /// Unix time of the publisher's last good answer to the PKI, and of the next question; none before the PKI said.
    pub last_good_unix: Option<i64>,
    pub next_unix: Option<i64>,
}

pub(super) fn views(credentials: &Credentials, renewals: &RenewalMetrics) -> Vec<FederationView> {
    let freshness = renewals.federation_freshness();
    let domains = credentials.federation.domains.iter();
    domains.map(|(domain, one)| FederationView::of(one, freshness.get(domain).copied())).collect()
}

impl FederationView {
    fn of(one: &Federated, fresh: Option<Freshness>) -> FederationView {
        let every = if one.bundle.refresh_hint_s == 0 { DEFAULT_S } else { one.bundle.refresh_hint_s };
        let known = |time: fn(&Freshness) -> i64| fresh.as_ref().map(time).filter(|time| *time != 0);
        FederationView {
            trust_domain: one.bundle.trust_domain.to_string(),
            sequence: one.bundle.sequence,
            roots: one.bundle.roots.len(),
            identities: one.identities.iter().map(|id| id.short().to_owned()).collect(),
            since_unix: unix_seconds(one.since).cast_signed(),
            refresh_every_s: every.clamp(BOUNDS_S.0, BOUNDS_S.1),
            last_good_unix: known(|fresh| fresh.last_good_unix),
            next_unix: known(|fresh| fresh.next_unix),
        }
    }

    /// What is wrong with it, if the publisher is out of reach for long.
    pub fn stale(&self, now: i64) -> Option<String> {
        let age = u64::try_from(now - self.last_good_unix?).unwrap_or(0);
        (age > MISSED * self.refresh_every_s).then(|| {
            let (ago, every) = (duration(age.cast_signed()), duration(self.refresh_every_s.cast_signed()));
            format!("the bundle of {} was last fetched {ago} ago, to be asked for every {every}", self.trust_domain)
        })
    }

    fn row(&self, now: i64) -> Vec<String> {
        let ago = |time: i64| duration((now - time).max(0));
        vec![
            self.trust_domain.clone(),
            self.sequence.to_string(),
            self.roots.to_string(),
            ago(self.since_unix),
            self.last_good_unix.map_or_else(|| "-".to_owned(), ago),
            self.next_unix.map_or_else(|| "-".to_owned(), |time| duration((time - now).max(0))),
            self.identities.join(", "),
        ]
    }
}

/// Nothing for a host that has to do with its own trust domain only.
pub(super) fn show(views: &[FederationView], now: i64) -> String {
    if views.is_empty() {
        return String::new();
    }
    let columns = ["TRUST DOMAIN", "SEQUENCE", "ROOTS", "HELD FOR", "FETCHED AGO", "NEXT IN", "FOR"];
    section("federation", &columns, views.iter().map(|view| view.row(now)).collect())
}

pub(super) fn metrics(views: &[FederationView], refused: u64) -> [Exposition; 3] {
    let per_domain = |value: fn(&FederationView) -> f64| {
        views.iter().map(|view| (vec![("trust_domain", view.trust_domain.clone().into())], value(view))).collect()
    };
    [
        Exposition::gauge(
            "meshd_federation_sequence",
            "Of the bundle of another trust domain in force here",
            per_domain(|view| view.sequence as f64),
        ),
        Exposition::gauge(
            "meshd_federation_last_good_timestamp_seconds",
            "When the PKI last had a good answer of the bundle's publisher (Unix time, 0 not known yet)",
            per_domain(|view| view.last_good_unix.unwrap_or(0) as f64),
        ),
        Exposition::counter(
            "meshd_federation_refused",
            "Bundles of other trust domains that the PKI sent and this host did not take over",
            vec![(Vec::new(), refused as f64)],
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(last_good_unix: Option<i64>) -> FederationView {
        FederationView {
            trust_domain: "other.example".to_owned(),
            sequence: 7,
            roots: 2,
            identities: vec!["ns/shop/sa/web".to_owned()],
            since_unix: 1000,
            refresh_every_s: 300,
            last_good_unix,
            next_unix: Some(5000),
        }
    }

    #[test]
    fn a_bundle_is_stale_after_three_intervals_and_not_before_anything_is_known() {
        assert_eq!(view(None).stale(1_000_000), None);
        assert_eq!(view(Some(1000)).stale(1900), None);
        let said = view(Some(1000)).stale(1901).unwrap();
        assert!(said.contains("other.example") && said.contains("15m1s") && said.contains("5m0s"), "{said}");
    }

    #[test]
    fn the_page_has_sequence_age_and_next_refresh() {
        let page = show(&[view(Some(4000))], 4060);
        for part in ["other.example", "7", "51m0s", "1m0s", "15m40s", "ns/shop/sa/web"] {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert_eq!(show(&[], 0), "");
    }
}
