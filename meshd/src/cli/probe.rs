//! `meshd probe --as UNIT URL`: a name, as an enrolled unit sees it, with the time of each step and the reason of
//! a failure. The connection is made by a child process within the unit's cgroup, so meshd takes it for the unit.

mod inside;
mod names;
mod show;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use hyper::Uri;
use meshd::admin::{self, OutcomeAsked, ProbeOutcome, ProbeRequest, ProbeView};
use meshd::config::Config;
use meshd::enrol::{Selector, find_cgroups};
use meshd::fault::Fault;
use nix::unistd::{Uid, User};
use serde::Serialize;

use self::inside::{BIND, DEADLINE, Event, GO, read_event};
pub(crate) use self::inside::{ConnectArgs, connect};
use super::{Output, on_runtime};

/// The child ends within its own deadline, unless it does not run at all; starting and making a socket takes it
/// milliseconds.
const SILENCE: Duration = DEADLINE.saturating_add(Duration::from_secs(2));

#[derive(Args)]
pub(crate) struct ProbeArgs {
    /// The unit to be, like `checkout.service`, or `uid:1001`.
    #[arg(long = "as", value_name = "UNIT")]
    caller: Probed,
    /// `http://name[:port]/path` sends a GET; `tcp://name:port` connects and shows what is said first.
    url: Target,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Who makes the connection.
#[derive(Clone, Debug, PartialEq)]
enum Probed {
    Unit(String),
    Uid(u32),
}

impl FromStr for Probed {
    type Err = String;

