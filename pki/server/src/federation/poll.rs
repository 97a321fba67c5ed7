//! Follows the bundles of other trust domains.

use std::sync::Arc;
use std::time::Duration;

use meshd_identity::{Bundle, TrustDomain};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{MissedTickBehavior, interval};

use super::accept::{accept, next_poll};
use super::fetch::fetch;
use super::tls;
use crate::audit::Event;
use crate::keys::random;
use crate::pki::Pki;
use crate::store::federation::{self, Federated, Held, Polled, Profile};
use crate::store::{DbError, View};
use crate::times::{unix, unix_ms};

/// Of the bundles of all federated domains: a quarter of what a host takes in one message.
const MOST_BYTES: usize = 1024 * 1024;
/// `federation refresh` is followed within this time.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Until the server stops. Ends nothing and takes nothing away when it fails.
pub(crate) async fn follow(pki: Arc<Pki>) {
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stopping = pki.stopping();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stopping.wait_for(|stops| *stops) => return,
        }
        let looking = pki.clone();
        let due = spawn_blocking(move || looking.federations_due()).await;
        let Ok(Ok(due)) = due else { continue };
        let mut asking = JoinSet::new();
        for one in due {
            asking.spawn(ask(pki.clone(), one));
        }
        while asking.join_next().await.is_some() {}
    }
}

async fn ask(pki: Arc<Pki>, one: Federated) {
    let (preparing, mut stopping) = (pki.clone(), pki.stopping());
    let relationship = one.relationship.clone();
    let config = spawn_blocking(move || preparing.federation_tls(&relationship.trust_domain, &relationship.profile));
    let answer = match config.await {
        Ok(Ok(config)) => tokio::select! {
            fetched = fetch(&one.relationship.url, Arc::new(config)) => fetched.map_err(|error| error.to_string()),
            _ = stopping.wait_for(|stops| *stops) => return,
        },
        Ok(Err(reason)) => Err(reason),
        Err(error) => Err(error.to_string()),
    };
    // A failure to conclude is a failure of the database, which is told by whatever else uses it.
    _ = spawn_blocking(move || pki.conclude(&one, answer)).await;
}

/// All of them go to every host in one message, with what the host came for.
fn fits(others: usize, new: Option<Held>) -> Result<Option<Held>, String> {
    let total = others + new.as_ref().map_or(0, |held| held.jwks.len());
    if new.is_some() && total > MOST_BYTES {
        return Err(format!(
            "with it the bundles of federated domains would have {total} bytes; {MOST_BYTES} are the most"
        ));
    }
    Ok(new)
}

/// Also what was asked in a future that did not come.
fn is_due(polled: &Polled, now: i64) -> bool {
    polled.next_at <= now || polled.at > now
}

impl Pki {
    fn federations_due(&self) -> Result<Vec<Federated>, DbError> {
        if self.distrust().is_some() {
            // What came of it would be judged, and the next time set, by a wrong clock.
            return Ok(Vec::new());
        }
        let now = unix(self.now());
        let all = self.state.database.read(federation::all)?;
        Ok(all.into_iter().filter(|one| is_due(&one.polled, now)).collect())
    }

    fn federation_tls(&self, domain: &TrustDomain, profile: &Profile) -> Result<rustls::ClientConfig, String> {
        match profile {
            Profile::HttpsWeb { authorities } => tls::web(authorities.as_deref()),
            Profile::HttpsSpiffe { spiffe_id } => tls::spiffe(&self.bundle_to_verify(domain, spiffe_id)?, spiffe_id),
        }
    }

    /// That of the trust domain in the endpoint's SPIFFE ID, whichever bundle the endpoint serves.
    fn bundle_to_verify(&self, domain: &TrustDomain, spiffe_id: &str) -> Result<Bundle, String> {
        let named = trust_domain_of(spiffe_id).ok_or_else(|| format!("`{spiffe_id}` is no SPIFFE ID"))?;
        if named == self.trust_domain {
            return Ok(self.signer().bundle.clone());
        }
        let found =
            self.state.database.read(|view| federation::find(view, &named)).map_err(|error| error.to_string())?;
        let held = found.and_then(|one| one.held).ok_or_else(|| {
            format!(
                "no bundle of `{named}` is held to verify the endpoint of `{domain}` with; `meshd-pki federation add {named}`"
            )
        })?;
        Bundle::from_jwks(named, held.jwks.as_bytes()).map_err(|error| error.to_string())
    }

