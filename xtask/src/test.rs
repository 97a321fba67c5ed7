//! `cargo xtask test`: format, clippy, unit and property tests, scenarios on namespace hosts and on systemd machines.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use meshd_tests::packages::Package;
use meshd_tests::{backend, machine, packages, python, root, servers};
use serde_json::Value;

use crate::built::{self, cargo_command};
use crate::lint::Lint;
use crate::summary::{Counts, LEFT_OUT, Outcome, RESULT, Summary};

/// The part that runs as root, after everything was built: which tier, and its program.
const TIER: &str = "MESHD_XTASK_TIER";
const PROGRAM: &str = "MESHD_XTASK_PROGRAM";
const SKIPPED: &str = "skipped: ";

/// Set for the long form of tests that have two.
pub(crate) const SOAK: &str = "MESHD_SOAK";

/// Tests that need root.
pub(crate) struct Tier {
    /// Its `[[test]]` in `tests/`.
    test: &'static str,
    pub(crate) name: &'static str,
    packages: &'static [&'static [Package]],
    /// At once: each is mostly waiting, and has hosts of its own.
    threads: u8,
    /// Ways to capture it holds for, each with the tests that are about something this backend cannot do.
    backends: &'static [(&'static str, &'static [&'static str])],
    /// Tests that have nothing to do with how connections are captured: the first backend is enough.
    once: &'static [&'static str],
    /// What may be in the way on a machine that has the packages.
    preflight: fn() -> Result<()>,
    /// Whether CI fails without it.
    required: bool,
}

const SCENARIOS: Tier = Tier {
    test: "scenarios",
    name: "scenarios on namespace hosts",
    packages: &[packages::FOR_LABS],
    threads: 6,
    backends: &BACKENDS,
    once: &ONCE,
    preflight: || Ok(()),
    required: true,
};

pub(crate) const RELIABILITY: Tier = Tier {
    test: "reliability",
    name: "faults under load on namespace hosts",
    packages: &[packages::FOR_LABS, packages::FOR_TESTS],
    // Each keeps most of a core busy.
    threads: 3,
    // The PKI and the clock do not care how connections are captured.
    backends: &[("nft-tproxy", &[])],
    once: &[],
    preflight: || Ok(()),
    required: true,
};

const MACHINES: Tier = Tier {
    test: "machines",
    name: "scenarios on systemd machines",
    packages: &[packages::FOR_LABS, packages::FOR_MACHINES],
    threads: 4,
    // What differs between backends is shown on namespace hosts.
    backends: &[("auto", &[])],
    once: &[],
    preflight: machine::preflight,
    required: true,
};

const CLIENTS: Tier = Tier {
    test: "clients",
    name: "clients others wrote",
    packages: &[packages::FOR_LABS, packages::FOR_CLIENTS],
    threads: 4,
    // Capture has no part in it.
    backends: &[("auto", &[])],
    once: &[],
    preflight: || python::environment().map(drop),
    required: true,
};

pub(crate) const KUBERNETES: Tier = Tier {
    test: "kubernetes",
    name: "tests with Kubernetes' API server, etcd and Consul",
    packages: &[packages::FOR_LABS, packages::FOR_TESTS],
    threads: 4,
    backends: &[("auto", &[])],
    once: &[],
    preflight: servers::all,
    // No package has it: not everywhere is there a Go toolchain to build it with.
    required: false,
};

const TIERS: [Tier; 5] = [SCENARIOS, RELIABILITY, CLIENTS, KUBERNETES, MACHINES];

/// Every scenario holds for every way to capture, except for what a backend cannot do (docs/capture.md).
const BACKENDS: [(&str, &[&str]); 5] = [
    ("nft-tproxy", &["tun::"]),
    ("nft-redirect", &["tun::"]),
    ("iptables-nft", &["tun::", NAMED_REMOVER, HUNG_RAW]),
    (
        "iptables-legacy",
        &["tun::", NAMED_REMOVER, HUNG_RAW, "enrol::a_strict_port_lets_in_every_scope_of_its_owners_pattern"],
    ),
    // No strict ports; and a firewall like ufw's must be told to accept the device (tun:: shows that it is named).
    (
        "tun",
        &[
            "strict::",
            "ledger::",
            "raw::",
            "iptables::",
            "client_address::",
            "bypass::",
            NAMED_REMOVER,
            "enrol::a_strict_port_lets_in_every_scope_of_its_owners_pattern",
            // It carries the packets itself, so nobody connects while it stands still.
            "identify::a_caller_that_is_gone_before_it_is_looked_at_is_refused_and_never_root",
            "intercept::a_plan_nobody_confirms_gives_way_to_the_last_confirmed_one",
            "intercept::a_plan_is_taken_back_also_when_meshd_is_killed_meanwhile",
            "intercept::a_confirmed_plan_stays_and_arms_nothing_the_next_time",
            "intercept::an_unconfirmed_plan_falls_also_when_its_timer_was_killed",
            "intercept::a_plan_shows_what_happens_to_open_connections",
        ],
    ),
];

