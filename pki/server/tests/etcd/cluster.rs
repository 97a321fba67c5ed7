//! A real etcd cluster on loopback: three members, TLS with client certificates, and auth by them.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use meshd_pki::store::etcd::config::EtcdConfig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};

const MEMBERS: usize = 3;
/// Far more than an election takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Cluster {
    dir: PathBuf,
    /// (clients, peers)
    ports: Vec<(u16, u16)>,
    members: Vec<Option<Child>>,
    quota: Option<u64>,
}

/// A free port, held until all are drawn.
fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<TcpListener> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    held.iter().map(|one| one.local_addr().unwrap().port()).collect()
}

/// Waits for something that announces itself nowhere.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    let clock = std::sync::Condvar::new();
    let ticks = std::sync::Mutex::new(());
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        drop(clock.wait_timeout(ticks.lock().unwrap(), Duration::from_millis(20)).unwrap());
    }
}

impl Cluster {
    pub(crate) fn start(dir: &Path) -> Cluster {
        Cluster::start_with(dir, None)
    }

    pub(crate) fn start_with(dir: &Path, quota: Option<u64>) -> Cluster {
        let dir = dir.join("etcd");
        fs::create_dir(&dir).unwrap();
        certificates(&dir);
        let ports = free_ports(2 * MEMBERS);
        let ports = ports.chunks(2).map(|pair| (pair[0], pair[1])).collect();
        let mut cluster = Cluster { dir, ports, members: (0..MEMBERS).map(|_| None).collect(), quota };
        (0..MEMBERS).for_each(|n| cluster.start_member(n));
        cluster.healthy();
        for command in [
            "user add root --no-password",
            "user grant-role root root",
            "role add meshd",
            "role grant-permission meshd readwrite --prefix=true /meshd/pki/",
            "user add meshd --no-password",
            "user grant-role meshd meshd",
            "user add typed:secret",
            "user grant-role typed meshd",
            "auth enable",
        ] {
            cluster.must(&command.split(' ').collect::<Vec<_>>());
        }
        cluster
    }

    pub(crate) fn start_member(&mut self, n: usize) {
        let (client, peer) = self.ports[n];
        let url = |port: u16| format!("https://127.0.0.1:{port}");
        let all: Vec<String> =
            self.ports.iter().enumerate().map(|(n, (_, peer))| format!("e{n}={}", url(*peer))).collect();
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join(format!("e{n}.log"))).unwrap();
        let file = |name: &str| self.dir.join(name).to_str().unwrap().to_owned();
        let mut command = Command::new("etcd");
        command
            .args(["--name", &format!("e{n}"), "--data-dir", &file(&format!("e{n}"))])
            .args(["--listen-client-urls", &url(client), "--advertise-client-urls", &url(client)])
            .args(["--listen-peer-urls", &url(peer), "--initial-advertise-peer-urls", &url(peer)])
            .args(["--initial-cluster", &all.join(","), "--initial-cluster-token", "test"])
            .args(["--client-cert-auth", "--peer-client-cert-auth"])
            .args(["--trusted-ca-file", &file("ca.pem"), "--cert-file", &file("server.pem")])
            .args(["--key-file", &file("server.key"), "--peer-trusted-ca-file", &file("ca.pem")])
            .args(["--peer-cert-file", &file("server.pem"), "--peer-key-file", &file("server.key")])
            .args(["--unsafe-no-fsync", "--logger", "zap"])
            .stdout(Stdio::null())
            .stderr(log);
        if let Some(quota) = self.quota {
            command.arg(format!("--quota-backend-bytes={quota}"));
        }
        let child = command.spawn().expect("the etcd program is installed (Debian package etcd-server)");
        self.members[n] = Some(child);
    }

    pub(crate) fn kill_member(&mut self, n: usize) {
        let mut member = self.members[n].take().expect("it runs");
        member.kill().unwrap();
        member.wait().unwrap();
    }

    /// Its disk is lost.
    pub(crate) fn forget_member(&self, n: usize) {
        fs::remove_dir_all(self.dir.join(format!("e{n}"))).unwrap();
    }

    pub(crate) fn signal_member(&self, n: usize, signal: Signal) {
        let pid = self.members[n].as_ref().expect("it runs").id();
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
    }

    pub(crate) fn healthy(&self) {
        until("etcd is healthy", || self.root(&["endpoint", "health"]).status.success());
    }

    /// The member that leads etcd's own consensus.
    pub(crate) fn leader(&self) -> usize {
        let status = self.must(&["endpoint", "status", "-w", "json"]);
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let leads = |one: &serde_json::Value| one["Status"]["leader"] == one["Status"]["header"]["member_id"];
        let leader = status.as_array().unwrap().iter().find(|one| leads(one)).unwrap();
        let endpoint = leader["Endpoint"].as_str().unwrap();
        (0..MEMBERS).find(|n| endpoint == self.endpoints()[*n]).unwrap()
    }

    pub(crate) fn endpoints(&self) -> Vec<String> {
        self.ports.iter().map(|(client, _)| format!("https://127.0.0.1:{client}")).collect()
    }

    /// etcdctl as root, on the members that run.
    pub(crate) fn root(&self, arguments: &[&str]) -> Output {
        let running = self.endpoints().into_iter().zip(&self.members).filter(|(_, member)| member.is_some());
        let endpoints: Vec<String> = running.map(|(endpoint, _)| endpoint).collect();
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &endpoints.join(",")]);
        for (option, file) in [("--cacert", "ca.pem"), ("--cert", "root.pem"), ("--key", "root.key")] {
            command.arg(option).arg(self.dir.join(file));
        }
        command.args(arguments).output().expect("the etcdctl program is installed (Debian package etcd-client)")
    }

    pub(crate) fn must(&self, arguments: &[&str]) -> String {
        let output = self.root(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn config(&self) -> EtcdConfig {
        EtcdConfig {
            replica: String::new(),
            trust_domain: String::new(),
            endpoints: self.endpoints(),
            ca: Some(self.dir.join("ca.pem")),
            cert: Some(self.dir.join("meshd.pem")),
            key: Some(self.dir.join("meshd.key")),
            user: None,
            password_file: None,
            // Short, but not too short for a busy machine.
            lease_s: 4,
        }
    }

    /// Admitted by name and password; the certificate alone would be refused.
    pub(crate) fn config_by_password(&self) -> EtcdConfig {
        let password = self.dir.join("password");
        fs::write(&password, "secret\n").unwrap();
        EtcdConfig {
            cert: Some(self.dir.join("stranger.pem")),
            key: Some(self.dir.join("stranger.key")),
            user: Some("typed".to_owned()),
            password_file: Some(password),
            ..self.config()
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for mut member in self.members.drain(..).flatten() {
            _ = member.kill();
            _ = member.wait();
        }
    }
}

/// The common name of a client's certificate is its user.
fn certificates(dir: &Path) {
    let write = |name: &str, text: String| fs::write(dir.join(name), text).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "etcd ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    write("ca.pem", ca.pem());
    for name in ["server", "root", "meshd", "stranger"] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::IpAddress("127.0.0.1".parse().unwrap()));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        write(&format!("{name}.pem"), params.signed_by(&key, &ca).unwrap().pem());
        write(&format!("{name}.key"), key.serialize_pem());
    }
}
