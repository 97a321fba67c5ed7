//! One Consul server on a host: HTTPS only, and nothing for whoever shows no token.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::authority::Authority;
use crate::host::Host;
use crate::process::{Process, Program};
use crate::servers;
use crate::wait::until;

/// Of the host's own namespace.
const PORT: u16 = 8501;
const MANAGEMENT: &str = "11111111-1111-1111-1111-111111111111";
const READY: Duration = Duration::from_secs(60);

pub struct Consul {
    process: Option<Process>,
    authority: Authority,
    program: PathBuf,
    host: Host,
}

impl Consul {
    pub fn start(host: &Host) -> Result<Self> {
        let authority = Authority::create(host, &host.directory().join("consul"))?;
        authority.issue("server", "/CN=server.dc1.consul")?;
        let mut consul = Self { process: None, authority, program: servers::consul()?, host: host.clone() };
        fs::write(consul.authority.file("config.json"), consul.config().to_string())?;
        consul.resume()?;
        Ok(consul)
    }

    /// Reachable from other hosts, too.
    pub fn url(&self) -> String {
        format!("https://{}:{PORT}", self.host.address())
    }

    pub fn authority(&self) -> PathBuf {
        self.authority.certificate()
    }

    /// Status and body of a call of the HTTP API with a token or none.
    pub fn call(&self, token: Option<&str>, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, String)> {
        let program = Program::new("curl").args(["-sS", "--max-time", "10", "-X", method, "-w", "\n%{http_code}"]);
        let program = program.arg("--cacert").arg(self.authority());
        let program = program.args(token.iter().flat_map(|it| ["-H".to_owned(), format!("X-Consul-Token: {it}")]));
        let program = program.args(body.iter().flat_map(|it| ["-d".to_owned(), it.to_string()]));
        let finished = self.host.run(&program.arg(format!("{}{path}", self.url())))?;
        ensure!(finished.success(), "{method} {path}: {}", finished.stderr);
        let (body, status) = finished.stdout.rsplit_once('\n').context("curl says no status")?;
        Ok((status.parse()?, body.to_owned()))
    }

    /// As the one who manages it; what it answers.
    pub fn manage(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let (status, answer) = self.call(Some(MANAGEMENT), method, path, body)?;
        ensure!(status == 200, "{method} {path}: {status} {answer}");
        serde_json::from_str(&answer).with_context(|| format!("{method} {path}: {answer}"))
    }

    /// A token with rules of its own, as Consul's policies have them.
    pub fn token(&self, name: &str, rules: &str) -> Result<String> {
        self.manage("PUT", "/v1/acl/policy", Some(&json!({ "Name": name, "Rules": rules })))?;
        let token = self.manage("PUT", "/v1/acl/token", Some(&json!({ "Policies": [{ "Name": name }] })))?;
        Ok(token["SecretID"].as_str().with_context(|| format!("no token: {token}"))?.to_owned())
    }

    /// What the token of that name may from now on.
    pub fn set_rules(&self, name: &str, rules: &str) -> Result<()> {
        let policy = self.manage("GET", &format!("/v1/acl/policy/name/{name}"), None)?;
        let id = policy["ID"].as_str().with_context(|| format!("no policy: {policy}"))?;
        let body = json!({ "Name": name, "Rules": rules });
        self.manage("PUT", &format!("/v1/acl/policy/{id}"), Some(&body)).map(drop)
    }

    /// Writes to its store.
    pub fn put_key(&self, path: &str, text: &str) -> Result<()> {
        let file = self.authority.file("value");
        fs::write(&file, text)?;
        let program = Program::new("curl").args(["-sS", "--fail", "--max-time", "10", "-X", "PUT", "--cacert"]);
        let program = program.arg(self.authority()).args(["-H", &format!("X-Consul-Token: {MANAGEMENT}")]);
        let program =
            program.args(["--data-binary", &format!("@{}", file.display())]).arg(format!("{}{path}", self.url()));
        self.host.run(&program)?.expect_success(&format!("PUT {path}"))?;
        Ok(())
    }

    /// SIGSTOP and SIGCONT, say.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.as_ref().context("Consul does not run")?.signal(signal)
    }

    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("Consul does not run")?.kill()
    }

    /// Starts it with what it had.
    pub fn resume(&mut self) -> Result<()> {
        let config = self.authority.file("config.json");
        let program = Program::new(&self.program).arg("agent").arg(format!("-config-file={}", config.display()));
        self.process = Some(self.host.spawn(&program)?);
        let leads = || self.manage("GET", "/v1/acl/token/self", None).is_ok();
        let said = || self.process.as_ref().map(Process::output).unwrap_or_default();
        until(READY, "a Consul that leads itself", leads).with_context(said)
    }

    /// Everything in it is lost, indexes and tokens included.
    pub fn restart_empty(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |mut process| process.kill())?;
        fs::remove_dir_all(self.authority.file("data"))?;
        self.resume()
    }

    fn config(&self) -> Value {
        let file = |name: &str| self.authority.file(name).display().to_string();
        json!({
            "server": true, "bootstrap_expect": 1, "node_name": "test", "datacenter": "dc1", "data_dir": file("data"),
            "bind_addr": self.host.address().to_string(), "client_addr": "0.0.0.0",
            "ports": { "http": -1, "https": PORT, "dns": -1, "grpc": -1, "grpc_tls": -1, "serf_wan": -1 },
            "tls": { "defaults": {
                "ca_file": file("ca.pem"), "cert_file": file("server.pem"), "key_file": file("server.key"),
                "verify_outgoing": true,
            } },
            "acl": { "enabled": true, "default_policy": "deny", "tokens": {
                // What an agent removes services from the catalog by.
                "initial_management": MANAGEMENT, "agent": MANAGEMENT,
            } },
            // Tests are many hosts at one address, and each query of a host is a connection: the default is 200.
            "limits": { "http_max_conns_per_client": 15_000 },
            "performance": { "raft_multiplier": 1 }, "disable_update_check": true, "log_level": "WARN",
        })
    }
}
