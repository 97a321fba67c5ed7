//! The Workload API: who gets which identity, in which codes others are refused, and for how long.

use std::fs;

use anyhow::{Context, Result, ensure};
use meshd_tests::mesh::{Mesh, STRAY_UID};
use meshd_tests::plan::Plan;
use meshd_tests::process::{Finished, Process, Program};
use meshd_tests::wait::until;
use nix::sys::signal::Signal;

use crate::DEADLINE;
use crate::enrol::shop_without;
use crate::selectors::{Sight, copied, shop_where};

const NOBODY: &str = "PermissionDenied: no identity issued\n";

/// Asks web's meshd, as root in no unit: whoever runs it says which.
fn client(mesh: &Mesh, args: &[&str]) -> Program {
    let program = Program::new(mesh.host("web").binary("workload-client"));
    program.arg("--socket").arg(mesh.daemon("web").api_socket()).args(args)
}

fn as_unit(mesh: &Mesh, name: &str, args: &[&str]) -> Result<Finished> {
    mesh.host("web").run(&mesh.in_unit("web", name, client(mesh, args)))
}

fn fetched(mesh: &Mesh, name: &str) -> Result<serde_json::Value> {
    let said = as_unit(mesh, name, &["fetch"])?.expect_success(&format!("{name} fetching its identity"))?;
    Ok(serde_json::from_str(&said)?)
}

fn called(mesh: &Mesh, name: &str, call: &[&str]) -> Result<String> {
    as_unit(mesh, name, &[&["call"], call].concat())?.expect_success("workload-client call")
}

fn start(mesh: &Mesh, name: &str, args: &[&str]) -> Result<Process> {
    mesh.host("web").spawn(&mesh.in_unit("web", name, client(mesh, args)))
}

#[test]
fn each_unit_gets_its_own_identity_and_others_are_told_how_to_enrol() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    for name in ["checkout", "billing"] {
        let identity = fetched(&mesh, name)?;
        ensure!(identity["id"] == *mesh.spiffe_id(name), "{name} is given {identity}");
        ensure!(identity["chain"] == 2 && identity["roots"] == 1 && identity["bundles"] == 1, "{identity}");
    }
    let methods = ["fetch-x509-svid", "fetch-x509-bundles", "fetch-jwt-svid", "fetch-jwt-bundles", "fetch-secrets"];
    for method in methods {
        let answer = called(&mesh, "stray", &[method])?;
        ensure!(answer == NOBODY, "{method} answers a stray unit: {answer}");
    }
    let log = mesh.daemon("web").log();
    ensure!(log.matches("to enrol it: meshd enrol stray.service --as").count() == 1, "{log}");
    let denied = [("method", "FetchX509SVID"), ("code", "permission_denied")];
    ensure!(mesh.daemon("web").metrics()?.sum("meshd_workload_api_requests_total", &denied) == 1.0);
    Ok(())
}

#[test]
fn what_is_asked_wrongly_is_refused_in_the_codes_of_the_standard() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    for (call, expected) in [
        (&["fetch-x509-svid"][..], "Ok"),
        (&["fetch-x509-svid", "--no-header"], "InvalidArgument"),
        (&["fetch-wit-svid", "--no-header"], "InvalidArgument"),
        (&["fetch-wit-svid"], "Unimplemented"),
        // Envoy sends none.
        (&["fetch-secrets", "--no-header"], "Ok"),
    ] {
        let answer = called(&mesh, "checkout", call)?;
        ensure!(answer.starts_with(expected), "{call:?} answers {answer}");
    }
    Ok(())
}

#[test]
fn a_stream_follows_renewals_and_enrolment_and_ends_with_it() -> Result<()> {
    let mesh = Mesh::start(Plan { leaf_ttl: Some("15"), ..Plan::shop_with_one_server() })?;
    let (checkout, billing) = (mesh.spiffe_id("checkout"), mesh.spiffe_id("billing"));
    let mut watching = start(&mesh, "checkout", &["watch"])?;
    let lines = |watching: &Process| watching.stdout().lines().map(str::to_owned).collect::<Vec<_>>();
    until(DEADLINE, "two certificates", || lines(&watching).len() >= 2)?;
    ensure!(lines(&watching).iter().all(|line| *line == checkout), "{}", watching.stdout());

    // From now on this unit is billing, and no longer checkout; then nobody.
    let daemon = mesh.daemon("web");
    let text = fs::read_to_string(daemon.etc("enrol.d/harness.toml"))?;
    let selector = text.lines().nth(1).context("no selector")?;
    daemon.enrol(&format!("[[workload]]\n{selector}\nnamespace = \"shop\"\nname = \"billing\"\n"))?;
    daemon.signal(Signal::SIGHUP)?;
    until(DEADLINE, "billing's certificate", || lines(&watching).last() == Some(&billing))?;
    daemon.enrol("")?;
    daemon.signal(Signal::SIGHUP)?;
    until(DEADLINE, "the end of the stream", || !watching.is_running())?;
    let last = lines(&watching).pop().unwrap_or_default();
    ensure!(last.starts_with("ended: ") && last.contains("no identity issued"), "{}", watching.output());
    Ok(())
}

