//! How long hosts may come back, and who waits for whom.

use std::collections::BTreeMap;

use crate::issue::Caller;
use crate::lifetimes::LEAF_BACKDATE;
use crate::pki::Pki;
use crate::refused::Refused;
use crate::store::grants::Terms;
use crate::store::hosts::{self, Host, HostState};
use crate::store::{View, settings, trust};
use crate::times::{rfc3339, seconds, unix};

/// Hosts ask again within 5 min, whatever went wrong before, and notice within as much that the PKI is another.
const SETTLING_S: i64 = 900;

/// A host that has got nothing from this PKI yet may do so only as long as the operator said.
pub(crate) fn check_time(host: &Host, now: i64) -> Result<(), Refused> {
    match host.adopted_until.filter(|until| now > *until) {
        None => Ok(()),
        Some(until) => Err(Refused::Unauthenticated(format!(
            "host `{0}` had until {1} to come back to the PKI that took the place of a lost one; make a token with \
             `meshd-pki token create --host {0}` and run `meshd join`",
            host.id,
            rfc3339(until)
        ))),
    }
}

impl Pki {
    /// What a host gets now, others believe only once they know this PKI's root. So hosts that still hold good
    /// certificates of the PKI before get none until all have said that they do, or time is up.
    pub(crate) fn wait_for_others(
        &self,
        view: &mut dyn View,
        caller: &Caller,
        granted: &BTreeMap<String, Terms>,
    ) -> Result<(), Refused> {
        let (now, certificate) = (self.now(), &caller.certificate);
        if caller.host.adopted_until.is_none() || settings::recovered_at(view)?.is_none() {
            return Ok(());
        }
        // Before the first was heard none could come: the statement is there earlier than the address it is asked at.
        let since = settings::returned_at(view)?.unwrap_or_else(|| unix(now));
        let shortest = granted.values().filter_map(|terms| i64::try_from(terms.ttl_s?).ok());
        let shortest = shortest.chain([seconds(self.lifetimes.leaf)]).min().unwrap_or_default();
        let until = since + SETTLING_S.min(shortest / 2);
        let life = certificate.not_after.duration_since(certificate.not_before + LEAF_BACKDATE).unwrap_or_default();
        if unix(now) >= until || certificate.not_after < now + life / 10 {
            return Ok(());
        }
        let trust = trust::trust(view)?;
        let needed = trust.active().map_or(0, |root| root.published_sequence);
        let all = hosts::hosts(view)?.into_iter();
        let behind = all.filter(|one| one.state == HostState::Active && one.adopted_until.is_some());
        let behind = behind.filter(|one| one.acked_sequence < needed).count();
        match behind {
            0 => Ok(()),
            _ => Err(Refused::Unavailable(format!(
                "{behind} hosts do not know the roots of this PKI yet, which took the place of a lost one; renewals go \
                 on when they do, at {} at the latest",
                rfc3339(until)
            ))),
        }
    }
}
