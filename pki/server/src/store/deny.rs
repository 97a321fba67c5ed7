//! Who is refused although their certificates are still valid.

use meshd_identity::statements::{Denied, DenySet, Whom};
use meshd_identity::{SpiffeId, TrustDomain};
use serde::{Deserialize, Serialize};

use super::{DbError, Records, View, get, put};

const KEY: &str = "deny";
/// The end of an entry that an operator has to remove: 9999-12-31.
pub(crate) const NEVER: i64 = 253_402_300_799;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Deny {
    pub(crate) sequence: u64,
    pub(crate) entries: Vec<Denied>,
}

impl Deny {
    /// Whether a certificate of this identity and serial is denied for one of them.
    pub(crate) fn names(&self, spiffe_id: &str, serial: &str) -> bool {
        self.entries.iter().any(|one| match &one.whom {
            Whom::Identity(id) => id.as_str() == spiffe_id,
            Whom::Serial(denied) => denied == serial,
            Whom::Authority(_) => false,
        })
    }

    pub(crate) fn names_identity(&self, id: &SpiffeId) -> bool {
        self.entries.iter().any(|one| matches!(&one.whom, Whom::Identity(denied) if denied == id))
    }

    pub(crate) fn names_authority(&self, key: &str) -> bool {
        self.entries.iter().any(|one| matches!(&one.whom, Whom::Authority(denied) if denied == key))
    }

    pub(crate) fn to_set(&self, domain: &TrustDomain) -> DenySet {
        DenySet { trust_domain: domain.clone(), sequence: self.sequence, entries: self.entries.clone() }
    }
}

pub(crate) fn deny(view: &mut dyn View) -> Result<Deny, DbError> {
    Ok(get(view, KEY)?.unwrap_or_default())
}

/// Puts an entry in, once: of two about the same, the one that stays longer.
pub(crate) fn include(all: &mut Vec<Denied>, new: Denied) {
    match all.iter_mut().find(|one| one.whom == new.whom) {
        Some(one) => one.until = one.until.max(new.until),
        None => all.push(new),
    }
}

/// Changes the set and gives it a sequence above every other: a time, so that it is above those of a later state than
/// the backup that was restored. While a newer set is known to be out there (`floor`), only what comes from that set may
/// change this one: any other change would take its place.
pub(crate) fn change(
    records: &mut dyn Records,
    floor: u64,
    now_ms: u64,
    act: impl FnOnce(&mut Vec<Denied>),
) -> Result<Deny, DbError> {
    let mut deny = deny(records)?;
    let before = deny.entries.clone();
    act(&mut deny.entries);
    deny.entries.sort();
    deny.entries.dedup();
    if deny.entries != before || deny.sequence < floor {
        deny.sequence = now_ms.max(deny.sequence + 1).max(floor.saturating_add(1));
        put(records, KEY, &deny)?;
    }
    Ok(deny)
}
