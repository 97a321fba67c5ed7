//! What a host may hold of a PKI that was lost: this one believes it still, and has no record of it.

use std::collections::BTreeSet;

use meshd_identity::SpiffeId;
use meshd_identity::statements::{Denied, Whom};

use super::{AdminError, Desk, time};
use crate::store::View;
use crate::store::grants::holders;
use crate::store::hosts::{self, Host, HostState};
use crate::times::unix;

/// Identities whose certificates a host may hold.
pub(super) struct Unrecorded {
    until: i64,
    /// That nobody else holds now.
    alone: Vec<SpiffeId>,
    /// With the other hosts that hold them.
    shared: Vec<(SpiffeId, Vec<String>)>,
}

impl Desk<'_> {
    /// Nothing of a host that is no host of a PKI before, or once all that PKI signed has ended.
    pub(super) fn unrecorded(&self, view: &mut dyn View, host: &Host) -> Result<Option<Unrecorded>, AdminError> {
        let until = host.unrecorded_until.map(|until| until + self.skew());
        let Some(until) = until.filter(|until| *until > unix(self.now)) else { return Ok(None) };
        let mut unrecorded = Unrecorded { until, alone: Vec::new(), shared: Vec::new() };
        let active = hosts::hosts(view)?.into_iter().filter(|other| other.state == HostState::Active);
        let active: BTreeSet<String> = active.map(|other| other.id).filter(|other| *other != host.id).collect();
        for id in hosts::permitted(view, &host.id)? {
            let others: Vec<String> = holders(view, &id)?.intersection(&active).cloned().collect();
            let Ok(id) = id.parse() else { continue };
            match others.is_empty() {
                true => unrecorded.alone.push(id),
                false => unrecorded.shared.push((id, others)),
            }
        }
        Ok(Some(unrecorded))
    }
}

impl Unrecorded {
    /// What cuts nobody else off.
    pub(super) fn denials(&self) -> impl Iterator<Item = Denied> {
        self.alone.iter().map(|id| self.denied(id))
    }

    /// What a ban may have denied, whoever held what then.
    pub(super) fn all(&self) -> Vec<Denied> {
        self.denials().chain(self.shared.iter().map(|(id, _)| self.denied(id))).collect()
    }

    fn denied(&self, id: &SpiffeId) -> Denied {
        Denied { whom: Whom::Identity(id.clone()), until: self.until }
    }

    pub(super) fn follows(&self) -> Vec<String> {
        let until = time(self.until);
        let names: Vec<&str> = self.alone.iter().map(SpiffeId::short).collect();
        let alone = (!names.is_empty()).then(|| {
            let names = names.join(", ");
            format!("certificates of the PKI before are not on record: until {until} nobody is believed to be {names}")
        });
        let shared = self.shared.iter().map(|(id, others)| {
            let (id, others) = (id.short(), others.join(", "));
            format!(
                "the PKI before may have given it certificates of {id}, good until {until}: `meshd-pki deny add --identity \
                 {id}` cuts them off, and {others}, too, until `deny remove`"
            )
        });
        alone.into_iter().chain(shared).collect()
    }

    pub(super) fn hint(&self) -> String {
        let until = time(self.until);
        format!(
            "what the PKI before gave it is not on record here, and good until {until} at the latest: `meshd-pki host ban` \
             refuses it"
        )
    }
}