#[test]
fn a_token_is_good_for_its_audience_and_is_had_again_while_the_pki_is_away() -> Result<()> {
    let mut mesh = Mesh::start(Plan::shop_with_one_server())?;
    let token = |mesh: &Mesh, audience: &str| -> Result<serde_json::Value> {
        let said = as_unit(mesh, "checkout", &["token", "--audience", audience])?;
        Ok(serde_json::from_str(&said.expect_success(&format!("a token for {audience}"))?)?)
    };
    let ledger = token(&mesh, "ledger")?;
    ensure!(ledger["id"] == *mesh.spiffe_id("checkout"), "{ledger}");
    let text = ledger["token"].as_str().context("no token")?;
    // Whoever it is that judges it: billing, too.
    for (audience, expected) in [("ledger", "valid: "), ("payroll", "refused: ")] {
        let judged = as_unit(&mesh, "billing", &["judge", "--audience", audience, text])?.expect_success("judge")?;
        ensure!(judged.starts_with(expected), "{audience}: {judged}");
    }
    mesh.stop_pki()?;
    ensure!(token(&mesh, "ledger")? == ledger, "the token was not kept");
    let none = as_unit(&mesh, "checkout", &["token", "--audience", "payroll"])?;
    ensure!(!none.success() && none.stderr.contains("no token of") && none.stderr.contains("cannot reach"), "{none:?}");
    mesh.start_pki()?;
    until(DEADLINE, "a token for another audience", || token(&mesh, "payroll").is_ok())
}

#[test]
fn tokens_of_an_identity_the_pki_took_away_are_refused() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    mesh.pki(&["entry", "remove", "--host", "web", "ns/shop/sa/checkout"])?;
    let answer = called(&mesh, "checkout", &["fetch-jwt-svid"])?;
    ensure!(answer == NOBODY, "{answer}");
    let log = mesh.daemon("web").log();
    ensure!(log.contains("meshd-pki entry add --host web ns/shop/sa/checkout"), "{log}");
    Ok(())
}

#[test]
fn a_connection_in_other_hands_than_those_that_made_it_is_worth_nothing() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let host = mesh.host("web");
    let (own, socket) = (host.binary("workload-client"), mesh.daemon("web").api_socket());
    let (own, socket) = (own.display().to_string(), socket.display().to_string());
    let resume = [own.as_str(), "--socket", &socket, "resume"];
    let user = STRAY_UID.to_string();
    let other = ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "--"];
    let in_unit = |args: &[&str]| client(&mesh, args).unit("checkout.service");

    let same = host.run(&in_unit(&[&["become", "--"], &resume[..]].concat()))?;
    ensure!(same.expect_success("the same process with another program")? == "Ok\n");
    let changed = host.run(&in_unit(&[&["become", "--"], &other[..], &resume].concat()))?;
    ensure!(changed.expect_success("another user")? == NOBODY);
    let mut left = host.spawn(&in_unit(&[&["leave", "--"], &resume[..]].concat()))?;
    left.wait(DEADLINE)?;
    until(DEADLINE, "the heir of the connection to be answered", || !left.stdout().is_empty())?;
    ensure!(left.stdout() == NOBODY, "{}", left.output());
    Ok(())
}

/// A client that is not `workload-client`, but all that it is.
fn twin(mesh: &Mesh) -> Result<String> {
    let built = meshd_tests::binaries::directory()?.join("workload-client");
    Ok(copied(mesh, &built, "client-of-another-name")?.display().to_string())
}

#[test]
fn whoever_runs_another_program_than_when_it_connected_is_neither() -> Result<()> {
    let mesh = shop_where(Sight::On, |mesh| Ok(vec![format!("unix:path:{}", twin(mesh)?)]))?;
    let (host, twin) = (mesh.host("web"), mesh.host("web").directory().join("client-of-another-name"));
    let twin = twin.display().to_string();
    let own = host.binary("workload-client").display().to_string();
    let socket = mesh.daemon("web").api_socket().display().to_string();
    let run = |program: &str, args: &[&str]| {
        let program = Program::new(program).args(["--socket", &socket]).args(args);
        host.run(&mesh.in_unit("web", "checkout", program))?.expect_success(&format!("{args:?}"))
    };
    let resume = |program: &'_ str| [program.to_owned(), "--socket".to_owned(), socket.clone(), "resume".to_owned()];
    let becoming = |from: &str, to: &str| {
        let resume = resume(to);
        run(from, &[&["become", "--"][..], &resume.each_ref().map(String::as_str)].concat())
    };
    ensure!(run(&twin, &["call", "fetch-x509-svid"])? == "Ok\n", "{}", mesh.daemon("web").log());
    ensure!(run(&own, &["call", "fetch-x509-svid"])? == NOBODY);
    ensure!(becoming(&twin, &twin)? == "Ok\n", "the same program, started again");
    ensure!(becoming(&own, &twin)? == NOBODY);
    ensure!(becoming(&twin, &own)? == NOBODY);
    let log = mesh.daemon("web").log();
    ensure!(log.contains("is another user or program now"), "{log}");
    ensure!(log.contains(&format!("is not unix:path:{twin}, which the PKI's entry")), "{log}");
    Ok(())
}

