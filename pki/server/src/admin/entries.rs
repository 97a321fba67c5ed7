//! Join tokens, and which host may hold which identity.

use std::time::Duration;

use meshd_pki_api::admin as wire;

use super::{AdminError, Desk, done};
use crate::commands::{self, TokenRequest, workload};

impl Desk<'_> {
    pub(super) fn token_create(&self, asked: &wire::TokenCreate) -> Result<wire::Token, AdminError> {
        let allowed = asked.allow.iter().map(|text| self.spiffe_id(text)).collect::<Result<Vec<_>, _>>()?;
        self.state.database.read(|view| self.check_reach(view, &asked.host, &allowed))?;
        let ttl = Duration::from_secs(asked.ttl_s);
        let request = TokenRequest { host: &asked.host, allow: &asked.allow, pki: &asked.pki, ttl };
        let token = commands::create_token_in(self.state, &request, self.now, self.by())?;
        Ok(wire::Token { token: token.to_string() })
    }

    pub(super) fn entry_list(&self, host: &str) -> Result<wire::Entries, AdminError> {
        let host = Some(host).filter(|host| !host.is_empty());
        let entries = commands::list_entries_in(self.state, host)?.into_iter();
        Ok(wire::Entries { entries: entries.map(|(host, identity)| wire::Entry { host, identity }).collect() })
    }

    pub(super) fn entry_add(&self, asked: &wire::EntryAdd) -> Result<wire::Done, AdminError> {
        let id = self.spiffe_id(&asked.identity)?;
        self.state.database.read(|view| self.check_reach(view, "", &[id]))?;
        let (host, identity) = (&asked.host, &asked.identity);
        let new = commands::add_entry_in(self.state, host, identity, self.now, self.by())?;
        let what = if new { "may now hold" } else { "already may hold" };
        Ok(done(format!("host {host} {what} {identity}"), Vec::new()))
    }

    pub(super) fn entry_remove(&self, asked: &wire::EntryRemove) -> Result<wire::Done, AdminError> {
        let (host, identity) = (&asked.host, &asked.identity);
        commands::remove_entry_in(self.state, host, identity, self.now, self.by())?;
        let what = format!("host {host} gets no new certificate for {identity}; the last one ends by itself");
        Ok(done(what, Vec::new()))
    }

    fn by(&self) -> Option<String> {
        Some(self.actor.name.clone())
    }

    fn spiffe_id(&self, text: &str) -> Result<String, AdminError> {
        Ok(workload(&self.state.trust_domain, text)?.to_string())
    }
}
