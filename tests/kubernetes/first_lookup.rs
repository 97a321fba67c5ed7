//! A host that declares nothing follows what it asks for, and nothing else.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use meshd_tests::dns;
use meshd_tests::plan::{self, Plan};
use meshd_tests::wait::until;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::from_etcd::Bed;
use crate::{DEADLINE, DNS};

/// What status lists of web: names of services, or of imports.
fn names(bed: &Bed, list: &str) -> Result<BTreeSet<String>> {
    let status = bed.mesh.daemon("web").json("status")?;
    let rows = status[list].as_array().with_context(|| format!("no {list}"))?;
    Ok(rows.iter().filter_map(|row| row["name"].as_str().map(str::to_owned)).collect())
}

fn ask(bed: &Bed, name: &str) -> Result<dns::Answer> {
    bed.mesh.host("web").within(|| dns::ask_udp(DNS, name))?
}

fn set<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

/// Another service of the shop, at the same hosts.
fn define(bed: &Bed, name: &str) -> Result<()> {
    let plan = Plan::shop();
    let payments = plan.services.iter().find(|service| service.name == "payments").context("no payments")?;
    let address = bed.mesh.host("api-1").address().to_string();
    let document = plan::document(payments, &[address]).replace("name: payments", &format!("name: {name}"));
    ensure!(document.contains(name), "{document}");
    bed.change(&["put", &format!("/meshd-discovery/v1/shop/{name}/service"), &document])
}

#[test]
fn only_what_is_asked_for_is_followed_and_a_scan_of_names_takes_nothing_away() -> Result<()> {
    let bed = Bed::make()?;
    for name in ["ledger", "orders"] {
        define(&bed, name)?;
    }
    ensure!(names(&bed, "services")? == set(["payments.shop"]), "{:?}", names(&bed, "services"));
    let answer = ask(&bed, "ledger.shop.mesh")?;
    ensure!(answer.code == dns::NO_ERROR && answer.address.is_some(), "{answer:?}");
    ensure!(names(&bed, "services")? == set(["ledger.shop", "payments.shop"]), "{:?}", names(&bed, "services"));
    for n in 0..150 {
        let answer = ask(&bed, &format!("no-{n}.shop.mesh"))?;
        ensure!(answer.code == dns::NO_SUCH_NAME, "{n}: {answer:?}");
    }
    let imports = names(&bed, "imports")?;
    ensure!(
        imports.len() <= 102 && imports.contains("ledger.shop") && imports.contains("payments.shop"),
        "{imports:?}"
    );
    bed.answers("api-1")?;
    let shown = bed.mesh.daemon("web").run(&["status"])?.expect_success("status")?;
    let row = shown.lines().find(|line| line.contains("payments.shop") && line.contains("looked up"));
    ensure!(row.is_some_and(|row| row.contains("yes") && row.contains("today")), "{shown}");
    Ok(())
}

#[test]
fn a_store_that_stands_still_does_not_keep_who_asks_and_is_not_taken_for_one_without_the_name() -> Result<()> {
    let bed = Bed::make()?;
    define(&bed, "ledger")?;
    for member in 0..3 {
        bed.etcd.signal(member, Signal::SIGSTOP)?;
    }
    let program = bed.mesh.host("web").within(|| {
        let began = std::time::Instant::now();
        dns::ask_udp(DNS, "ledger.shop.mesh").map(|answer| (answer, began.elapsed()))
    })??;
    let (answer, elapsed) = program;
    // Stub resolvers give up after 5 s.
    ensure!(answer.code == dns::SERVER_FAILURE && elapsed.as_secs() < 4, "{answer:?} after {elapsed:?}");
    bed.answers("api-1")?;
    for member in 0..3 {
        bed.etcd.signal(member, Signal::SIGCONT)?;
    }
    until(DEADLINE, "the name is known", || {
        ask(&bed, "ledger.shop.mesh").is_ok_and(|answer| answer.code == dns::NO_ERROR)
    })
}

