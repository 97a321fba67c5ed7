//! `meshd enrol` and `unenrol`: who is under the mesh. They write `90-cli.toml`, and the daemon reads it at once.

mod args;

use std::fmt;
use std::io::ErrorKind;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use meshd::admin::{self, AdminError, StatusView};
use meshd::config::Config;
use meshd::enrol::{self, CliFile, Enrolment, Mode, Ownership, PortMemory, PortOwners, Selector};
use meshd_identity::{SpiffeId, TrustDomain};
use serde::Serialize;

pub(crate) use self::args::{EnrolArgs, UnenrolArgs};
use self::args::{entry, selector};
use super::{Output, on_runtime, trust_domain};

/// How long the PKI's answer for a new identity is waited for.
const CERTIFICATE: Duration = Duration::from_secs(5);
/// Exit code when it is enrolled, but the PKI refuses the identity.
const REFUSED_BY_PKI: u8 = 3;
const TICK: Duration = Duration::from_millis(50);

/// What the files of this host say, and how to judge a change of them.
struct Files<'a> {
    config: &'a Config,
    trust_domain: TrustDomain,
}

impl Files<'_> {
    fn of(config: &Config) -> anyhow::Result<Files<'_>> {
        Ok(Files { config, trust_domain: trust_domain(config)? })
    }

    fn now(&self) -> anyhow::Result<Enrolment> {
        Ok(enrol::load(&self.config.enrol_dir, &self.trust_domain, &self.config.reserved())?)
    }

    /// What the files would say with this one in place.
    fn as_if(&self, file: &CliFile) -> anyhow::Result<Enrolment> {
        let Files { config, trust_domain } = self;
        enrol::load_as_if(&config.enrol_dir, (file.path(), &file.text()), trust_domain, &config.reserved())
            .context("nothing was changed")
    }

    /// Replaces the file by what it shall say; the daemon's word decides whether it stays.
    fn change(&self, file: &CliFile) -> anyhow::Result<(Enrolment, Reloaded)> {
        let then = self.as_if(file)?;
        file.write()?;
        let socket = self.config.admin_socket();
        match on_runtime(async { Ok(admin::order(&socket, "/reload", &()).await) })? {
            Ok(_) => Ok((then, Reloaded::Now)),
            Err(AdminError::Connect { source, .. })
                if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
            {
                Ok((then, Reloaded::AtStart))
            }
            Err(error @ AdminError::Silent { .. }) => {
                bail!("the file is written, but whether it is in force is not known (`meshd status`): {error}")
            }
            Err(error) => {
                file.restore()?;
                bail!("the daemon refused, nothing was changed: {error}");
            }
        }
    }
}

/// When a change takes effect.
#[derive(PartialEq)]
enum Reloaded {
    Now,
    AtStart,
}

pub(crate) fn enrol(config: &Config, args: &EnrolArgs) -> anyhow::Result<ExitCode> {
    let files = Files::of(config)?;
    let Some(identity) = &args.identity else { return list(&files, args.output) };
    let selector = selector(args.who.unit.as_deref(), args.who.uid, args.who.port)?;
    let identity = SpiffeId::parse_in(&files.trust_domain, identity)
        .with_context(|| format!("--as {identity}: write it like ns/shop/sa/checkout"))?;
    let mut file = CliFile::open(&config.enrol_dir)?;
    file.enrol(&files.now()?, &selector, entry(&selector, &identity, args))?;
    let owners = port_owners(&files, &file, &selector)?;
    let (enrolment, reloaded) = files.change(&file)?;
    // Nobody needs to wait for us while we wait for the PKI.
    drop(file);
    println!("{selector} is {identity}");
    tell_owner(&owners, &selector);
    for delivery in enrolment.deliveries().iter().filter(|delivery| delivery.owner.selector == selector) {
        let mode = if delivery.mode == Mode::Strict { ", strict: plaintext callers are refused" } else { "" };
        println!("serves {}:{} from {}{mode}", delivery.service, delivery.port, delivery.deliver);
    }
    let permitted = match reloaded {
        Reloaded::AtStart => {
            println!("no meshd runs on this host: it takes effect when one is started");
            true
        }
        Reloaded::Now => tell_certificate(config, &identity)?,
    };
    tell_names(&selector);
    Ok(if permitted { ExitCode::SUCCESS } else { ExitCode::from(REFUSED_BY_PKI) })
}

