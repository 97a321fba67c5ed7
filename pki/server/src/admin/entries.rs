//! Join tokens, and which host may hold which identity.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ipnet::IpNet;
use meshd_identity::{ProcessSelector, SpiffeId};
use meshd_pki_api::admin as wire;

use super::{AdminError, Desk, done};
use crate::commands::{self, CommandError, TokenRequest, workload};
use crate::enrol::excerpt;
use crate::entries::{self, EntryRequest, Parent};
use crate::labels::{Label, label_map, texts};
use crate::store::grants::{self, LabelEntry};
use crate::store::hosts::{self, Entry};
use crate::store::{DbError, View};
use crate::times::rfc3339;

/// A hundred years, so that no time overflows.
const LONGEST_S: u64 = 100 * 365 * 86_400;

impl Desk<'_> {
    pub(super) fn token_create(&self, asked: &wire::TokenCreate) -> Result<wire::Token, AdminError> {
        let (from, labels) = (networks(&asked.from)?, labels(&asked.labels)?);
        let request = TokenRequest {
            host: &asked.host,
            allow: &asked.allow,
            pki: &asked.pki,
            ttl: Duration::from_secs(asked.ttl_s),
            max_uses: asked.max_uses.max(1),
            from: &from,
            labels: &labels,
        };
        let (token, row) = commands::make_token(self.state, &request, self.now)?;
        self.change(|records, told| {
            let reach = self.reach(records, &request)?;
            self.check_reach(records, &reach)?;
            Ok(commands::put_token(records, told, &row)?)
        })?;
        Ok(wire::Token { token: token.to_string() })
    }

    /// What the hosts that come by a token could hold.
    fn reach(&self, view: &mut dyn View, asked: &TokenRequest<'_>) -> Result<BTreeSet<String>, AdminError> {
        let allowed = asked.allow.iter().map(|text| Ok(self.workload(text)?.to_string()));
        let mut reach = allowed.collect::<Result<BTreeSet<_>, AdminError>>()?;
        let labels = label_map(asked.labels).map_err(CommandError::from)?;
        reach.extend(grants::granted_to(view, &labels)?.into_keys());
        match asked.max_uses {
            1 => reach.extend(hosts::permitted(view, asked.host)?),
            _ => reach.extend(waiting_for(view, asked.host)?),
        }
        Ok(reach)
    }

    pub(super) fn entry_list(&self, host: &str) -> Result<wire::Entries, AdminError> {
        let (own, by_labels) = self.state.database.read(|view| -> Result<_, DbError> {
            let by_labels = if host.is_empty() { grants::label_entries(view)? } else { Vec::new() };
            Ok((hosts::entries(view)?, by_labels))
        })?;
        let own = own.into_iter().filter(|entry| host.is_empty() || host == entry.host).map(of_host);
        Ok(wire::Entries { entries: own.chain(by_labels.into_iter().map(of_labels)).collect() })
    }

    pub(super) fn entry_add(&self, asked: &wire::EntryAdd) -> Result<wire::Done, AdminError> {
        let identity = &asked.identity;
        let id = self.workload(identity)?;
        let reach = BTreeSet::from([id.to_string()]);
        let labels = labels(&asked.labels)?;
        let parent = parent(&asked.host, &labels)?;
        let request = EntryRequest {
            parent,
            identity,
            selectors: &asked.selectors,
            ttl: asked.ttl_s.map(Duration::from_secs),
            jwt_ttl: asked.jwt_ttl_s.map(Duration::from_secs),
            dns_names: &asked.dns_names,
            hint: &asked.hint,
            expires_in: asked.expires_in_s.map(|seconds| Duration::from_secs(seconds.min(LONGEST_S))),
        };
        let is_new = self.change(|records, told| {
            self.check_reach(records, &reach)?;
            Ok(match parent {
                Parent::Host(host) if !request.has_terms() => {
                    commands::add_entry_in(records, told, host, &id, self.now)?
                }
                _ => {
                    entries::put_entry_in(records, told, &self.state.trust_domain, &request, self.now)?;
                    true
                }
            })
        })?;
        let what = if is_new { "may now hold" } else { "already may hold" };
        let only = asked.selectors.join(" ");
        let only = if only.is_empty() { only } else { format!(", {only} only") };
        let is_of_program = |text: &String| text.parse().is_ok_and(|one: ProcessSelector| one.is_of_program());
        let follows = asked.selectors.iter().any(is_of_program).then(|| {
            "hosts see programs only with [workload_api] path_selectors = true and CAP_SYS_PTRACE; on others nobody has the \
             identity"
                .to_owned()
        });
        Ok(done(format!("{} {what} {identity}{only}", whom(parent)), follows.into_iter().collect()))
    }

    pub(super) fn entry_remove(&self, asked: &wire::EntryRemove) -> Result<wire::Done, AdminError> {
        let identity = &asked.identity;
        let id = self.workload(identity)?;
        let reach = BTreeSet::from([id.to_string()]);
        let labels = labels(&asked.labels)?;
        let parent = parent(&asked.host, &labels)?;
        self.change(|records, told| {
            self.check_reach(records, &reach)?;
            match parent {
                Parent::Host(host) => commands::remove_entry_in(records, told, host, &id)?,
                Parent::Labels(labels) => entries::remove_label_entry_in(records, told, labels, &id)?,
            }
            Ok(())
        })?;
        let whom = whom(parent);
        let what = format!("{whom} gets no new certificate for {identity} by this entry; the last one ends by itself");
        Ok(done(what, Vec::new()))
    }

    fn workload(&self, text: &str) -> Result<SpiffeId, AdminError> {
        Ok(workload(&self.state.trust_domain, text)?)
    }
}

