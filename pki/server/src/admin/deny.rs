//! The deny set: who is refused although their certificates are still valid.

use meshd_identity::SpiffeId;
use meshd_identity::statements::{Denied, Whom};
use meshd_pki_api::admin as wire;
use meshd_pki_api::admin::deny_whom;

use super::authority::key_sha256;
use super::host::known;
use super::{AdminError, Desk, done, time};
use crate::audit::Event;
use crate::deny::Floor;
use crate::enrol::excerpt;
use crate::rotation::RootState;
use crate::store::deny::{self, NEVER};
use crate::store::hosts::{self, HostState};
use crate::store::{DbError, View, intermediates, trust};
use crate::times::{seconds, unix};

/// What a command names, resolved.
struct Target {
    entries: Vec<Denied>,
    what: String,
    host: Option<String>,
}

impl Desk<'_> {
    pub(super) fn deny_list(&self) -> Result<wire::DenySet, AdminError> {
        let set = self.state.database.read(deny::deny)?;
        let entries = set.entries.iter().map(|one| {
            let (kind, value) = match &one.whom {
                Whom::Identity(id) => ("identity", id.to_string()),
                Whom::Serial(serial) => ("serial", serial.clone()),
                Whom::Authority(key) => ("authority", key.clone()),
            };
            let until = (one.until < NEVER).then(|| time(one.until));
            wire::Denied { kind: kind.to_owned(), value, until }
        });
        let is_behind = Floor::new(self.state).get() > set.sequence;
        Ok(wire::DenySet { sequence: set.sequence, entries: entries.collect(), is_behind })
    }

    pub(super) fn deny_add(&self, asked: &wire::DenyAdd) -> Result<wire::Done, AdminError> {
        let whom = whom(asked.whom.as_ref())?;
        let what = self.change(|records, told| {
            let target = self.resolve(records, whom)?;
            if let Some(signs) = self.still_needed(records, &target.entries)? {
                return Err(AdminError::NotNow(signs));
            }
            if target.entries.is_empty() {
                return Err(AdminError::NotFound(format!("{}: nothing of it is valid now", target.what)));
            }
            let before = deny::deny(records)?.sequence;
            self.change_deny(records, |all| target.entries.iter().for_each(|one| deny::include(all, one.clone())))?;
            if deny::deny(records)?.sequence == before {
                return Err(AdminError::NotNow(format!("{} is denied already", target.what)));
            }
            told.push(deny_event("deny_add", &target, &asked.reason));
            Ok(target.what)
        })?;
        let follows = vec![
            "hosts that talk to the PKI refuse it within seconds, and close what is open".to_owned(),
            "it is undone by `meshd-pki deny remove`, or goes by itself when the last certificate concerned has ended; \
             an identity stays, and the PKI issues it to nobody meanwhile"
                .to_owned(),
        ];
        Ok(done(format!("denied: {what}"), follows))
    }

    pub(super) fn deny_remove(&self, asked: &wire::DenyRemove) -> Result<wire::Done, AdminError> {
        let whom = whom(asked.whom.as_ref())?;
        let what = self.change(|records, told| {
            let target = self.resolve(records, whom)?;
            self.refuse_if_banned(records, &target)?;
            let before = deny::deny(records)?.sequence;
            let gone = |one: &Denied| target.entries.iter().any(|gone| gone.whom == one.whom);
            self.change_deny(records, |all| all.retain(|one| !gone(one)))?;
            if deny::deny(records)?.sequence == before {
                let why = format!("{} is not in the deny set; see `meshd-pki deny list`", target.what);
                return Err(AdminError::NotFound(why));
            }
            told.push(deny_event("deny_remove", &target, ""));
            Ok(target.what)
        })?;
        Ok(done(format!("no longer denied: {what}"), Vec::new()))
    }

    fn resolve(&self, view: &mut dyn View, whom: &deny_whom::Whom) -> Result<Target, AdminError> {
        match whom {
            deny_whom::Whom::Identity(text) => self.identity(text),
            deny_whom::Whom::Serial(text) => self.serial(view, text),
            deny_whom::Whom::Host(name) => {
                let host = known(view, name)?;
                let longest = self.longest_leaf(view)?;
                let entries = of_host(view, name, None, unix(self.now), longest, self.skew())?;
                let unrecorded = self.unrecorded(view, &host)?.map(|one| format!("; {}", one.hint()));
                let unrecorded = unrecorded.unwrap_or_default();
                let what = format!("the {} valid certificates of host {name}{unrecorded}", entries.len());
                Ok(Target { entries, what, host: Some(name.clone()) })
            }
            deny_whom::Whom::Authority(text) => self.authority(view, text),
        }
    }

    fn identity(&self, text: &str) -> Result<Target, AdminError> {
        let id = SpiffeId::parse_in(&self.state.trust_domain, text);
        let id = id.map_err(|error| AdminError::Invalid(error.to_string()))?;
        if id == SpiffeId::pki(&self.state.trust_domain) {
            let why = "that is the PKI itself: every host would be cut off from it; to replace a key that leaked, \
                       `meshd-pki authority taint` the intermediate that signs";
            return Err(AdminError::Invalid(why.to_owned()));
        }
        let what = format!("identity {id}");
        Ok(Target { entries: vec![Denied { whom: Whom::Identity(id), until: NEVER }], what, host: None })
    }

    fn serial(&self, view: &mut dyn View, text: &str) -> Result<Target, AdminError> {
        let serial = text.replace(':', "").to_ascii_lowercase();
        if serial.is_empty() || serial.len() > 40 || !serial.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let text = excerpt(text);
            return Err(AdminError::Invalid(format!("`{text}` is not a serial: up to 40 hexadecimal digits")));
        }
        let found = hosts::valid_issued(view, unix(self.now))?.into_iter().find(|(_, one)| one.serial == serial);
        let (until, what, host) = match found {
            Some((host, one)) => {
                (one.not_after, format!("certificate {serial} of {} on host {host}", one.spiffe_id), Some(host))
            }
            // Not on record, which happens when the disk was full: no certificate lives longer than that.
            None => (unix(self.now) + self.longest_leaf(view)?, format!("certificate {serial}"), None),
        };
        let entries = vec![Denied { whom: Whom::Serial(serial), until: until + self.skew() }];
        Ok(Target { entries, what, host })
    }

    fn authority(&self, view: &mut dyn View, text: &str) -> Result<Target, AdminError> {
        let roots = trust::trust(view)?.roots.into_iter().map(|root| (root.id, root.certificate, root.not_after));
        let all = intermediates::all(view)?.into_iter().map(|one| (one.id, one.certificate, one.not_after));
        let mut known = roots.chain(all).map(|(id, certificate, end)| (id, key_sha256(&certificate), end));
        let (key, until, what) = match known.find(|(id, key, _)| id == text || key == text) {
            Some((id, key, end)) => (key, end + self.skew(), format!("everything under authority {id}")),
            None if text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) => {
                (text.to_owned(), NEVER, format!("everything under the authority with key {text}"))
            }
            None => {
                let why = format!(
                    "there is no authority {}; see `meshd-pki authority list`, or give the SHA-256 of its \
                     SubjectPublicKeyInfo",
                    excerpt(text)
                );
                return Err(AdminError::NotFound(why));
            }
        };
        Ok(Target { entries: vec![Denied { whom: Whom::Authority(key), until }], what, host: None })
    }

    /// Why denying an authority would cut off everybody, if it would.
    fn still_needed(&self, view: &mut dyn View, entries: &[Denied]) -> Result<Option<String>, AdminError> {
        let keys = entries.iter().filter_map(|one| match &one.whom {
            Whom::Authority(key) => Some(key.as_str()),
            _ => None,
        });
        let keys: Vec<&str> = keys.collect();
        let named = |certificate: &[u8]| keys.contains(&key_sha256(certificate).as_str());
        let trust = trust::trust(view)?;
        let signs = |state: RootState| matches!(state, RootState::Active | RootState::Prepared);
        let root = trust.roots.iter().find(|root| signs(root.state) && named(&root.certificate));
        let all = intermediates::all(view)?;
        let intermediate = all.iter().find(|one| one.replaced_at.is_none() && named(&one.certificate));
        let (kind, id) = match (root, intermediate) {
            (Some(root), _) => (format!("root {} is {}", root.id, root.state.name()), &root.id),
            (None, Some(one)) => (format!("intermediate {} signs now", one.id), &one.id),
            (None, None) => return Ok(None),
        };
        Ok(Some(format!(
            "{kind}: every host would be refused, and what it gets next as well. Run `meshd-pki authority taint {id}` \
             first, and deny it when another signs"
        )))
    }

    /// Half a ban would be neither.
    fn refuse_if_banned(&self, view: &mut dyn View, target: &Target) -> Result<(), AdminError> {
        let named = target.entries.iter().filter_map(|one| match &one.whom {
            Whom::Identity(id) if id.is_system() => Some(id.name().to_owned()),
            _ => None,
        });
        for name in named.chain(target.host.clone()) {
            if hosts::host(view, &name)?.is_some_and(|host| host.state == HostState::Banned) {
                let why = format!(
                    "host `{name}` is banned; `meshd-pki host unban {name}` lifts that, its certificates included"
                );
                return Err(AdminError::NotNow(why));
            }
        }
        Ok(())
    }

    pub(super) fn longest_leaf(&self, view: &mut dyn View) -> Result<i64, DbError> {
        let of_intermediates = intermediates::all(view)?.into_iter().map(|one| one.longest_leaf_s);
        Ok(of_intermediates.chain([seconds(self.lifetimes.leaf)]).max().unwrap_or_default())
    }

    pub(super) fn skew(&self) -> i64 {
        seconds(self.lifetimes.skew)
    }
}

