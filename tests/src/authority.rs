//! Certificates of servers others wrote and of their clients: an authority of its own for each, and what it signs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::host::Host;
use crate::process::Program;

pub struct Authority {
    host: Host,
    directory: PathBuf,
}

impl Authority {
    /// Its files are in `directory`, which is made.
    pub fn create(host: &Host, directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let authority = Self { host: host.clone(), directory: directory.to_owned() };
        authority.openssl(
            "new ca.key; openssl req -x509 -key ca.key -out ca.pem -days 2 -subj \"/CN=$2\"",
            &["authority of a test"],
        )?;
        Ok(authority)
    }

    /// `NAME.pem` and `NAME.key`, for a server at the host's addresses or a client of this subject.
    pub fn issue(&self, name: &str, subject: &str) -> Result<()> {
        let names = format!("subjectAltName = IP:127.0.0.1, IP:{}, DNS:localhost", self.host.address());
        let script = "new \"$2.key\"; printf '%s\\n' \"$4\" > \"$2.cnf\"; openssl req -new -key \"$2.key\" -subj \"$3\" \
                      | openssl x509 -req -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile \"$2.cnf\" -out \"$2.pem\"";
        self.openssl(script, &[name, subject, &names])
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// PEM.
    pub fn certificate(&self) -> PathBuf {
        self.file("ca.pem")
    }

    fn openssl(&self, script: &str, args: &[&str]) -> Result<()> {
        let new = "cd \"$1\"; new() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out \"$1\"; }; ";
        let program = Program::new("sh").args(["-euc", &format!("{new}{script}"), "sh"]).arg(&self.directory);
        self.host.run(&program.args(args))?.expect_success("certificates of a test")?;
        Ok(())
    }
}
