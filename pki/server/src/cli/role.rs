//! `meshd-pki role`

use clap::{Args, Subcommand, ValueEnum};
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::{RoleGrant, RoleList, RoleRevoke};

use super::place::Place;

#[derive(Subcommand)]
pub(crate) enum Role {
    /// Show which identities may use this PKI's Admin API.
    List(#[command(flatten)] Place),
    /// Let an identity use it.
    Grant(Grant),
    /// Take that away.
    Revoke(Revoke),
}

#[derive(Clone, Copy, ValueEnum)]
enum Name {
    /// See everything.
    Read,
    /// That, and tokens, entries, evicting hosts.
    Operate,
    /// Everything.
    Admin,
}

#[derive(Args)]
pub(crate) struct Grant {
    /// ns/<namespace>/sa/<name>
    identity: String,
    role: Name,
    #[command(flatten)]
    place: Place,
}

#[derive(Args)]
pub(crate) struct Revoke {
    /// ns/<namespace>/sa/<name>
    identity: String,
    #[command(flatten)]
    place: Place,
}

impl Role {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Role::List(place) => place.run(Command::RoleList(RoleList {})),
            Role::Grant(Grant { identity, role, place }) => {
                let role = match role {
                    Name::Read => "read",
                    Name::Operate => "operate",
                    Name::Admin => "admin",
                };
                place.run(Command::RoleGrant(RoleGrant { identity, role: role.to_owned() }))
            }
            Role::Revoke(Revoke { identity, place }) => place.run(Command::RoleRevoke(RoleRevoke { identity })),
        }
    }
}