/// Where how connections are captured has no part in what is shown, so that one backend shows it.
const ONCE: [&str; 15] = [
    // At the socket of the Workload API, at the PKI, between meshds, in files and commands.
    "workload_api::",
    "deny::",
    "federation::",
    "recovery::",
    "certificates::",
    "entries::",
    "bad_config::",
    "targets::",
    "black_hole::",
    "lab::",
    "independence::",
    // Which endpoint is chosen.
    "by_zone::",
    // Each of its tests brings a backend of its own.
    "hasty::",
    // Nothing is captured: the unit stands still, or is refused its identity.
    "probe::a_probe_of_a_frozen_unit_ends_and_says_so",
    "selectors::a_claim_the_pki_does_not_agree_with_is_shown_with_its_remedy",
];

/// The kernel tells who changed nft's rules, and nobody else's.
const NAMED_REMOVER: &str = "heal::whoever_keeps_removing_rules_is_named_and_not_fought";
/// Rules of iptables belong to no process: a revert removes them all.
const HUNG_RAW: &str = "raw::a_revert_tells_that_a_hung_meshd_still_captures_raw_addresses";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave out format and clippy
    #[arg(long)]
    no_lint: bool,
    /// Only scenarios whose name has this in it
    #[arg(long)]
    only: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    if let Some(program) = std::env::var_os(PROGRAM) {
        let wanted = std::env::var(TIER).unwrap_or_default();
        let tier = TIERS.into_iter().find(|tier| tier.test == wanted);
        return run_as_root(&tier.context("no such tier")?, &program.into(), args.only.as_deref());
    }
    packages::ensure(&[packages::FOR_TESTS])?;
    // Whose tests are the last but one: meanwhile there is time to build them. What is in the way, their tier tells.
    let _servers = (args.only.is_none() && root::is_root()).then(|| std::thread::spawn(servers::all));
    let mut summary = Summary::default();
    let programs = build(&TIERS.each_ref())?;
    let mut lint = None;
    if args.only.is_none() {
        summary.add("build", Outcome::of(true));
        lint = test_units(&mut summary, args.no_lint)?;
    }
    for tier in &TIERS {
        // What the others did is told all the same.
        let outcome = as_root(tier, &programs, args.only.as_deref(), false);
        summary.add(tier.name, outcome.unwrap_or_else(|error| Outcome::failed(format!("{error:#}"))));
    }
    match lint.map(Lint::finish).transpose() {
        Ok(lint) => lint.into_iter().for_each(|lint| summary.append(lint)),
        Err(error) => summary.add("lint", Outcome::failed(format!("{error:#}"))),
    }
    if let Some(only) = &args.only
        && summary.is_empty()
    {
        summary.add("--only", Outcome::failed(format!("no scenario has `{only}` in its name")));
    }
    Ok(summary.print())
}

/// What runs without root; and what needs no test to be seen, for its end.
fn test_units(summary: &mut Summary, no_lint: bool) -> Result<Option<Lint>> {
    let command = cargo_command(&["test", "--workspace", "--no-fail-fast"]);
    if no_lint {
        summary.add("unit and property tests", run_tests(command)?);
        summary.add("lint", Outcome::Skipped("--no-lint".to_owned()));
        return Ok(None);
    }
    let mut lint = None;
    // Not earlier: cargo does one thing at a time. From here on nothing is built any more.
    let unit = run_tests_and(command, || lint = Some(Lint::start()))?;
    summary.add("unit and property tests", unit);
    Ok(Some(lint.unwrap_or_else(Lint::start)))
}

const IN_LABS: [&str; 5] = ["meshd", "meshd-pki", "testkit", "workload-client", "scale"];

/// What was built for the tiers: by the name of its `[[test]]`, the program of each.
pub(crate) struct Programs(HashMap<String, PathBuf>);

