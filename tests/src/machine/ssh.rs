//! An administrator who comes in by SSH, with a key.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Result;

use crate::command;
use crate::lab::Lab;
use crate::process::Program;

/// A key pair of one lab.
pub struct Key {
    file: PathBuf,
    pub public: String,
}

impl Key {
    pub fn generate(lab: &Lab) -> Result<Self> {
        let file = lab.directory().join("key");
        let name = file.display().to_string();
        command::run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &name])?;
        Ok(Self { public: std::fs::read_to_string(file.with_extension("pub"))?, file })
    }
}

/// A remote command; nothing is asked, and nothing of the machine running the tests is read or written.
pub fn ssh(key: &Key, server: impl Into<IpAddr>, command: &str) -> Program {
    Program::new("ssh")
        .args(["-F", "none", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR"])
        .args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes"])
        .arg("-i")
        .arg(&key.file)
        .arg(format!("root@{}", server.into()))
        .arg(command)
}
