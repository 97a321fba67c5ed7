//! `meshd-pki authority`

use clap::{Args, Subcommand};
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::{
    AuthorityActivate, AuthorityList, AuthorityPrepare, AuthorityRemove, AuthorityRotate, AuthorityTaint,
};

use super::place::Place;

#[derive(Subcommand)]
pub(crate) enum Authority {
    /// Show every root and intermediate, and what the next step of each waits for.
    List(#[command(flatten)] Place),
    /// Make a new root now instead of when the calendar wants it. It signs nothing until everybody has it.
    Prepare(#[command(flatten)] Place),
    /// Let the prepared root sign, if nothing stands against it. It does so by itself then, too.
    Activate(#[command(flatten)] Place),
    /// Take an old root out of the bundle, if nothing stands against it. It leaves by itself then, too.
    Remove(One),
    /// The key may be known to others: put another in its place, have everybody move, then remove it.
    Taint(One),
    /// Emergency: a new root that signs as soon as every live host has it.
    Rotate(Rotate),
}

#[derive(Args)]
pub(crate) struct One {
    /// As `authority list` shows it.
    id: String,
    #[command(flatten)]
    place: Place,
}

#[derive(Args)]
pub(crate) struct Rotate {
    /// Skip the calendar and the waits; wait for acknowledgements of the hosts only.
    #[arg(long, required = true)]
    now: bool,
    /// Do not wait for hosts that lack the new root: they are cut off until they fetch it.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    place: Place,
}

impl Authority {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Authority::List(place) => place.run(Command::AuthorityList(AuthorityList {})),
            Authority::Prepare(place) => place.run(Command::AuthorityPrepare(AuthorityPrepare {})),
            Authority::Activate(place) => place.run(Command::AuthorityActivate(AuthorityActivate {})),
            Authority::Remove(one) => one.place.run(Command::AuthorityRemove(AuthorityRemove { id: one.id })),
            Authority::Taint(one) => one.place.run(Command::AuthorityTaint(AuthorityTaint { id: one.id })),
            Authority::Rotate(rotate) => {
                let command = AuthorityRotate { force: rotate.force };
                rotate.place.run(Command::AuthorityRotate(command))
            }
        }
    }
}