impl Programs {
    /// What cargo says of executables as it builds them, a JSON object a line.
    fn told_by(messages: &str) -> Self {
        let told = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let tests = told.filter(|message| message["target"]["kind"][0] == "test");
        Self(
            tests
                .filter_map(|test| Some((text(&test["target"]["name"])?, text(&test["executable"])?.into())))
                .collect(),
        )
    }

    fn of(&self, tier: &Tier) -> Result<&Path> {
        let program = self.0.get(tier.test).map(PathBuf::as_path);
        program.with_context(|| format!("cargo did not say where the program of the {} is", tier.name))
    }
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// The programs of a lab, and those of these tiers.
pub(crate) fn build(tiers: &[&Tier]) -> Result<Programs> {
    // Of the whole workspace, as the unit tests are: other features of what both use would build it anew.
    let mut command = cargo_command(&["build", "--workspace", "--message-format=json-render-diagnostics"]);
    command.args(IN_LABS.iter().flat_map(|program| ["--bin", program]));
    command.args(tiers.iter().flat_map(|tier| ["--test", tier.test]));
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "the build failed");
    Ok(Programs::told_by(&String::from_utf8_lossy(&output.stdout)))
}

pub(crate) fn as_root(tier: &Tier, programs: &Programs, only: Option<&str>, long: bool) -> Result<Outcome> {
    let built = built::describe()?;
    let program = programs.of(tier)?;
    if let Some(reason) = cannot_have_root() {
        return Ok(skip_unless_ci(reason));
    }
    let mut command = if root::is_root() { Command::new("env") } else { Command::new("sudo") };
    if !root::is_root() {
        println!("The {} need root (network namespaces); running them with sudo.", tier.name);
        command.args(["-E", "env"]);
        command.arg(format!("PATH={}", std::env::var("PATH").unwrap_or_default()));
    }
    for (name, value) in built.marks() {
        command.arg(format!("{name}={value}"));
    }
    command.args(long.then(|| format!("{SOAK}=1")));
    command.arg(format!("{TIER}={}", tier.test)).arg(format!("{PROGRAM}={}", program.display()));
    command.arg(std::env::current_exe()?).arg("test");
    command.args(only.iter().flat_map(|only| ["--only", only]));
    Ok(match run_tests(command)? {
        Outcome::Skipped(reason) if tier.required => skip_unless_ci(reason),
        skipped @ Outcome::Skipped(_) => skipped,
        counted @ Outcome::Counted(_) => counted,
    })
}

fn cannot_have_root() -> Option<String> {
    (!root::is_root() && packages::find("sudo").is_none())
        .then(|| "they need root (network namespaces) and there is no sudo; run `cargo xtask test` as root".to_owned())
}

/// CI that silently tests less is worse than CI that fails.
fn skip_unless_ci(reason: String) -> Outcome {
    if std::env::var_os("CI").is_some() {
        Outcome::failed(format!("not run: {reason}"))
    } else {
        Outcome::Skipped(reason)
    }
}

fn run_as_root(tier: &Tier, program: &PathBuf, only: Option<&str>) -> Result<bool> {
    let built = built::before_sudo().context("started by hand: run `cargo xtask test`")?;
    if let Err(error) = packages::ensure(tier.packages) {
        println!("{RESULT}{error:#}");
        return Ok(false);
    }
    if let Err(error) = (tier.preflight)() {
        println!("{error:#}");
        println!("{SKIPPED}{error}");
        return Ok(true);
    }
    let tests = names_of_tests(program)?;
    let mut passed = true;
    for (run, (name, cannot)) in tier.backends.iter().enumerate() {
        println!("\nThe {} with capture backend {name}", tier.name);
        let skipped = [*cannot, if run == 0 { &[] } else { tier.once }].concat();
        if let Some(left_out) = left_out(&tests, &skipped, only)? {
            println!("{LEFT_OUT}{name}: {left_out}");
        }
        let mut command = Command::new(program);
        if std::env::var_os(SOAK).is_some() {
            // One at a time and with all it tells: what is measured there is reported.
            command.args(["--test-threads=1", "--nocapture"]).args(only);
        } else {
            command.arg(format!("--test-threads={}", tier.threads)).args(only);
        }
        command.current_dir(&built.target).env(backend::VARIABLE, name);
        command.args(skipped.iter().flat_map(|skipped| ["--skip", skipped]));
        // Where in the harness an error arose says nothing about the mesh.
        command.env("RUST_LIB_BACKTRACE", "0");
        passed &= command.status()?.success();
    }
    Ok(passed)
}

