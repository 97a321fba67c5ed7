//! Who may do what through the Admin API.

use std::collections::BTreeSet;

use meshd_pki_api::admin as wire;
use meshd_pki_api::admin::command::Command;

use super::{AdminError, Desk, done};
use crate::audit::Event;
use crate::commands::workload;
use crate::store::roles::{self, Role};
use crate::store::{View, grants, tokens};
use crate::times::unix;

/// The least role that may do this.
pub(super) fn needed(command: &Command) -> Role {
    match command {
        Command::AuthorityList(_)
        | Command::HostList(_)
        | Command::HostShow(_)
        | Command::HostBlastRadius(_)
        | Command::DenyList(_)
        | Command::RecoveryShow(_)
        | Command::RecoveryRequest(_)
        | Command::RoleList(_)
        | Command::EntryList(_) => Role::Read,
        Command::TokenCreate(_) | Command::EntryAdd(_) | Command::EntryRemove(_) | Command::HostEvict(_) => {
            Role::Operate
        }
        Command::AuthorityPrepare(_)
        | Command::AuthorityActivate(_)
        | Command::AuthorityRemove(_)
        | Command::AuthorityTaint(_)
        | Command::AuthorityRotate(_)
        | Command::HostBan(_)
        | Command::HostUnban(_)
        | Command::DenyAdd(_)
        | Command::DenyRemove(_)
        | Command::RecoveryImport(_)
        | Command::RoleGrant(_)
        | Command::RoleRevoke(_) => Role::Admin,
    }
}

impl Desk<'_> {
    pub(super) fn check_role(&self, command: &Command) -> Result<(), AdminError> {
        let (has, needs) = (self.actor.role, needed(command));
        if has >= needs {
            return Ok(());
        }
        let (who, has, needs) = (&self.actor.name, has.name(), needs.name());
        Err(AdminError::Forbidden(format!(
            "{who} has the role `{has}`; this needs `{needs}`, see `meshd-pki role grant`"
        )))
    }

    /// Whoever decides who holds an identity holds its role: nobody may hand out more than they have.
    pub(super) fn check_reach(&self, view: &mut dyn View, identities: &BTreeSet<String>) -> Result<(), AdminError> {
        for (identity, role) in roles::all(view)?.into_iter().filter(|(_, role)| *role > self.actor.role) {
            if identities.contains(&identity) {
                let (who, has, role) = (&self.actor.name, self.actor.role.name(), role.name());
                let why = format!(
                    "{identity} has the role `{role}` on this PKI; {who}, who has `{has}`, may not decide which host \
                     holds it"
                );
                return Err(AdminError::Forbidden(why));
            }
        }
        Ok(())
    }

    pub(super) fn role_list(&self) -> Result<wire::Roles, AdminError> {
        let all = self.state.database.read(roles::all)?.into_iter();
        let granted = all.map(|(identity, role)| wire::RoleGranted { identity, role: role.name().to_owned() });
        Ok(wire::Roles { roles: granted.collect() })
    }

    pub(super) fn role_grant(&self, asked: &wire::RoleGrant) -> Result<wire::Done, AdminError> {
        let id = workload(&self.state.trust_domain, &asked.identity)?;
        let role = Role::parse(&asked.role).ok_or_else(|| {
            AdminError::Invalid(format!(
                "`{}` is no role; give read, operate or admin",
                crate::enrol::excerpt(&asked.role)
            ))
        })?;
        let (holders, narrowed) = self.change(|records, told| {
            roles::grant(records, id.as_str(), role)?;
            // Whoever made such a token may have no role that lets them decide who has this one.
            let narrowed = tokens::take_out(records, id.as_str(), unix(self.now))?;
            told.push(role_event("role_grant", id.as_str(), role.name()));
            let mut holders = Vec::from_iter(grants::holders(records, id.as_str())?);
            let by_labels = grants::label_entries(records)?.into_iter().filter(|entry| entry.spiffe_id == id.as_str());
            holders.extend(by_labels.map(|entry| format!("all to come with {}", grants::labels_text(&entry.labels))));
            Ok((holders, narrowed))
        })?;
        let holders = if holders.is_empty() { "none yet".to_owned() } else { holders.join(", ") };
        let follows = format!("root on each host that may hold it has that role: {holders}");
        let mut follows = vec![follows];
        if !narrowed.is_empty() {
            let narrowed = narrowed.join(", ");
            follows.push(format!("open join tokens that would have given it to a host do not any more: {narrowed}"));
        }
        Ok(done(format!("{id} has the role {}", role.name()), follows))
    }

    pub(super) fn role_revoke(&self, identity: &str) -> Result<wire::Done, AdminError> {
        let id = workload(&self.state.trust_domain, identity)?;
        self.change(|records, told| {
            if !roles::revoke(records, id.as_str())? {
                return Err(AdminError::NotFound(format!("{id} has no role; see `meshd-pki role list`")));
            }
            told.push(role_event("role_revoke", id.as_str(), ""));
            Ok(())
        })?;
        Ok(done(format!("{id} has no role any more"), Vec::new()))
    }
}

fn role_event(event: &'static str, identity: &str, role: &str) -> Event {
    let detail = Some(role.to_owned()).filter(|text| !text.is_empty());
    let identity = Some(identity.to_owned());
    Event { event, result: "ok", identity, detail, ..Event::default() }
}
