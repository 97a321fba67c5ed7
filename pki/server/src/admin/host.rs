//! Hosts: who they are, what root on one of them could be, and how one is shut out.

use std::collections::{BTreeMap, BTreeSet};

use data_encoding::HEXLOWER;
use meshd_identity::SpiffeId;
use meshd_identity::statements::Denied;
use meshd_pki_api::admin as wire;

use super::deny::of_host;
use super::unrecorded::Unrecorded;
use super::{AdminError, Desk, done, time};
use crate::audit::Event;
use crate::deny::Floor;
use crate::issue::shorten;
use crate::labels::texts;
use crate::store::hosts::{self, Host, HostState, Issued};
use crate::store::{Records, View, deny, grants, roles, tokens, trust};
use crate::times::{unix, unix_ms};

/// About 130 bytes each in a signed set: half of what a host takes for one.
const MOST_DENIED: usize = 16_000;

/// In one reply; the database is read as long as it is made.
const MOST_LISTED: usize = 1000;
/// Of the names of identities: messages of gRPC have 4 MiB.
const MOST_BYTES: usize = 2 << 20;

impl Desk<'_> {
    /// Those after this one, as many as fit into a message.
    pub(super) fn host_list(&self, after: &str) -> Result<wire::Hosts, AdminError> {
        self.state.database.read(|view| {
            let mut rest = hosts::hosts(view)?;
            rest.retain(|host| host.id.as_str() > after);
            let newest = trust::trust(view)?.sequence;
            let (mut listed, mut bytes) = (wire::Hosts::default(), 0);
            for host in &rest {
                if listed.hosts.len() >= MOST_LISTED || bytes > MOST_BYTES {
                    listed.next = listed.hosts.last().map(|last| last.id.clone());
                    break;
                }
                let summary = self.summary(view, host, newest)?;
                bytes += summary.identities.iter().map(String::len).sum::<usize>();
                listed.hosts.push(summary);
            }
            Ok(listed)
        })
    }

    fn summary(&self, view: &mut dyn View, host: &Host, newest: u64) -> Result<wire::HostSummary, AdminError> {
        let permitted = hosts::permitted(view, &host.id)?;
        let valid = hosts::issued(view, &host.id)?.into_iter().filter(|one| one.not_after > unix(self.now)).count();
        Ok(wire::HostSummary {
            id: host.id.clone(),
            state: host.state.name().to_owned(),
            enrolled: time(host.enrolled_at),
            last_seen: time(host.last_seen),
            bundle_sequence: host.acked_sequence,
            bundle_is_current: host.acked_sequence >= newest,
            clock_offset_ms: host.clock_offset_ms,
            valid_certificates: u32::try_from(valid).unwrap_or(u32::MAX),
            identities: permitted.iter().map(|id| shorten(id).to_owned()).collect(),
        })
    }

    pub(super) fn host_show(&self, name: &str) -> Result<wire::HostDetail, AdminError> {
        self.state.database.read(|view| {
            let host = known(view, name)?;
            let newest = trust::trust(view)?.sequence;
            let denied = deny::deny(view)?;
            let mut issued = hosts::issued(view, name)?;
            issued.retain(|one| one.not_after > unix(self.now));
            issued.sort_by_key(|one| one.not_after);
            let certificates = issued.iter().map(|one| wire::Certificate {
                serial: one.serial.clone(),
                identity: shorten(&one.spiffe_id).to_owned(),
                authority: one.authority.clone(),
                issued: time(one.issued_at),
                not_after: time(one.not_after),
                denied: denied.names(&one.spiffe_id, &one.serial),
            });
            Ok(wire::HostDetail {
                summary: Some(self.summary(view, &host, newest)?),
                spiffe_id: self.host_id(name)?.to_string(),
                key_sha256: HEXLOWER.encode(&host.key_current),
                enrolled_by: host.enrolled_by.clone(),
                labels: texts(&host.labels),
                roots_in_use: host.roots_in_use.clone(),
                certificates: certificates.collect(),
                open_tokens: self.open_tokens(view, name)?,
            })
        })
    }

    fn open_tokens(&self, view: &mut dyn View, host: &str) -> Result<Vec<String>, AdminError> {
        let open = tokens::open(view, unix(self.now))?.into_iter();
        Ok(open.filter(|token| token.is_for(host)).map(|token| token.id).collect())
    }

    pub(super) fn host_id(&self, name: &str) -> Result<SpiffeId, AdminError> {
        SpiffeId::host(&self.state.trust_domain, name).map_err(|error| AdminError::Invalid(error.to_string()))
    }

    pub(super) fn host_ban(&self, name: &str, reason: &str) -> Result<wire::Done, AdminError> {
        let id = self.host_id(name)?;
        let (serials, shared, unrecorded) = self.change(|records, told| {
            let mut host = known(records, name)?;
            if host.state == HostState::Banned {
                return Err(AdminError::NotNow(format!("host `{name}` is banned already")));
            }
            host.state = HostState::Banned;
            hosts::put_host(records, &host)?;
            tokens::end_those_of(records, name, unix(self.now))?;
            let longest = self.longest_leaf(records)?;
            let mut entries = of_host(records, name, Some(&id), unix(self.now), longest, self.skew())?;
            let serials = entries.len() - 1;
            let unrecorded = self.unrecorded(records, &host)?;
            entries.extend(unrecorded.iter().flat_map(Unrecorded::denials));
            self.change_deny(records, |all| entries.iter().for_each(|one| deny::include(all, one.clone())))?;
            let detail = format!("{serials} certificates denied{}", because(reason));
            told.push(host_event("host_ban", name, &id, detail));
            Ok((serials, tokens::shared_by(records, name, unix(self.now))?, unrecorded))
        })?;
        let mut follows = vec![
            format!("its identity and its {serials} valid certificates are refused, and what is open is closed"),
            "it gets nothing more; JWT-SVIDs it was given end by themselves within an hour".to_owned(),
            format!("until `meshd-pki host unban {name}`"),
        ];
        follows.extend(unrecorded.iter().flat_map(Unrecorded::follows));
        follows.extend(shared_tokens(&shared));
        Ok(done(format!("host {name} is banned"), follows))
    }

    pub(super) fn host_unban(&self, name: &str) -> Result<wire::Done, AdminError> {
        let id = self.host_id(name)?;
        let state = self.change(|records, told| {
            let mut host = known(records, name)?;
            if host.state != HostState::Banned {
                return Err(AdminError::NotNow(format!("host `{name}` is not banned; it is {}", host.state.name())));
            }
            host.unban();
            hosts::put_host(records, &host)?;
            let longest = self.longest_leaf(records)?;
            let entries = of_host(records, name, Some(&id), 0, longest, self.skew())?;
            let unrecorded = self.unrecorded(records, &host)?.map(|one| one.all()).unwrap_or_default();
            let goes = |one: &Denied| entries.iter().any(|gone| gone.whom == one.whom) || unrecorded.contains(one);
            self.change_deny(records, |all| all.retain(|one| !goes(one)))?;
            told.push(host_event("host_unban", name, &id, String::new()));
            Ok(host.state)
        })?;
        let follows = match state {
            HostState::Evicted => format!(
                "it was evicted before that, and still is: `meshd-pki token create --host {name}`, and `meshd join` on it"
            ),
            _ => format!(
                "the key it enrolled counts again; if somebody else may have it: `meshd-pki host evict {name}`, and \
                 join the host with a new token"
            ),
        };
        Ok(done(format!("host {name} is no longer banned"), vec![follows]))
    }

    pub(super) fn host_evict(&self, name: &str, reason: &str) -> Result<wire::Done, AdminError> {
        let id = self.host_id(name)?;
        let (host, valid, shared, unrecorded) = self.change(|records, told| {
            let mut host = known(records, name)?;
            if host.state != HostState::Active {
                let state = host.state.name();
                return Err(AdminError::NotNow(format!("host `{name}` is {state}, and gets nothing as it is")));
            }
            let held = hosts::permitted(records, name)?.into_iter().chain([id.to_string()]).collect();
            self.check_reach(records, &held)?;
            host.evict();
            hosts::put_host(records, &host)?;
            // With the token it joined by, it could repeat that.
            tokens::end_those_of(records, name, unix(self.now))?;
            let detail = because(reason).trim_start_matches(": ").to_owned();
            told.push(host_event("host_evict", name, &id, detail));
            let valid = hosts::issued(records, name)?.into_iter().filter(|one| one.not_after > unix(self.now)).count();
            let unrecorded = self.unrecorded(records, &host)?;
            Ok((host, valid, tokens::shared_by(records, name, unix(self.now))?, unrecorded))
        })?;
        let mut follows = vec![
            match host.enrolled_by.as_str() {
                "" => format!("to let it in again: `meshd-pki token create --host {name}`, and `meshd join` on it"),
                way => format!(
                    "it comes back as soon as it joins by {way} again; to prevent that: `meshd-pki host ban {name}`"
                ),
            },
            format!(
                "its {valid} valid certificates are good until they end; to cut them off now: `meshd-pki deny add \
                 --host {name}`"
            ),
        ];
        follows.extend(unrecorded.map(|one| one.hint()));
        follows.extend(shared_tokens(&shared));
        Ok(done(format!("host {name} is evicted, and its join tokens have ended"), follows))
    }

    pub(super) fn host_blast_radius(&self, name: &str) -> Result<wire::BlastRadius, AdminError> {
        let own = self.host_id(name)?.to_string();
        self.state.database.read(|view| {
            known(view, name)?;
            let permitted: BTreeSet<String> = hosts::permitted(view, name)?.into_iter().collect();
            let mut held: BTreeMap<String, Vec<Issued>> = BTreeMap::from([(own.clone(), Vec::new())]);
            held.extend(permitted.iter().map(|id| (id.clone(), Vec::new())));
            for one in hosts::issued(view, name)?.into_iter().filter(|one| one.not_after > unix(self.now)) {
                held.entry(one.spiffe_id.clone()).or_default().push(one);
            }
            let mut identities = Vec::new();
            for (id, certificates) in &held {
                let others = grants::holders(view, id)?.into_iter().filter(|host| host != name);
                identities.push(wire::Reach {
                    identity: shorten(id).to_owned(),
                    permitted: *id == own || permitted.contains(id),
                    valid_certificates: u32::try_from(certificates.len()).unwrap_or(u32::MAX),
                    last_not_after: certificates.iter().map(|one| one.not_after).max().map(time),
                    other_hosts: others.collect(),
                });
            }
            let roles = roles::all(view)?.into_iter().filter(|(id, _)| held.contains_key(id));
            Ok(wire::BlastRadius {
                host: name.to_owned(),
                identities,
                open_tokens: self.open_tokens(view, name)?,
                roles: roles
                    .map(|(identity, role)| wire::RoleGranted { identity, role: role.name().to_owned() })
                    .collect(),
            })
        })
    }
}

