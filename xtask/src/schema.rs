//! `cargo xtask schema`: what is published of the kinds of documents, made anew of what the parser knows.

use anyhow::Result;

use crate::built::cargo_command;

pub(crate) fn run() -> Result<bool> {
    let mut command = cargo_command(&["test", "--quiet", "-p", "meshd-discovery", "--lib", "what_is_published"]);
    Ok(command.env("MESHD_WRITE_SCHEMA", "1").status()?.success())
}
