//! The program as an operator runs it.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use meshd_identity::JoinToken;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meshd-pki"));
    command.args(arguments);
    command
}

fn run(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

/// The one line of a command that fails.
fn error_of(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(!output.status.success(), "{arguments:?} succeeded");
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

fn initialised(dir: &Path) -> String {
    let state = dir.join("pki").to_str().unwrap().to_owned();
    let output = run(&["init", "--state", &state, "--trust-domain", "prod.example.org"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8(output.stdout).unwrap().contains("Move the recovery key to a safe place offline"));
    state
}

/// Kills what a failing test would leave behind.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

#[test]
fn it_serves_until_sigterm_and_ends_cleanly() {
    let dir = tempfile::tempdir().unwrap();
    let state = initialised(dir.path());
    let arguments = ["run", "--state", &state, "--listen", "127.0.0.1:0", "--leaf-ttl", "60"];
    let child = command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut server = Server(child);
    let mut lines = BufReader::new(server.0.stdout.take().unwrap());
    let mut ready = String::new();
    lines.read_line(&mut ready).unwrap();
    assert!(ready.starts_with("meshd-pki ready listen=127.0.0.1:"), "{ready}");
    let second = error_of(&arguments);
    // Through the server's socket, which knows of a leaf life of 60 s what the directory does not.
    let done = run(&["authority", "prepare", "--state", &state]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let refused = error_of(&["authority", "activate", "--state", &state]);
    assert!(refused.contains("activation of root") && refused.contains("followers"), "{refused}");
    let list = run(&["authority", "list", "--state", &state, "-o", "json"]);
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    assert_eq!(list["authorities"][1]["state"], "prepared", "{list}");
    let list = run(&["authority", "list", "--state", &state]);
    assert!(String::from_utf8(list.stdout).unwrap().contains("to activate: waits for"));
    let unknown = error_of(&["host", "ban", "--state", &state, "web"]);
    assert!(unknown.contains("`web` is not enrolled"), "{unknown}");
    assert!(second.contains("another meshd-pki runs on"), "{second}");
    kill(Pid::from_raw(i32::try_from(server.0.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(server.0.wait().unwrap().code(), Some(0));
    let mut log = String::new();
    server.0.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(log.contains("stopped") && !log.contains("ERROR"), "{log}");
    let rehearsal = error_of(&["run", "--state", &state, "--listen", "127.0.0.1:0", "--rehearse", "10s"]);
    assert!(rehearsal.contains("on a directory of its own"), "{rehearsal}");
}

#[test]
fn a_systemd_credential_replaces_the_wrapping_key_file() {
    let dir = tempfile::tempdir().unwrap();
    let credentials = dir.path().join("credentials");
    std::fs::create_dir(&credentials).unwrap();
    std::fs::write(credentials.join("meshd-pki.kek"), [7; 32]).unwrap();
    let state = dir.path().join("pki").to_str().unwrap().to_owned();
    let mut init = command(&["init", "--state", &state, "--trust-domain", "prod.example.org"]);
    assert!(init.env("CREDENTIALS_DIRECTORY", &credentials).output().unwrap().status.success());
    assert!(!dir.path().join("pki/kek").exists());
    let arguments = ["run", "--state", &state, "--listen", "127.0.0.1:0"];
    let without = error_of(&arguments);
    assert!(without.contains("wrapping key") && without.contains("backup"), "{without}");
    let mut run = command(&arguments);
    let child = run.env("CREDENTIALS_DIRECTORY", &credentials).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut server = Server(child.unwrap());
    let mut ready = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    assert!(ready.starts_with("meshd-pki ready"), "{ready}");
}

#[test]
fn a_token_stands_alone_on_stdout() {
    let dir = tempfile::tempdir().unwrap();
    let state = initialised(dir.path());
    let output = run(&[
        "token",
        "create",
        "--state",
        &state,
        "--host",
        "web",
        "--allow",
        "ns/shop/sa/a",
        "ns/shop/sa/b",
        "--pki",
        "10.0.0.1:15012",
        "--ttl",
        "30m",
    ]);
    let token: JoinToken = String::from_utf8(output.stdout).unwrap().trim_end().parse().unwrap();
    assert_eq!(token.pki, ["10.0.0.1:15012"]);
    assert!(output.stderr.is_empty());
    let add = run(&["entry", "add", "--state", &state, "--host", "web", "ns/shop/sa/c"]);
    assert!(add.status.success(), "{}", String::from_utf8_lossy(&add.stderr));
    let list = String::from_utf8(run(&["entry", "list", "--state", &state]).stdout).unwrap();
    assert!(list.contains("spiffe://prod.example.org/ns/shop/sa/c"), "{list}");
    let remove = run(&["entry", "remove", "--state", &state, "--host", "web", "ns/shop/sa/c"]);
    assert!(remove.status.success());
    let status = run(&["status", "--state", &state, "-o", "json"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["open_tokens"][0]["identities"], serde_json::json!(["ns/shop/sa/a", "ns/shop/sa/b"]));
    assert_eq!(status["problems"], serde_json::json!([]));
    assert!(status["advice"][0].as_str().unwrap().contains("move it offline"));
}

#[test]
fn bad_input_gets_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let state = initialised(dir.path());
    let empty = dir.path().join("empty").to_str().unwrap().to_owned();
    let run_with = |more: [&'static str; 2]| {
        ["run", "--state", &state, "--listen", "127.0.0.1:0", more[0], more[1]].map(str::to_owned)
    };
    let cases: Vec<(Vec<String>, &str)> = vec![
        (["init", "--state", &state, "--trust-domain", "a"].map(str::to_owned).to_vec(), "already holds a PKI"),
        (["init", "--state", &empty, "--trust-domain", "Prod"].map(str::to_owned).to_vec(), "only a-z, 0-9"),
        (["status", "--state", &empty].map(str::to_owned).to_vec(), "meshd-pki init"),
        (["token", "create", "--state", &state, "--host", "web"].map(str::to_owned).to_vec(), "--pki HOST:PORT"),
        (run_with(["--leaf-ttl", "30d"]).to_vec(), "lower --leaf-ttl"),
        (run_with(["--leaf-ttl", "soon"]).to_vec(), "not a duration"),
        (run_with(["--advertise", "pki"]).to_vec(), "not HOST:PORT"),
    ];
    for (arguments, expected) in cases {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let error = error_of(&arguments);
        assert!(error.contains(expected), "{arguments:?}: {error}");
        assert!(!error.contains("panicked"), "{error}");
    }
}