pub(crate) fn unenrol(config: &Config, args: &UnenrolArgs) -> anyhow::Result<ExitCode> {
    let files = Files::of(config)?;
    let selector = selector(args.unit.as_deref(), args.uid, args.port)?;
    let mut file = CliFile::open(&config.enrol_dir)?;
    file.unenrol(&files.now()?, &selector)?;
    let (enrolment, reloaded) = files.change(&file)?;
    match reloaded {
        Reloaded::Now => {
            println!("{selector} is not enrolled any more: new connections to the mesh are refused, open ones go on");
        }
        Reloaded::AtStart => println!("{selector} is not enrolled any more; no meshd runs on this host"),
    }
    if let Selector::Unit(unit) = &selector
        && let Some(workload) = enrolment.workload_of_unit(unit)
    {
        println!("it is {} now, by {} ({})", workload.identity, workload.selector, workload.origin);
    }
    Ok(ExitCode::SUCCESS)
}

/// Who holds the port, before it is written down: a conflict is the operator's to solve first.
fn port_owners(files: &Files<'_>, file: &CliFile, selector: &Selector) -> anyhow::Result<PortOwners> {
    let Selector::Port(port) = selector else { return Ok(PortOwners::default()) };
    let memory = PortMemory::new(&files.config.state_dir);
    let owners = PortOwners::look(&files.as_if(file)?, &memory).context("cannot see who listens")?;
    if owners.of(*port).is_conflict() {
        bail!("port {port}: {}; nothing was changed", owners.of(*port));
    }
    Ok(owners)
}

fn tell_owner(owners: &PortOwners, selector: &Selector) {
    let Selector::Port(port) = selector else { return };
    match owners.of(*port) {
        Ownership::Owned(owner) => println!("{owner} listens on {port}: its outbound connections are that workload's"),
        unknown => println!("{unknown}; until then what it serves works, what it calls is refused"),
    }
}

/// Waits a little for what the PKI says; false when it refuses.
fn tell_certificate(config: &Config, identity: &SpiffeId) -> anyhow::Result<bool> {
    let answer =
        on_runtime(async { tokio::time::timeout(CERTIFICATE, pki_answer(config, identity)).await.ok().transpose() })?;
    match answer {
        Some(PkiAnswer::Issued) => {
            println!("the PKI has permitted it: certificate in place, the next connection has it");
        }
        Some(PkiAnswer::Refused(reason)) => {
            println!("the PKI refuses it: {reason}");
            println!("meshd asks again within a minute; until then its connections are refused");
            return Ok(false);
        }
        None => println!("the PKI has not answered yet: until it does its connections are refused (see meshd check)"),
    }
    Ok(true)
}

enum PkiAnswer {
    Issued,
    Refused(String),
}

async fn pki_answer(config: &Config, identity: &SpiffeId) -> anyhow::Result<PkiAnswer> {
    loop {
        let status: StatusView = admin::fetch(&config.admin_socket(), "/status").await?;
        if let Some(withheld) = status.withheld.into_iter().find(|one| one.identity == identity.as_str()) {
            return Ok(PkiAnswer::Refused(withheld.why));
        }
        if status.identities.iter().any(|held| held.id == identity.as_str()) {
            return Ok(PkiAnswer::Issued);
        }
        tokio::time::sleep(TICK).await;
    }
}

/// A process reads where to ask for names when it starts.
fn tell_names(selector: &Selector) {
    if let Selector::Unit(unit) = selector {
        println!("if names of the mesh do not resolve in {unit}, restart it: resolvers are read at the start");
    }
}

/// A row of `meshd enrol --list`.
#[derive(Serialize)]
struct Row {
    selector: String,
    identity: String,
    serves: Vec<String>,
    origin: String,
}

fn list(files: &Files<'_>, output: Output) -> anyhow::Result<ExitCode> {
    let enrolment = files.now()?;
    let rows = enrolment.workloads().iter().map(|workload| {
        let served = enrolment.deliveries().iter().filter(|delivery| delivery.owner == *workload);
        Row {
            selector: workload.selector.to_string(),
            identity: workload.identity.to_string(),
            serves: served
                .map(|delivery| format!("{}:{}={}", delivery.service, delivery.port, delivery.deliver))
                .collect(),
            origin: workload.origin.to_string(),
        }
    });
    let rows: Vec<Row> = rows.collect();
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&rows)?),
        Output::Table => rows.iter().for_each(|row| println!("{row}")),
    }
    Ok(ExitCode::SUCCESS)
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}  {}  {}", self.selector, self.identity, self.origin)?;
        self.serves.iter().try_for_each(|served| write!(f, "\n    serves {served}"))
    }
}
