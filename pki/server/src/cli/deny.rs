//! `meshd-pki deny`

use clap::{Args, Subcommand};
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::{DenyAdd, DenyList, DenyRemove, DenyWhom, deny_whom};

use super::place::Place;

#[derive(Subcommand)]
pub(crate) enum Deny {
    /// Show the deny set.
    List(#[command(flatten)] Place),
    /// Refuse somebody although their certificates are still valid.
    Add(Add),
    /// Undo that.
    Remove(Remove),
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Whom {
    /// A SPIFFE ID, or ns/<namespace>/sa/<name>: every certificate of it, and the PKI issues it no more.
    #[arg(long)]
    identity: Option<String>,
    /// One certificate, by its serial in hexadecimal.
    #[arg(long)]
    serial: Option<String>,
    /// Every certificate that a host holds now. It may get others: `host ban` or `host evict` prevents that.
    #[arg(long)]
    host: Option<String>,
    /// Everything under an authority, by its id or the SHA-256 of its SubjectPublicKeyInfo.
    #[arg(long)]
    authority: Option<String>,
}

#[derive(Args)]
pub(crate) struct Add {
    #[command(flatten)]
    whom: Whom,
    /// Why; for the audit log.
    #[arg(long, default_value = "")]
    reason: String,
    #[command(flatten)]
    place: Place,
}

#[derive(Args)]
pub(crate) struct Remove {
    #[command(flatten)]
    whom: Whom,
    #[command(flatten)]
    place: Place,
}

impl Deny {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Deny::List(place) => place.run(Command::DenyList(DenyList {})),
            Deny::Add(Add { whom, reason, place }) => {
                place.run(Command::DenyAdd(DenyAdd { whom: Some(whom.on_wire()), reason }))
            }
            Deny::Remove(Remove { whom, place }) => {
                place.run(Command::DenyRemove(DenyRemove { whom: Some(whom.on_wire()) }))
            }
        }
    }
}

impl Whom {
    fn on_wire(self) -> DenyWhom {
        let identity = self.identity.map(deny_whom::Whom::Identity);
        let serial = self.serial.map(deny_whom::Whom::Serial);
        let host = self.host.map(deny_whom::Whom::Host);
        let authority = self.authority.map(deny_whom::Whom::Authority);
        DenyWhom { whom: identity.or(serial).or(host).or(authority) }
    }
}