#[test]
fn after_a_restart_without_the_store_what_was_used_is_there_also_for_who_kept_its_address() -> Result<()> {
    let mut bed = Bed::make()?;
    let address: Ipv4Addr = ask(&bed, "payments.shop.mesh")?.address.context("no address")?;
    let state = bed.mesh.daemon("web").config().with_file_name("").join("../state");
    until(DEADLINE, "what is used is on disk", || {
        let holds = |file: &str| std::fs::read_to_string(state.join(file)).is_ok_and(|text| text.contains("payments"));
        holds("interests.json") && holds("directory/etcd.json")
    })?;
    for member in 0..3 {
        bed.etcd.kill_member(member)?;
    }
    bed.mesh.daemon("web").restart()?;
    let url = format!("http://{address}/");
    until(DEADLINE, "an answer at the address from before", || {
        let asked = bed.mesh.curl("web", "checkout", &["-sS", "--max-time", "5", &url]);
        asked.is_ok_and(|finished| finished.stdout.contains("api-1"))
    })?;
    bed.answers("api-1")?;
    // What was never used is not known to be absent.
    let answer = ask(&bed, "ledger.shop.mesh")?;
    ensure!(answer.code == dns::SERVER_FAILURE, "{answer:?}");
    Ok(())
}

#[test]
fn a_connection_to_an_address_from_before_has_its_service_asked_for() -> Result<()> {
    let bed = Bed::make()?;
    let address: Ipv4Addr = ask(&bed, "payments.shop.mesh")?.address.context("no address")?;
    let daemon = bed.mesh.daemon("web");
    daemon.stop()?;
    // As after a month without use.
    let state = daemon.config().with_file_name("").join("../state");
    for file in ["interests.json", "directory/etcd.json"] {
        match std::fs::remove_file(state.join(file)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    daemon.start()?;
    ensure!(names(&bed, "services")?.is_empty(), "{:?}", names(&bed, "services"));
    let asked = bed.mesh.curl("web", "checkout", &["-sS", "--max-time", "5", &format!("http://{address}/")])?;
    ensure!(asked.expect_success("the first connection")?.contains("api-1"));
    ensure!(names(&bed, "imports")? == set(["payments.shop"]), "{:?}", names(&bed, "imports"));
    Ok(())
}

#[test]
fn an_endpoint_that_cannot_be_reached_has_its_service_read_again_and_no_other() -> Result<()> {
    let bed = Bed::make()?;
    for name in ["ledger", "orders"] {
        define(&bed, name)?;
        until(DEADLINE, "the name is known", || {
            ask(&bed, &format!("{name}.shop.mesh")).is_ok_and(|answer| answer.code == dns::NO_ERROR)
        })?;
    }
    bed.register("api-2")?;
    bed.answers("api-2")?;
    let suspected = || -> Result<f64> {
        Ok(bed.mesh.daemon("web").metrics()?.sum("meshd_source_suspected_total", &[("source", "etcd")]))
    };
    ensure!(suspected()? < 1.0, "{:?}", suspected());
    let web = bed.mesh.host("web").address();
    let before = bed.etcd.read_by(web);
    let all = ["payments", "ledger", "orders"].map(|name| format!("/meshd-discovery/v1/shop/{name}/"));
    ensure!(all.iter().all(|service| before.contains(service)), "{before:?}");
    bed.mesh.daemon("api-2").kill()?;
    until(DEADLINE, "the service is suspected", || {
        let asked = bed.mesh.curl("web", "checkout", &["-sS", "--max-time", "5", "http://payments.shop.mesh/"]);
        asked.is_ok() && suspected().is_ok_and(|times| times >= 1.0)
    })?;
    let count = |reads: &[String], service: &str| reads.iter().filter(|key| *key == service).count();
    let payments = count(&before, &all[0]);
    until(DEADLINE, "it is read again", || count(&bed.etcd.read_by(web), &all[0]) > payments)?;
    let after = bed.etcd.read_by(web);
    // The others are probes.
    let other = |key: &&String| **key != all[0] && *key != "/meshd-discovery/v1/";
    let (before, after) = (before.iter().filter(other), after.iter().filter(other));
    ensure!(before.clone().eq(after.clone()), "{before:?} {after:?}");
    let status: Value = bed.mesh.daemon("web").json("status")?;
    ensure!(status["sources"][0]["errors"] == Value::Array(vec![]), "{status}");
    bed.answers("api-1")
}
