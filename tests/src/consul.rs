//! Consul servers on one host, and agents on others: servers by HTTPS only, agents by HTTP on loopback; nothing for whoever
//! shows no token.

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

/// Of the host's own namespace; of the first server, which has three.
const PORT: u16 = 8501;
/// Of an agent, where `kind = "consul"` looks for it.
const AGENT_PORT: u16 = 8500;
const MANAGEMENT: &str = "11111111-1111-1111-1111-111111111111";
const READY: Duration = Duration::from_secs(60);

pub struct Consul {
    servers: Vec<Option<Process>>,
    authority: Authority,
    program: PathBuf,
    host: Host,
}

/// A client of the cluster, beside the programs of a host. Ends with this.
pub struct Agent {
    process: Option<Process>,
    host: Host,
    program: PathBuf,
    config: PathBuf,
}

impl Consul {
    pub fn start(host: &Host) -> Result<Self> {
        Self::start_cluster(host, 1)
    }

    pub fn start_cluster(host: &Host, servers: usize) -> Result<Self> {
        let authority = Authority::create(host, &host.directory().join("consul"))?;
        authority.issue("server", "/CN=server.dc1.consul")?;
        let servers = (0..servers).map(|_| None).collect();
        let mut consul = Self { servers, authority, program: servers::consul()?, host: host.clone() };
        consul.resume()?;
        Ok(consul)
    }

    /// Of the first server, reachable from other hosts, too.
    pub fn url(&self) -> String {
        self.url_of(0)
    }

    fn url_of(&self, server: usize) -> String {
        format!("https://{}:{}", self.host.address(), port(server, 0))
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
        // Whichever runs: it asks the leader.
        let server = self.servers.iter().position(Option::is_some).unwrap_or_default();
        let finished = self.host.run(&program.arg(format!("{}{path}", self.url_of(server))))?;
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
        self.servers.iter().flatten().try_for_each(|server| server.signal(signal))
    }

    pub fn kill(&mut self) -> Result<()> {
        (0..self.servers.len()).try_for_each(|server| self.kill_server(server))
    }

    pub fn kill_server(&mut self, server: usize) -> Result<()> {
        self.servers[server].take().context("this server does not run")?.kill()
    }

    /// Starts it with what it had.
    pub fn resume(&mut self) -> Result<()> {
        (0..self.servers.len()).try_for_each(|server| self.start_server(server))?;
        let leads = || self.manage("GET", "/v1/acl/token/self", None).is_ok();
        until(READY, "a Consul with a leader", leads).with_context(|| self.output())
    }

    pub fn start_server(&mut self, server: usize) -> Result<()> {
        let config = self.authority.file(&format!("server-{server}.json"));
        fs::write(&config, self.config(server).to_string())?;
        let program = Program::new(&self.program).arg("agent").arg(format!("-config-file={}", config.display()));
        self.servers[server] = Some(self.host.spawn(&program)?);
        Ok(())
    }

    /// The server that leads now.
    pub fn leader(&self) -> Result<usize> {
        let leader = self.manage("GET", "/v1/status/leader", None)?;
        let leads = |server: &usize| leader.as_str() == Some(&format!("{}:{}", self.host.address(), port(*server, 1)));
        (0..self.servers.len()).find(leads).with_context(|| format!("no server leads: {leader}"))
    }

    /// Everything in it is lost, indexes and tokens included.
    pub fn restart_empty(&mut self) -> Result<()> {
        for server in 0..self.servers.len() {
            self.servers[server].take().map_or(Ok(()), |mut process| process.kill())?;
            fs::remove_dir_all(self.data(server))?;
        }
        self.resume()
    }

    /// An agent on a host, which joins these servers.
    pub fn start_agent(&self, host: &Host) -> Result<Agent> {
        let config = host.directory().join("consul-agent.json");
        let data = host.directory().join("consul-agent");
        let text = json!({
            "server": false, "node_name": host.name(), "datacenter": "dc1", "data_dir": data,
            "bind_addr": host.address().to_string(), "client_addr": "127.0.0.1",
            "ports": { "http": AGENT_PORT, "dns": -1, "grpc": -1, "grpc_tls": -1 },
            "tls": { "defaults": { "ca_file": self.authority(), "verify_outgoing": true } },
            "acl": { "enabled": true, "default_policy": "deny", "tokens": { "agent": MANAGEMENT } },
            "retry_join": self.gossip(), "retry_interval": "1s", "disable_update_check": true, "log_level": "WARN",
        });
        fs::write(&config, text.to_string())?;
        let mut agent = Agent { process: None, host: host.clone(), program: self.program.clone(), config };
        agent.resume()?;
        let is_member = || self.manage("GET", &format!("/v1/health/node/{}", host.name()), None).is_ok_and(passes);
        until(READY, "an agent that its servers know", is_member).with_context(|| agent.output())?;
        Ok(agent)
    }

    /// What the running servers said.
    fn output(&self) -> String {
        self.servers.iter().flatten().map(Process::output).collect()
    }

    fn data(&self, server: usize) -> PathBuf {
        self.authority.file(&format!("data-{server}"))
    }

    /// Where each of them gossips.
    fn gossip(&self) -> Vec<String> {
        (0..self.servers.len()).map(|server| format!("{}:{}", self.host.address(), port(server, 2))).collect()
    }

    fn config(&self, server: usize) -> Value {
        let file = |name: &str| self.authority.file(name).display().to_string();
        json!({
            "server": true, "bootstrap_expect": self.servers.len(), "node_name": format!("server-{server}"),
            "datacenter": "dc1", "data_dir": self.data(server), "retry_join": self.gossip(), "retry_interval": "1s",
            "bind_addr": self.host.address().to_string(), "client_addr": "0.0.0.0",
            "ports": { "http": -1, "https": port(server, 0), "server": port(server, 1), "serf_lan": port(server, 2),
                       "dns": -1, "grpc": -1, "grpc_tls": -1, "serf_wan": -1 },
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

/// HTTPS, its own RPC, and gossip.
fn port(server: usize, which: u16) -> u16 {
    PORT + 10 * server as u16 + which
}

/// What the health endpoint says of a node.
fn passes(checks: Value) -> bool {
    checks.as_array().is_some_and(|all| !all.is_empty() && all.iter().all(|check| check["Status"] == "passing"))
}

impl Agent {
    /// As with its machine, or a crash: it says nothing to anybody.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("the agent does not run")?.kill()
    }

    /// Starts it with what it had.
    pub fn resume(&mut self) -> Result<()> {
        let program = Program::new(&self.program).arg("agent").arg(format!("-config-file={}", self.config.display()));
        self.process = Some(self.host.spawn(&program)?);
        Ok(())
    }

    fn output(&self) -> String {
        self.process.as_ref().map(Process::output).unwrap_or_default()
    }
}