fn names_of_tests(program: &PathBuf) -> Result<Vec<String>> {
    let output = Command::new(program).args(["--list", "--format=terse"]).output()?;
    ensure!(output.status.success(), "{} does not list its tests", program.display());
    let lines = String::from_utf8(output.stdout)?;
    Ok(lines.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// What a backend leaves out of a run, for its summary.
fn left_out(tests: &[String], skipped: &[&str], only: Option<&str>) -> Result<Option<String>> {
    let mut told = Vec::new();
    for pattern in skipped {
        let matching = || tests.iter().filter(|test| test.contains(pattern));
        ensure!(matching().next().is_some(), "`{pattern}` is to be skipped, and no test has it in its name any more");
        let count = matching().filter(|test| only.is_none_or(|only| test.contains(only))).count();
        if count > 0 {
            told.push(if pattern.ends_with("::") { format!("{pattern} ({count})") } else { (*pattern).to_owned() });
        }
    }
    Ok((!told.is_empty()).then(|| told.join(", ")))
}

/// Runs tests with their output shown, and counts what libtest says in the end.
pub(crate) fn run_tests(command: Command) -> Result<Outcome> {
    run_tests_and(command, || ())
}

/// `begun` is called when all of them are built and the first ones run.
fn run_tests_and(mut command: Command, begun: impl FnOnce()) -> Result<Outcome> {
    let mut child = command.stdin(Stdio::inherit()).stdout(Stdio::piped()).spawn()?;
    let output = child.stdout.take().context("no stdout")?;
    let mut counts = Counts::default();
    let mut skipped = None;
    let mut begun = Some(begun);
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        if line.starts_with("running ") {
            begun.take().into_iter().for_each(|begun| begun());
        }
        counts.add(&line);
        skipped = line.strip_prefix(SKIPPED).map(str::to_owned).or(skipped);
    }
    let status = child.wait()?;
    if let Some(reason) = skipped.filter(|_| status.success() && counts.ran() == 0) {
        return Ok(Outcome::Skipped(reason));
    }
    if !status.success() && counts.failed == 0 {
        counts.failed = 1;
        counts.reason.get_or_insert_with(|| "did not build or did not run".to_owned());
    }
    Ok(Outcome::Counted(counts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_backend_leaves_out_is_told_by_pattern_and_a_stale_pattern_is_an_error() {
        let tests = ["a::one", "a::two", "b::one"].map(str::to_owned);
        let told = |skipped: &[&str], only| left_out(&tests, skipped, only).unwrap();
        assert_eq!(told(&["a::", "b::one"], None).unwrap(), "a:: (2), b::one");
        assert_eq!(told(&["a::", "b::one"], Some("two")).unwrap(), "a:: (1)");
        assert_eq!(told(&["b::one"], Some("a::")), None);
        assert!(left_out(&tests, &["c::"], None).unwrap_err().to_string().contains("`c::`"));
        let mut command = Command::new("sh");
        command.args(["-c", "echo 'left out with tun: a:: (2)'; echo 'test result: ok. 1 passed'"]);
        let run = run_tests(command).unwrap();
        assert!(matches!(run, Outcome::Counted(counts) if counts.left_out == ["left out with tun: a:: (2)"]));
    }

    #[test]
    fn of_what_cargo_says_the_program_of_each_test_is_taken_and_none_of_another_kind() {
        let said = |kind, name, executable| {
            serde_json::json!({ "target": { "kind": [kind], "name": name }, "executable": executable }).to_string()
        };
        let other = said("bin", "machines", "/target/machines");
        let messages = [said("test", "scenarios", "/target/scenarios-1"), other, "a warning".to_owned()].join("\n");
        let programs = Programs::told_by(&messages);
        assert_eq!(programs.of(&SCENARIOS).unwrap(), Path::new("/target/scenarios-1"));
        assert!(programs.of(&MACHINES).unwrap_err().to_string().contains("systemd machines"));
    }

    #[test]
    fn only_a_program_that_ran_nothing_and_succeeded_was_skipped() {
        let run = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            run_tests(command).unwrap()
        };
        assert!(matches!(run("echo 'skipped: no root'"), Outcome::Skipped(_)));
        let result = "echo 'skipped: no root'; echo 'test result: FAILED. 1 passed; 1 failed'";
        assert!(matches!(run(result), Outcome::Counted(counts) if counts.failed == 1));
        assert!(matches!(run("echo 'skipped: no root'; exit 1"), Outcome::Counted(counts) if counts.failed == 1));
    }
}