    fn from_str(text: &str) -> Result<Probed, String> {
        match text.parse() {
            Ok(Selector::Unit(unit)) => Ok(Probed::Unit(unit.to_string())),
            Ok(Selector::Uid(uid)) => Ok(Probed::Uid(uid)),
            Ok(Selector::Port(_)) => Err("name the unit that listens there, or uid:<its user>".to_owned()),
            Ok(Selector::Scope(_)) => Err("name one unit that runs, not a pattern".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Where to connect, and what to say there.
#[derive(Clone, Debug, PartialEq)]
struct Target {
    url: String,
    host: String,
    port: u16,
    /// Some for HTTP.
    path: Option<String>,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(url: &str) -> Result<Target, String> {
        let uri: Uri = url.parse().map_err(|error| format!("{error}; write like http://payments.shop.mesh/"))?;
        let host = uri.host().ok_or("say where, like http://payments.shop.mesh/")?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let (port, path) = match uri.scheme_str() {
            Some("http") => {
                let path = uri.path_and_query().map_or("/", |path| path.as_str());
                (uri.port_u16().unwrap_or(80), Some(path.to_owned()))
            }
            Some("tcp") => (uri.port_u16().ok_or("say the port, too, like tcp://smtp.shop.mesh:25")?, None),
            _ => return Err("http:// or tcp:// only; for TLS of the application itself use tcp://".to_owned()),
        };
        Ok(Target { url: url.to_owned(), host, port, path })
    }
}

/// All that is told, as a page or as JSON.
#[derive(Debug, Serialize)]
struct Report {
    url: String,
    caller: String,
    resolved: Resolved,
    known: ProbeView,
    events: Vec<Event>,
    outcome: Option<ProbeOutcome>,
    /// `ok`, or a name of the error list, or `failed` where meshd had no part in it.
    result: String,
}

/// What the name stands for.
#[derive(Clone, Debug, Serialize)]
struct Resolved {
    address: IpAddr,
    us: u64,
    /// What the host's resolver says, where that is something else.
    system: Option<Vec<IpAddr>>,
}

pub(crate) fn probe(config: &Config, args: &ProbeArgs) -> Result<ExitCode> {
    let Some(resolved) = resolve(config, &args.url.host)? else {
        let Target { host, .. } = &args.url;
        eprintln!(
            "meshd: {}: meshd's DNS at {} knows no {host}; `meshd status` lists the names it knows",
            Fault::NoService,
            config.dns.listen
        );
        return Ok(ExitCode::from(Fault::NoService.exit_code()));
    };
    let address = SocketAddr::new(resolved.address, args.url.port);
    let report = make(config, args, resolved, address)?;
    match args.output {
        Output::Table => print!("{}", show::page(&report)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(match (report.result.as_str(), Fault::from_label(&report.result)) {
        ("ok", _) => ExitCode::SUCCESS,
        (_, Some(fault)) => ExitCode::from(fault.exit_code()),
        (_, None) => ExitCode::FAILURE,
    })
}

fn resolve(config: &Config, host: &str) -> Result<Option<Resolved>> {
    if let Ok(address) = host.parse() {
        return Ok(Some(Resolved { address, us: 0, system: None }));
    }
    on_runtime(async {
        let start = Instant::now();
        let server = config.dns.listen;
        let found = names::ask_meshd(server, host).await;
        let found = found.with_context(|| format!("asking meshd's DNS at {server} for {host}; does meshd run?"))?;
        let us = start.elapsed().as_micros() as u64;
        let Some(address) = found else { return Ok(None) };
        let system = names::ask_system(host).await;
        let system = (!system.contains(&address)).then_some(system);
        Ok(Some(Resolved { address, us, system }))
    })
}

fn make(config: &Config, args: &ProbeArgs, resolved: Resolved, address: SocketAddr) -> Result<Report> {
    let mut inside = Inside::start(&args.caller, &args.url, address)?;
    let source_port = inside.bind()?;
    let (unit, uid) = match &args.caller {
        Probed::Unit(unit) => (Some(unit.clone()), None),
        Probed::Uid(uid) => (None, Some(*uid)),
    };
    let request = ProbeRequest { unit: unit.clone(), uid, url: args.url.url.clone(), address, source_port };
    let known = order(config, "/probe", &request)?;
    let known: ProbeView = serde_json::from_slice(&known).context("the answer of meshd is broken")?;
    let events = inside.go()?;
    let outcome = order(config, "/probe/outcome", &OutcomeAsked { source_port });
    let outcome: Option<ProbeOutcome> = outcome.ok().and_then(|answer| serde_json::from_slice(&answer).ok());
    let caller = unit.unwrap_or_else(|| format!("uid:{}", uid.unwrap_or_default()));
    let result = result(&events, outcome.as_ref());
    Ok(Report { url: args.url.url.clone(), caller, resolved, known, events, outcome, result })
}

fn order(config: &Config, what: &str, details: &impl Serialize) -> Result<hyper::body::Bytes> {
    on_runtime(async { Ok(admin::order(&config.admin_socket(), what, details).await?) })
}

/// What the connecting side got counts; the reason for what it did not get is meshd's to know.
fn result(events: &[Event], outcome: Option<&ProbeOutcome>) -> String {
    if !events.iter().any(|event| matches!(event, Event::Failed { .. } | Event::Closed)) {
        return "ok".to_owned();
    }
    match outcome {
        Some(outcome) if outcome.outcome != "ok" => outcome.outcome.clone(),
        _ if events.iter().any(|event| matches!(event, Event::Closed)) => "ok".to_owned(),
        _ => "failed".to_owned(),
    }
}

/// The process within the unit. Dropped, it is gone, and so is every trace of it there.
struct Inside {
    child: Child,
    stdin: ChildStdin,
    /// What it tells, as it tells it.
    told: Receiver<Result<Event>>,
    /// A cgroup of its own below the unit's, where the unit's takes no processes.
    leaf: Option<PathBuf>,
}

impl Inside {
    fn start(caller: &Probed, target: &Target, address: SocketAddr) -> Result<Inside> {
        let mut command = Command::new(std::env::current_exe().context("cannot find meshd itself")?);
        command.arg("probe-connect").arg(format!("--address={address}")).stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(path) = &target.path {
            command.arg(format!("--path={path}")).arg(format!("--host={}", host_header(target)));
        }
        if let Probed::Uid(uid) = caller {
            let user = User::from_uid(Uid::from_raw(*uid)).ok().flatten();
            command.uid(*uid).gid(user.map_or(*uid, |user| user.gid.as_raw()));
        }
        let mut child = command.spawn().context("cannot start the probing process; are you root?")?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("the probing process has no pipes");
        };
        let mut inside = Inside { child, stdin, told: listen(BufReader::new(stdout)), leaf: None };
        if let Probed::Unit(unit) = caller {
            inside.enter(unit)?;
        }
        Ok(inside)
    }

    /// Only the child goes there: this process stays where the operator started it.
    fn enter(&mut self, unit: &str) -> Result<()> {
        let cgroups = find_cgroups(&BTreeSet::from([unit]));
        let Some(cgroup) = cgroups.get(unit) else {
            bail!("{unit} does not run, so there is nothing to probe from; start it, or probe as uid:<its user>");
        };
        let directory = cgroup.directory();
        let pid = self.child.id().to_string();
        let Err(error) = std::fs::write(directory.join("cgroup.procs"), &pid) else { return Ok(()) };
        if error.raw_os_error() != Some(nix::libc::EBUSY) {
            return Err(error).with_context(|| format!("cannot enter {}; are you root?", directory.display()));
        }
        // A delegated subtree: processes live in its leaves only, so this one gets a leaf, too.
        let leaf = directory.join(format!("meshd-probe-{pid}"));
        std::fs::create_dir(&leaf).with_context(|| format!("cannot make {}", leaf.display()))?;
        self.leaf = Some(leaf.clone());
        std::fs::write(leaf.join("cgroup.procs"), &pid).with_context(|| format!("cannot enter {}", leaf.display()))
    }

    fn bind(&mut self) -> Result<u16> {
        self.say(BIND)?;
        match self.hear()? {
            Some(Event::Bound { port }) => Ok(port),
            other => bail!("the probing process could not make a socket: {other:?}"),
        }
    }

    fn go(&mut self) -> Result<Vec<Event>> {
        self.say(GO)?;
        let mut events = Vec::new();
        while let Some(event) = self.hear()? {
            events.push(event);
        }
        Ok(events)
    }

    /// None: it has ended.
    fn hear(&self) -> Result<Option<Event>> {
        match self.told.recv_timeout(SILENCE) {
            Ok(event) => event.map(Some),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => bail!(
                "the probing process has said nothing for {} s: it does not get to run there; is the unit frozen \
                 (`systemctl thaw UNIT`), or without CPU time (`systemctl show -p CPUQuotaPerSecUSec UNIT`)?",
                SILENCE.as_secs()
            ),
        }
    }

    fn say(&mut self, line: &str) -> Result<()> {
        writeln!(self.stdin, "{line}").context("the probing process has ended; was the unit stopped?")
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // Fails only for one that has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(leaf) = &self.leaf {
            let _ = std::fs::remove_dir(leaf);
        }
    }
}

/// On a thread of its own, as a pipe cannot be read with a deadline. It ends with the child.
fn listen(mut lines: impl BufRead + Send + 'static) -> Receiver<Result<Event>> {
    let (tell, told) = channel();
    std::thread::spawn(move || {
        while let Some(event) = read_event(&mut lines).transpose() {
            if tell.send(event).is_err() {
                return;
            }
        }
    });
    told
}

fn host_header(target: &Target) -> String {
    let host = if target.host.contains(':') { format!("[{}]", target.host) } else { target.host.clone() };
    if target.port == 80 { host } else { format!("{host}:{}", target.port) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_where_and_what_to_do_there() {
        let target: Target = "http://payments.shop.mesh/orders?id=7".parse().unwrap();
        assert_eq!((target.host.as_str(), target.port), ("payments.shop.mesh", 80));
        assert_eq!(target.path.as_deref(), Some("/orders?id=7"));
        let target: Target = "tcp://[fd00::1]:25".parse().unwrap();
        assert_eq!((target.host.as_str(), target.port, &target.path), ("fd00::1", 25, &None));
        assert_eq!(host_header(&"http://[fd00::1]:81/".parse().unwrap()), "[fd00::1]:81");
        for wrong in ["https://payments.shop.mesh/", "tcp://smtp.shop.mesh", "payments.shop.mesh", "http://"] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn one_is_a_unit_or_a_uid() {
        assert_eq!("uid:1001".parse(), Ok(Probed::Uid(1001)));
        assert_eq!("web.service".parse(), Ok(Probed::Unit("web.service".into())));
        for wrong in ["web", "uid:web", "docker-*.scope"] {
            assert!(wrong.parse::<Probed>().is_err(), "{wrong}");
        }
        assert!("port:5432".parse::<Probed>().unwrap_err().contains("listens there"));
    }

    #[test]
    fn what_the_unit_got_counts_and_what_it_did_not_get_is_explained_by_meshd() {
        let outcome = |label: &str| ProbeOutcome {
            outcome: label.to_owned(),
            unit: None,
            client_id: None,
            server_id: None,
            service: None,
            endpoint: None,
            bytes_sent: 0,
            bytes_received: 0,
        };
        let failed = [Event::Connected { us: 1 }, Event::Failed { step: "answer".into(), error: "reset".into() }];
        assert_eq!(result(&failed, Some(&outcome("denied"))), "denied");
        assert_eq!(result(&failed, None), "failed");
        assert_eq!(result(&[Event::Silent], Some(&outcome("app_reset"))), "ok");
        assert_eq!(result(&[Event::Closed], Some(&outcome("peer_reset"))), "peer_reset");
        assert_eq!(result(&[Event::Closed], Some(&outcome("ok"))), "ok");
    }
}