fn host_event(event: &'static str, name: &str, id: &SpiffeId, detail: String) -> Event {
    let (host, identity) = (Some(name.to_owned()), Some(id.to_string()));
    let detail = Some(detail).filter(|text| !text.is_empty());
    Event { event, result: "ok", host, identity, detail, ..Event::default() }
}

/// A set that hosts cannot read would take every later ban from them. It may always become smaller.
fn check_size(before: usize, after: usize) -> Result<(), AdminError> {
    if after <= before.max(MOST_DENIED) {
        return Ok(());
    }
    let why = format!(
        "the deny set would have {after} entries; hosts read {MOST_DENIED} at most. Deny identities (`deny add \
         --identity`) or an authority in the place of single certificates, or wait until some end"
    );
    Err(AdminError::NotNow(why))
}

/// Whoever has been on the host may know their secrets.
fn shared_tokens(ids: &[String]) -> Option<String> {
    let ids = Some(ids.join(", ")).filter(|ids| !ids.is_empty())?;
    Some(format!("whoever kept the join token for several hosts it came by, {ids}, can make other hosts of it"))
}

fn because(reason: &str) -> String {
    let reason = reason.trim();
    if reason.is_empty() { String::new() } else { format!(": {}", crate::enrol::excerpt(reason)) }
}