/// Waits until the process with the number of its last argument has ended, makes another one with that number, and becomes
/// the program of its other arguments.
const SUCCESSOR: &str = r#"
import ctypes, os, signal, struct, sys
*program, _, number = sys.argv[1:]
while os.path.exists(f"/proc/{number}"):
    os.sched_yield()
libc, numbers = ctypes.CDLL(None, use_errno=True), (ctypes.c_int * 1)(int(number))
# struct clone_args of linux/sched.h: only exit_signal, set_tid and set_tid_size.
clone = struct.pack("10Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(numbers), 1)
child = libc.syscall(435, clone, len(clone))
if child == 0:
    signal.pause()
if child != int(number):
    sys.exit(f"cannot have the number {number}: {os.strerror(ctypes.get_errno())}")
os.execv(program[0], program)
"#;

#[test]
fn a_process_with_the_number_of_the_caller_that_ended_is_nobody() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    if !mesh.lab().has_units() {
        return Ok(());
    }
    let (own, socket) = (mesh.host("web").binary("workload-client"), mesh.daemon("web").api_socket());
    let (own, socket) = (own.display().to_string(), socket.display().to_string());
    // Unit and user are those of the caller: only the process is another one. It leads no group, which would keep its number.
    let leave =
        [&own, "--socket", &socket, "leave", "--", "python3", "-c", SUCCESSOR, &own, "--socket", &socket, "resume"];
    let caller = Program::new("sh").args(["-c", "\"$@\"; :", "sh"]).args(leave);
    let mut left = mesh.host("web").spawn(&caller.unit("checkout.service"))?;
    left.wait(DEADLINE)?;
    until(DEADLINE, "the heir of the connection to be answered", || !left.output().is_empty())?;
    ensure!(left.stdout() == NOBODY, "{}", left.output());
    Ok(())
}

#[test]
fn an_identity_of_a_user_is_given_to_no_other_user() -> Result<()> {
    let mesh = shop_without("web")?;
    let daemon = mesh.daemon("web");
    daemon.enrol(&format!("[[workload]]\nuid = {STRAY_UID}\nnamespace = \"shop\"\nname = \"checkout\"\n"))?;
    daemon.signal(Signal::SIGHUP)?;
    let call = |uid| client(&mesh, &["call", "fetch-x509-svid"]).unit("cron.service").uid(uid);
    let called = |uid| mesh.host("web").run(&call(uid)).map(|said| said.stdout);
    until(DEADLINE, "the user to be checkout", || called(STRAY_UID).is_ok_and(|answer| answer == "Ok\n"))?;
    ensure!(called(STRAY_UID + 1)? == NOBODY);
    Ok(())
}

#[test]
fn a_cgroup_named_like_an_enrolled_unit_is_that_of_whoever_named_it() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    if !mesh.lab().has_units() {
        return Ok(());
    }
    for (cgroup, owner) in [
        ("stray.service/checkout.service", "stray.service"),
        ("user.slice/user-2005.slice/user@2005.service/app.slice/checkout.service", "user@2005.service"),
    ] {
        let asking = client(&mesh, &["call", "fetch-x509-svid"]).unit(cgroup).uid(STRAY_UID);
        let answer = mesh.host("web").run(&asking)?.expect_success("workload-client call")?;
        ensure!(answer == NOBODY, "{cgroup} is answered: {answer}");
        ensure!(mesh.daemon("web").log().contains(&format!("meshd enrol {owner} ")), "{owner} is not named");
    }
    let below = client(&mesh, &["fetch"]).unit("checkout.service/worker.service").uid(STRAY_UID);
    let fetched = mesh.host("web").run(&below)?.expect_success("a process below an enrolled unit")?;
    ensure!(fetched.contains(&mesh.spiffe_id("checkout")), "{fetched}");
    Ok(())
}

#[test]
fn a_user_with_a_thousand_streams_starves_nobody() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let greedy = start(&mesh, "billing", &["hold", "--streams", "1000"])?;
    until(DEADLINE, "all streams tried", || !greedy.stdout().is_empty())?;
    ensure!(greedy.stdout() == "256 open, 744 refused\n", "{}", greedy.output());
    ensure!(fetched(&mesh, "checkout")?["id"] == *mesh.spiffe_id("checkout"));
    drop(greedy);
    let open =
        || mesh.daemon("web").metrics().map_or(1.0, |metrics| metrics.sum("meshd_workload_api_connections", &[]));
    until(DEADLINE, "connections of a process that ended to be closed", || open() == 0.0)
}

#[test]
fn without_the_api_there_is_no_socket() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let daemon = mesh.daemon("web");
    let config = fs::read_to_string(daemon.config())?;
    fs::write(daemon.config(), config + "[workload_api]\nenabled = false\n")?;
    daemon.restart()?;
    ensure!(!daemon.api_socket().exists(), "{} is there", daemon.api_socket().display());
    Ok(())
}
