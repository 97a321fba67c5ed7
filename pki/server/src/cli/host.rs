//! `meshd-pki host`

use anyhow::bail;
use clap::{Args, Subcommand};
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{HostBan, HostBlastRadius, HostEvict, HostList, HostShow, HostUnban, Hosts};

use super::place::Place;

#[derive(Subcommand)]
pub(crate) enum Host {
    /// Show all hosts.
    List(#[command(flatten)] Place),
    /// Show one host with its valid certificates.
    Show(One),
    /// Shut a host out until the ban is lifted: it gets nothing, and what it has is refused.
    Ban(Shut),
    /// Lift a ban.
    Unban(One),
    /// Make a host join again with a new token. What it has is good until it ends.
    Evict(Shut),
    /// Show what root on a host could pretend to be.
    BlastRadius(One),
}

#[derive(Args)]
pub(crate) struct One {
    host: String,
    #[command(flatten)]
    place: Place,
}

#[derive(Args)]
pub(crate) struct Shut {
    host: String,
    /// Why; for the audit log.
    #[arg(long, default_value = "")]
    reason: String,
    #[command(flatten)]
    place: Place,
}

impl Host {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Host::List(place) => list(&place),
            Host::Show(One { host, place }) => place.run(Command::HostShow(HostShow { host })),
            Host::Ban(Shut { host, reason, place }) => place.run(Command::HostBan(HostBan { host, reason })),
            Host::Unban(One { host, place }) => place.run(Command::HostUnban(HostUnban { host })),
            Host::Evict(Shut { host, reason, place }) => place.run(Command::HostEvict(HostEvict { host, reason })),
            Host::BlastRadius(One { host, place }) => place.run(Command::HostBlastRadius(HostBlastRadius { host })),
        }
    }
}

/// All of them, however many replies that takes.
fn list(place: &Place) -> anyhow::Result<()> {
    let (mut all, mut after) = (Hosts::default(), String::new());
    loop {
        let reply = place.ask(Command::HostList(HostList { after }))?;
        let Reply::Hosts(Hosts { hosts, next }) = reply else { bail!("the PKI answered something else than hosts") };
        all.hosts.extend(hosts);
        match next {
            Some(next) => after = next,
            None => return place.show(&Reply::Hosts(all)),
        }
    }
}