/// A host that comes by a token for several may choose its name: entries may be there for it already.
fn waiting_for(view: &mut dyn View, prefix: &str) -> Result<Vec<String>, DbError> {
    let is_of_prefix = |host: &str| host.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('-'));
    let entries = hosts::entries(view)?.into_iter().filter(|entry| is_of_prefix(&entry.host));
    Ok(entries.map(|entry| entry.spiffe_id).collect())
}

fn labels(texts: &[String]) -> Result<Vec<Label>, AdminError> {
    let read = texts.iter().map(|text| text.parse().map_err(CommandError::Label));
    Ok(read.collect::<Result<_, _>>()?)
}

fn networks(texts: &[String]) -> Result<Vec<IpNet>, AdminError> {
    let read = |text: &String| {
        let bad = |_| AdminError::Invalid(format!("`{}` is no network; write it as 10.1.0.0/16", excerpt(text)));
        text.parse().map_err(bad)
    };
    texts.iter().map(read).collect()
}

fn parent<'a>(host: &'a str, labels: &'a [Label]) -> Result<Parent<'a>, AdminError> {
    match (host, labels) {
        ("", []) => Err(AdminError::Invalid("an entry is for a host or for labels; name one".to_owned())),
        ("", labels) => Ok(Parent::Labels(labels)),
        (host, []) => Ok(Parent::Host(host)),
        _ => Err(AdminError::Invalid("an entry is for a host or for labels, not both; name one".to_owned())),
    }
}

fn whom(parent: Parent<'_>) -> String {
    match parent {
        Parent::Host(host) => format!("host {host}"),
        Parent::Labels(labels) => {
            format!("hosts with {}", labels.iter().map(Label::to_string).collect::<Vec<_>>().join(","))
        }
    }
}

fn of_host(entry: Entry) -> wire::Entry {
    let Entry { host, spiffe_id, terms, .. } = entry;
    wire::Entry { host, ..on_wire(spiffe_id, &BTreeMap::new(), terms) }
}

fn of_labels(entry: LabelEntry) -> wire::Entry {
    on_wire(entry.spiffe_id, &entry.labels, entry.terms)
}

fn on_wire(identity: String, labels: &BTreeMap<String, String>, terms: grants::Terms) -> wire::Entry {
    let grants::Terms { selectors, ttl_s, jwt_ttl_s, dns_names, hint, expires_at } = terms;
    let (host, labels, expires) = (String::new(), texts(labels), expires_at.map(rfc3339));
    wire::Entry { host, identity, labels, selectors, ttl_s, jwt_ttl_s, dns_names, hint, expires }
}
