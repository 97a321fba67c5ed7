//! `meshd-pki recovery`

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::{Args, Subcommand};
use meshd_identity::TrustDomain;
use meshd_pki::adoption::{self, Adopted};
use meshd_pki::recovery::{Request, SignedStatement, succeed, vouch};
use meshd_pki::times::parse_duration;
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::{RecoveryImport, RecoveryRequest, RecoveryShow};

use super::place::Place;

#[derive(Subcommand)]
pub(crate) enum Recovery {
    /// Show which recovery keys hosts pin, and what their holders have said.
    Show(#[command(flatten)] Place),
    /// Offline: name the recovery key that comes after this one. Prints what `recovery import` takes.
    Succeed(Succeed),
    /// Print what the holder of the recovery key needs to vouch for this PKI.
    Request(#[command(flatten)] Place),
    /// Offline: have hosts trust another PKI from now on. Prints what `recovery import` takes.
    SignBundle(SignBundle),
    /// Take over a statement, and serve it to hosts.
    Import(Import),
    /// Let hosts of a PKI that was lost come back to this one, by the list of them that it kept (hosts.json).
    Adopt(Adopt),
}

#[derive(Args)]
pub(crate) struct Succeed {
    /// The recovery key that hosts pin now.
    #[arg(long)]
    key: PathBuf,
    /// The next one; made if there is no such file.
    #[arg(long)]
    next_key: PathBuf,
    #[arg(long)]
    trust_domain: TrustDomain,
}

#[derive(Args)]
pub(crate) struct SignBundle {
    /// The recovery key that hosts pin now: that of the PKI that was lost.
    #[arg(long)]
    key: PathBuf,
    /// What `recovery request` of the new PKI printed; `-` reads standard input.
    #[arg(long)]
    request: PathBuf,
}

#[derive(Args)]
pub(crate) struct Import {
    /// What `recovery succeed` or `recovery sign-bundle` printed; `-` reads standard input.
    statement: PathBuf,
    #[command(flatten)]
    place: Place,
}

#[derive(Args)]
pub(crate) struct Adopt {
    /// hosts.json of the lost PKI. Who can change it decides who comes back: be sure whose copy it is.
    list: PathBuf,
    #[arg(long)]
    state: PathBuf,
    /// How long they may come back by it.
    #[arg(long = "for", default_value = "7d", value_parser = parse_duration)]
    within: Duration,
    /// The keys of the lost PKI may be in other hands: believe nothing that it signed. Connections between hosts that
    /// have come back and hosts that have not fail meanwhile.
    #[arg(long)]
    without_roots: bool,
}

impl Adopt {
    fn run(&self) -> anyhow::Result<()> {
        let asked = adoption::Adopt { roster: &self.list, within: self.within, without_roots: self.without_roots };
        let adopted = adoption::adopt(&self.state, &asked, SystemTime::now())?;
        print!("{}", said(&adopted, self.without_roots));
        Ok(())
    }
}

fn said(adopted: &Adopted, without_roots: bool) -> String {
    let Adopted { hosts, known, shut_out, entries, until, list } = adopted;
    let mut lines = vec![
        format!("{hosts} hosts and {entries} entries from a list with sha256 {}", list.sha256),
        format!("its bundle is of {}; {} hosts are banned, {} evicted", list.bundle_of, list.banned, list.evicted),
    ];
    if list.is_old {
        let why = "roots are replaced more often than that: if there is a later copy, adopt that one, too";
        lines.push(format!("the list is old, {why}; who was shut out since is not in it"));
    }
    lines.extend(list.roots.iter().map(|root| format!("hosts believe the root with sha256 {root}")));
    if *known > 0 {
        lines.push(format!("{known} hosts were known here already; they stay as they are"));
    }
    if !shut_out.is_empty() {
        lines.push(format!("shut out, as the list has it: {}", shut_out.join(", ")));
    }
    if without_roots && list.has_denied {
        let why = "nobody can verify the deny set of the lost PKI: deny anew whom it denied";
        lines.push(format!("{why} (its audit.jsonl, if there is a copy)"));
    }
    let statement =
        "a statement of the recovery key tells them to: `meshd-pki recovery request`, `sign-bundle`, `import`";
    lines.push(match list.is_ours {
        true => format!("They may come back until {until}"),
        false => format!("They may come back until {until}, once {statement}"),
    });
    lines.into_iter().map(|line| line + "\n").collect()
}

impl Recovery {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Recovery::Show(place) => place.run(Command::RecoveryShow(RecoveryShow {})),
            Recovery::Request(place) => place.run(Command::RecoveryRequest(RecoveryRequest {})),
            Recovery::Succeed(asked) => {
                print(&succeed(&asked.key, &asked.next_key, &asked.trust_domain, SystemTime::now())?)
            }
            Recovery::SignBundle(asked) => {
                let request: Request = read(&asked.request)?;
                print(&vouch(&asked.key, &request, SystemTime::now())?)
            }
            Recovery::Adopt(asked) => asked.run(),
            Recovery::Import(asked) => {
                let SignedStatement { statement, signed_by } = read(&asked.statement)?;
                asked.place.run(Command::RecoveryImport(RecoveryImport { statement, signed_by }))
            }
        }
    }
}

fn print(statement: &SignedStatement) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(statement)?);
    Ok(())
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).context("standard input")?;
    } else {
        text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    }
    serde_json::from_str(&text).with_context(|| format!("{}: not what `meshd-pki recovery` prints", path.display()))
}
