//! How this host stands with its PKI: what it holds, how fresh that is, and whether it would believe itself.

use std::collections::BTreeMap;

use meshd_pki_client::{Credentials, RenewalMetrics};
use serde::{Deserialize, Serialize};

use super::federation::{self, FederationView};
use crate::proxy::Shared;
use crate::telemetry::Exposition;
use crate::unix_time::unix_now;

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct PkiView {
    /// The conversation with the PKI is held now.
    pub connected: bool,
    /// Unix time of the PKI's last word: until then this host had everything that was new.
    pub last_heard_unix: Option<i64>,
    /// This host's clock minus the PKI's.
    pub clock_offset_s: f64,
    /// Why the last attempt to renew failed.
    pub last_error: Option<String>,
    pub bundle_sequence: u64,
    pub deny_sequence: u64,
    /// Entries of the deny set in force.
    pub denied: usize,
    /// Times this host came back by the key it enrolled with.
    pub readmissions: u64,
    /// Why this host has given up its identities, if it is banned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub banned: Option<String>,
    /// Identities for which this host's handshake with itself fails, and why.
    pub self_handshake_failing: BTreeMap<String, String>,
    /// Other trust domains believed here.
    #[serde(default)]
    pub federation: Vec<FederationView>,
    /// Bundles of other trust domains that the PKI sent and that are not taken over, and why.
    #[serde(default)]
    pub federation_refused: BTreeMap<String, String>,
    #[serde(default)]
    pub federation_refusals: u64,
}

impl PkiView {
    pub(super) fn of(renewals: &RenewalMetrics, credentials: &Credentials, shared: &Shared) -> PkiView {
        let denied = shared.tls.load().denied().index();
        let failing = shared.telemetry.self_handshakes.failing().into_iter();
        PkiView {
            connected: renewals.is_connected(),
            last_heard_unix: renewals.last_heard_unix(),
            clock_offset_s: renewals.clock_offset_ms() as f64 / 1000.0,
            last_error: renewals.last_error(),
            bundle_sequence: credentials.bundle.sequence,
            deny_sequence: denied.sequence,
            denied: denied.len(),
            readmissions: renewals.readmissions(),
            banned: credentials.banned.then(|| credentials.why_banned()),
            self_handshake_failing: failing.map(|(id, error)| (id.to_string(), error)).collect(),
            federation: federation::views(credentials, renewals),
            federation_refused: credentials.federation.refused.clone(),
            federation_refusals: renewals.federation_refused(),
        }
    }

    pub(super) fn show(&self) -> String {
        let link = if self.connected { "connected" } else { "not connected" };
        let PkiView { bundle_sequence, deny_sequence, denied, clock_offset_s, .. } = self;
        let mut page = format!(
            "PKI: {link}, bundle {bundle_sequence}, deny set {deny_sequence} ({denied} entries), clock {clock_offset_s:+.1} s\n"
        );
        if let Some(why) = &self.banned {
            page += &format!("  ‼ {why}\n");
        }
        if let Some(error) = &self.last_error {
            page += &format!("  ‼ {error}\n");
        }
        for (id, error) in &self.self_handshake_failing {
            page += &format!("  ‼ {id}: this host would not believe itself, nor will peers: {error}\n");
        }
        page += &federation::show(&self.federation, unix_now().cast_signed());
        for (domain, reason) in &self.federation_refused {
            page += &format!("  ‼ the bundle sent for {domain} is refused: {reason}\n");
        }
        page
    }

    pub(super) fn metrics(&self) -> Vec<Exposition> {
        let gauge = |name, help, value: f64| Exposition::gauge(name, help, vec![(Vec::new(), value)]);
        let mut metrics = vec![
            gauge("meshd_pki_connected", "1 while the conversation with the PKI is held", f64::from(self.connected)),
            gauge(
                "meshd_pki_last_heard_timestamp_seconds",
                "The PKI's last word in the conversation (Unix time, 0 never since start)",
                self.last_heard_unix.unwrap_or(0) as f64,
            ),
            gauge("meshd_clock_offset_seconds", "This host's clock minus the PKI's", self.clock_offset_s),
            gauge(
                "meshd_bundle_sequence",
                "Of the trust bundle in force; the time it was made, in milliseconds (Unix time)",
                self.bundle_sequence as f64,
            ),
            gauge(
                "meshd_deny_sequence",
                "Of the deny set in force; the time it was made, in milliseconds (Unix time), 0 for none",
                self.deny_sequence as f64,
            ),
            gauge("meshd_deny_entries", "Entries of the deny set in force", self.denied as f64),
            gauge(
                "meshd_banned",
                "1 while the deny set in force names this host, which has given up its identities then",
                f64::from(u8::from(self.banned.is_some())),
            ),
            Exposition::counter(
                "meshd_readmissions",
                "Times this host came back by the key it enrolled with, because its certificate was not good any more",
                vec![(Vec::new(), self.readmissions as f64)],
            ),
        ];
        metrics.extend(federation::metrics(&self.federation, self.federation_refusals));
        metrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_says_what_is_wrong() {
        let id = "spiffe://prod.example.org/ns/shop/sa/payments".to_owned();
        let view = PkiView {
            last_error: Some("cannot reach 10.0.0.5:15012".to_owned()),
            self_handshake_failing: BTreeMap::from([(id, "expired".to_owned())]),
            clock_offset_s: -1.25,
            banned: Some("host `web` is banned".to_owned()),
            ..PkiView::default()
        };
        let page = view.show();
        for part in [
            "not connected",
            "-1.2 s",
            "‼ host `web` is banned",
            "10.0.0.5:15012",
            "payments: this host would not believe itself",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
    }
}