pub(super) fn known(view: &mut dyn View, name: &str) -> Result<Host, AdminError> {
    if let Some(host) = hosts::host(view, name)? {
        return Ok(host);
    }
    let known: Vec<String> = hosts::hosts(view)?.into_iter().map(|host| host.id).collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Err(AdminError::NotFound(format!("host `{}` is not enrolled; known hosts: {known}", crate::enrol::excerpt(name))))
}

impl Desk<'_> {
    pub(super) fn change_deny(
        &self,
        records: &mut dyn Records,
        act: impl FnOnce(&mut Vec<Denied>),
    ) -> Result<(), AdminError> {
        let floor = Floor::new(self.state);
        if floor.get() > deny::deny(records)?.sequence {
            let why = format!(
                "this PKI was restored from a backup, and hosts hold a newer deny set, which a change now would take the \
                 place of; it comes with the next report of a host, within a minute. Until then `meshd-pki host evict` \
                 works; if no host is left, remove {}",
                floor.path().display()
            );
            return Err(AdminError::NotNow(why));
        }
        let before = deny::deny(records)?.entries.len();
        let after = deny::change(records, floor.get(), unix_ms(self.now), act)?.entries.len();
        check_size(before, after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deny_set_too_large_for_hosts_may_only_become_smaller() {
        assert!(check_size(0, MOST_DENIED).is_ok());
        assert!(check_size(MOST_DENIED, MOST_DENIED + 1).unwrap_err().to_string().contains("deny add"));
        assert!(check_size(MOST_DENIED + 9, MOST_DENIED + 8).is_ok());
    }
}
