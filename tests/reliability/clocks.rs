//! Wrong clocks, of the PKI and of hosts.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use meshd_tests::clock::fake_time;
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{HostPlan, Plan, Workload};
use meshd_tests::wait::until;

use crate::witness::Witness;
use crate::{DEADLINE, asks_payments, figure, figure_promised, roots};

const HOUR: i64 = 3600;
const YEAR: i64 = 365 * 24 * HOUR;
/// From today to early in 1970, and some days.
const SINCE_1970: i64 = 56 * YEAR;

fn shop_and(host: &str) -> Plan {
    // Renewed every half minute: a certificate of a wrong time would be in use at once.
    let mut plan = Plan { leaf_ttl: Some("60"), ..Plan::shop() };
    plan.hosts.push(HostPlan { name: host.to_owned(), workloads: vec![Workload::client("checkout", 2003)] });
    plan
}

#[test]
fn a_pki_whose_clock_jumps_does_nothing_until_it_is_right_again() -> Result<()> {
    let plan = shop_and("late");
    let mut mesh = Mesh::prepare(Arc::new(Lab::new(&plan.host_names())?), plan)?;
    let (library, ahead) = (fake_time()?, mesh.host("pki").directory().join("ahead"));
    fs::write(&ahead, "+0")?;
    let file = ahead.to_str().context("no name")?;
    let clock = [("LD_PRELOAD", library.as_str()), ("FAKETIME_TIMESTAMP_FILE", file)];
    mesh.start_pki_with(&[&clock[..], &[("FAKETIME_NO_CACHE", "1"), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")]].concat())?;
    crate::SERVERS.iter().try_for_each(|host| mesh.join(host))?;
    mesh.start_hosts(&crate::SERVERS)?;
    let load = Witness::start(&mesh)?;
    let (root, token) = (roots(&mesh)?.0, mesh.token_of("late")?);
    let distrusted = || mesh.pki_metrics().map_or(-1.0, |metrics| metrics.sum("meshd_pki_clock_distrusted", &[]));
    for jump in [HOUR, -HOUR, YEAR, -SINCE_1970] {
        fs::write(&ahead, format!("{jump:+}"))?;
        // At once, not when the PKI looks at its clock the next time.
        let refused = mesh.daemon("late").join(&token)?;
        ensure!(!refused.success(), "{jump:+} s: a certificate of a wrong time was issued");
        until(DEADLINE, "the alarm", || distrusted() == 1.0)?;
        fs::write(&ahead, "+0")?;
        until(DEADLINE, "the end of the alarm", || distrusted() == 0.0)?;
        ensure!(roots(&mesh)?.0 == root, "{jump:+} s: a root was replaced by a wrong clock");
    }
    mesh.daemon("late").join(&mesh.token_of("late")?)?.expect_success("joining by the right clock")?;
    mesh.start_hosts(&["late"])?;
    asks_payments(&mesh, "late", "checkout")?;
    load.end(&mesh, "the PKI's clock 1 h ahead, 1 h behind, 1 year ahead, in 1970")
}

#[test]
fn a_host_with_a_wrong_clock_works_or_says_so_and_is_well_once_it_is_right() -> Result<()> {
    let mesh = Mesh::start(shop_and("depot"))?;
    let load = Witness::start(&mesh)?;
    let daemon = mesh.daemon("depot");
    let library = fake_time()?;
    // One that is behind by less than certificates are dated back works; the others name the clock and what it makes of
    // the certificates.
    let jumps = [
        (HOUR, Some("this clock is 3600 s ahead of the PKI's")),
        (-HOUR, None),
        (YEAR, Some("certificate expired: verification time")),
        (-SINCE_1970, Some("certificate not valid yet: verification time")),
    ];
    for (jump, told) in jumps {
        let ahead = format!("{jump:+}");
        daemon.set_environment(&[
            ("LD_PRELOAD", &library),
            ("FAKETIME", &ahead),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ]);
        daemon.stop()?;
        let before = daemon.log().len();
        daemon.start()?;
        let works = || asks_payments(&mesh, "depot", "checkout").is_ok();
        match told {
            None => until(DEADLINE, "the host to work all the same", works)?,
            Some(words) => {
                let status = || daemon.run(&["status"]).map_or(String::new(), |status| status.stdout);
                let says_so = || (status() + &daemon.log().split_off(before)).contains(words);
                until(DEADLINE, &format!("the host, {ahead} s off, to say `{words}`"), says_so)?;
                ensure!(!works(), "{ahead} s off it works, and says `{words}`");
            }
        }
        let came_of_it = if told.is_none() { "works" } else { "is refused, and says why" };
        figure(&format!("a host {ahead} s off: {came_of_it}"));
        daemon.set_environment(&[]);
        daemon.restart()?;
        until(DEADLINE, "the host to be well", || asks_payments(&mesh, "depot", "checkout").is_ok())?;
    }
    load.end(&mesh, "a host's clock 1 h ahead, 1 h behind, 1 year ahead, in 1970")
}

/// What a resumed machine finds: the wall clock far ahead of where it was, the time since boot hardly moved.
#[test]
fn a_host_that_wakes_up_renews_within_seconds() -> Result<()> {
    let mut plan = Plan::shop();
    plan.hosts.push(HostPlan { name: "depot".to_owned(), workloads: vec![Workload::client("checkout", 2003)] });
    let mut mesh = Mesh::prepare(Arc::new(Lab::new(&plan.host_names())?), plan)?;
    let (library, ahead) = (fake_time()?, mesh.host("depot").directory().join("ahead"));
    fs::write(&ahead, "+0")?;
    let file = ahead.to_str().context("no name")?.to_owned();
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.daemon("depot").set_environment(&[
        ("LD_PRELOAD", &library),
        ("FAKETIME_TIMESTAMP_FILE", &file),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ]);
    mesh.start_all()?;
    let load = Witness::start(&mesh)?;
    asks_payments(&mesh, "depot", "checkout")?;
    let renewed = || {
        let metrics = mesh.daemon("depot").metrics();
        metrics.map_or(0.0, |metrics| metrics.sum("identity_cert_refreshes_total", &[("result", "ok")]))
    };
    let before = renewed();
    // Of certificates for a day, which are renewed after eleven hours at the latest.
    fs::write(&ahead, format!("{:+}", 11 * HOUR))?;
    let awake = Instant::now();
    until(DEADLINE, "a renewal", || renewed() > before)?;
    let took = awake.elapsed();
    let text = format!("a host that slept for 11 h renewed {took:.1?} after it woke");
    figure_promised(&text, took < Duration::from_secs(20))?;
    asks_payments(&mesh, "depot", "checkout")?;
    load.end(&mesh, "a host asleep for 11 h")
}