    fn conclude(&self, asked: &Federated, answer: Result<Vec<u8>, String>) -> Result<(), DbError> {
        let now = self.now();
        let domain = &asked.relationship.trust_domain;
        let judge = |held: Option<&Held>| match &answer {
            Ok(document) => accept(domain, held, document, unix(now)).map_err(|error| error.to_string()),
            Err(reason) => Err(reason.clone()),
        };
        let chance = chance();
        let outcome = self.state.database.transaction(|records| -> Result<_, DbError> {
            // It may have been removed, or changed, while the endpoint was asked.
            let Some(known) = federation::find(records, domain)?.filter(|one| one.relationship == asked.relationship)
            else {
                return Ok(None);
            };
            let others = federation::all(records)?.into_iter().filter(|one| one.relationship.trust_domain != *domain);
            let others: usize = others.filter_map(|one| one.held).map(|held| held.jwks.len()).sum();
            let judged = judge(known.held.as_ref()).and_then(|new| fits(others, new));
            if let Ok(Some(new)) = &judged {
                federation::put_held(records, domain, new, unix_ms(now))?;
            }
            let held = judged.as_ref().ok().cloned().flatten().or(known.held);
            let polled = Polled {
                at: unix(now),
                next_at: next_poll(held.as_ref(), unix(now), chance),
                last_good_at: match known.polled.last_good_at {
                    _ if judged.is_ok() => unix(now),
                    last if last > unix(now) => 0,
                    last => last,
                },
                problem: judged.as_ref().err().cloned(),
            };
            federation::put_polled(records, domain, &polled)?;
            Ok(Some((judged, known.polled.problem)))
        })?;
        let Some((judged, before)) = outcome else { return Ok(()) };
        match judged {
            Ok(None) if before.is_some() => {
                tracing::info!(%domain, "the bundle of a federated domain is followed again");
            }
            Ok(None) => {}
            Ok(Some(new)) => self.note_change(domain, &new),
            Err(reason) if before.as_ref() == Some(&reason) => tracing::debug!(%domain, reason, "still"),
            Err(reason) => {
                tracing::warn!(%domain, reason, "the bundle of a federated domain cannot be followed; the last one stays");
            }
        }
        Ok(())
    }

    fn note_change(&self, domain: &TrustDomain, new: &Held) {
        let sequence = new.sequence;
        tracing::info!(%domain, sequence, "a federated domain has a new bundle");
        _ = self.record(&[Event {
            event: "federation_bundle",
            result: "ok",
            detail: Some(format!("{domain}, sequence {sequence}")),
            ..Event::default()
        }]);
    }

    pub(crate) fn federation_revision(&self) -> u64 {
        // A failing database is reported by whatever else reads it.
        self.state.database.read(|view: &mut dyn View| federation::revision(view)).unwrap_or_default()
    }
}

pub(crate) fn trust_domain_of(spiffe_id: &str) -> Option<TrustDomain> {
    let rest = spiffe_id.strip_prefix("spiffe://")?;
    let (domain, path) = rest.split_once('/')?;
    if path.is_empty() { None } else { domain.parse().ok() }
}

fn chance() -> f64 {
    let mut byte = [0];
    // Without randomness followers come together, no more.
    _ = random(&mut byte);
    f64::from(byte[0]) / 256.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_that_would_make_messages_to_hosts_too_large_is_not_taken() {
        let held = |bytes| Some(Held { sequence: 1, refresh_hint_s: 300, jwks: "x".repeat(bytes), changed_at: 0 });
        assert!(fits(MOST_BYTES - 10, held(10)).unwrap().is_some());
        assert!(fits(MOST_BYTES - 10, held(11)).unwrap_err().contains("are the most"));
        assert!(fits(MOST_BYTES + 10, None).unwrap().is_none(), "nothing new makes it no worse");
    }

    #[test]
    fn what_was_asked_by_a_wrong_clock_is_asked_again_at_once() {
        let polled = |at, next_at| Polled { at, next_at, last_good_at: at, problem: None };
        assert!(!is_due(&polled(1000, 1300), 1100));
        assert!(is_due(&polled(1000, 1300), 1300));
        assert!(is_due(&polled(31_000_000, 31_000_300), 1100));
    }
}