fn deny_event(event: &'static str, target: &Target, reason: &str) -> Event {
    let reason = if reason.trim().is_empty() { String::new() } else { format!(": {}", excerpt(reason.trim())) };
    let (host, detail) = (target.host.clone(), Some(format!("{}{reason}", target.what)));
    Event { event, result: "ok", host, detail, ..Event::default() }
}

fn whom(asked: Option<&wire::DenyWhom>) -> Result<&deny_whom::Whom, AdminError> {
    let given = asked.and_then(|one| one.whom.as_ref());
    given.ok_or_else(|| AdminError::Invalid("say whom: an identity, a serial, a host or an authority".to_owned()))
}

/// Every certificate of a host that has not ended at `now`, and, if given, its identity: what is not on record of it.
pub(super) fn of_host(
    view: &mut dyn View,
    name: &str,
    id: Option<&SpiffeId>,
    now: i64,
    longest: i64,
    skew: i64,
) -> Result<Vec<Denied>, DbError> {
    let issued = hosts::issued(view, name)?.into_iter().filter(|one| one.not_after + skew > now);
    let mut entries: Vec<Denied> =
        issued.map(|one| Denied { whom: Whom::Serial(one.serial), until: one.not_after + skew }).collect();
    let until = entries.iter().map(|one| one.until).chain([now + longest + skew]).max().unwrap_or(NEVER);
    entries.extend(id.map(|id| Denied { whom: Whom::Identity(id.clone()), until }));
    Ok(entries)
}
