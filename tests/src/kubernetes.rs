//! A Kubernetes API server over an etcd of its own on a host: TLS, RBAC, tokens; controllers where asked for, no nodes.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::authority::Authority;
use crate::host::Host;
use crate::process::{Process, Program};
use crate::servers;
use crate::wait::until;

/// Ports of the host's own namespace.
const PORT: u16 = 6443;
const ETCD_PORT: u16 = 2379;
const ETCD_PEER_PORT: u16 = 2380;
const READY: Duration = Duration::from_secs(60);
pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

// Fields drop in order: the API server first.
pub struct Cluster {
    controllers: Option<Process>,
    apiserver: Process,
    _etcd: Process,
    authority: Authority,
    host: Host,
}

impl Cluster {
    pub fn start(host: &Host) -> Result<Self> {
        let program = servers::kube_apiserver()?;
        let authority = Authority::create(host, &directory_on(host))?;
        authority.issue("server", "/CN=kube-apiserver")?;
        authority.issue("admin", "/O=system:masters/CN=admin")?;
        let accounts = Program::new("openssl").args(["genrsa", "-out"]).arg(authority.file("accounts.key")).arg("2048");
        host.run(&accounts)?.expect_success("the key of service accounts")?;
        let etcd = start_etcd(host)?;
        let apiserver = host.spawn(&Program::new(program).args(arguments(host)))?;
        let mut cluster = Self { controllers: None, apiserver, _etcd: etcd, authority, host: host.clone() };
        until(READY, "a ready API server", || cluster.get("/readyz").is_ok() || !cluster.apiserver.is_running())?;
        ensure!(cluster.apiserver.is_running(), "kube-apiserver ended:\n{}", cluster.apiserver.output());
        Ok(cluster)
    }

    /// What makes endpoint slices of services and pods, among others.
    pub fn start_controllers(&mut self) -> Result<()> {
        self.authority.issue("controllers", "/CN=system:kube-controller-manager")?;
        let file = |name: &str| self.authority.file(name);
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{ "name": "it", "cluster": {
                "server": self.url(), "certificate-authority": self.authority.certificate() } }],
            "users": [{ "name": "it", "user": {
                "client-certificate": file("controllers.pem"), "client-key": file("controllers.key") } }],
            "contexts": [{ "name": "it", "context": { "cluster": "it", "user": "it" } }],
        });
        std::fs::write(file("controllers.json"), config.to_string())?;
        let program = Program::new(servers::kube_controller_manager()?).args(["--leader-elect=false"]);
        let program = program.args(["--use-service-account-credentials", "--bind-address=127.0.0.1"]);
        let files = [
            ("--kubeconfig", "controllers.json"),
            ("--service-account-private-key-file", "accounts.key"),
            ("--root-ca-file", "ca.pem"),
            ("--cert-dir", "."),
        ];
        let program = files.iter().fold(program, |program, (option, name)| program.arg(option).arg(file(name)));
        self.controllers = Some(self.host.spawn(&program)?);
        Ok(())
    }

    /// What the controllers say, and whether they run.
    pub fn controllers(&mut self) -> Option<&mut Process> {
        self.controllers.as_mut()
    }

    /// `https://` and where it is, for its own host and others.
    pub fn url(&self) -> String {
        format!("https://{}:{PORT}", self.host.address())
    }

    /// Its authority, PEM.
    pub fn authority(&self) -> PathBuf {
        self.authority.certificate()
    }

    pub fn get(&self, path: &str) -> Result<String> {
        self.curl(&[&format!("{}{path}", self.url())])
    }

    /// Creates what the document says as an administrator; what the server made of it.
    pub fn create(&self, path: &str, document: &Value) -> Result<Value> {
        let url = format!("{}{path}", self.url());
        let answer = self.curl(&["-H", "Content-Type: application/json", "-d", &document.to_string(), &url])?;
        serde_json::from_str(&answer).with_context(|| format!("{path}: {answer}"))
    }

    pub fn create_service_account(&self, namespace: &str, name: &str) -> Result<()> {
        self.create("/api/v1/namespaces", &json!({ "metadata": { "name": namespace } }))?;
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
        self.create(&path, &json!({ "metadata": { "name": name } }))?;
        Ok(())
    }

    /// A pod of a service account, on a node that is only a name; its uid.
    pub fn create_pod(&self, namespace: &str, account: &str, name: &str, node: &str) -> Result<String> {
        self.create("/api/v1/nodes", &json!({ "metadata": { "name": node } }))?;
        let pod = json!({
            "metadata": { "name": name },
            "spec": {
                "serviceAccountName": account, "automountServiceAccountToken": false, "nodeName": node,
                "containers": [{ "name": "main", "image": "none" }],
            },
        });
        let made = self.create(&format!("/api/v1/namespaces/{namespace}/pods"), &pod)?;
        Ok(made["metadata"]["uid"].as_str().context("a pod without uid")?.to_owned())
    }

    /// What a kubelet would project: a token of an account for an audience, bound to a pod if one is given.
    pub fn token(&self, account: (&str, &str), audience: &str, pod: Option<(&str, &str)>) -> Result<String> {
        let bound = pod.map(|(name, uid)| json!({ "kind": "Pod", "apiVersion": "v1", "name": name, "uid": uid }));
        let request = json!({ "spec": { "audiences": [audience], "expirationSeconds": 600, "boundObjectRef": bound } });
        let path = format!("/api/v1/namespaces/{}/serviceaccounts/{}/token", account.0, account.1);
        let answer = self.create(&path, &request)?;
        Ok(answer["status"]["token"].as_str().with_context(|| format!("no token: {answer}"))?.to_owned())
    }

    /// As an administrator.
    fn curl(&self, args: &[&str]) -> Result<String> {
        let program = Program::new("curl").args(["-sS", "--fail-with-body", "--max-time", "10"]);
        let program = program.arg("--cacert").arg(self.authority());
        let program = program.arg("--cert").arg(self.authority.file("admin.pem"));
        let program = program.arg("--key").arg(self.authority.file("admin.key")).args(args);
        let finished = self.host.run(&program)?;
        ensure!(finished.success(), "{}: {}{}", args[args.len() - 1], finished.stderr, finished.stdout);
        Ok(finished.stdout)
    }
}

fn directory_on(host: &Host) -> PathBuf {
    host.directory().join("kubernetes")
}

fn start_etcd(host: &Host) -> Result<Process> {
    let clients = format!("http://127.0.0.1:{ETCD_PORT}");
    let peers = format!("http://127.0.0.1:{ETCD_PEER_PORT}");
    let program =
        Program::new(servers::etcd()?).args(["--name", "only", "--data-dir"]).arg(directory_on(host).join("etcd"));
    let program = program.args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
    let program = program.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
    host.spawn(&program.args(["--initial-cluster", &format!("only={peers}")]))
}

fn arguments(host: &Host) -> Vec<String> {
    let directory = directory_on(host);
    let file = |name: &str| directory.join(name).display().to_string();
    vec![
        format!("--etcd-servers=http://127.0.0.1:{ETCD_PORT}"),
        format!("--advertise-address={}", host.address()),
        // Otherwise it wants to tell others where it is, which is nowhere but here.
        "--endpoint-reconciler-type=none".to_owned(),
        format!("--secure-port={PORT}"),
        format!("--cert-dir={}", directory.display()),
        format!("--tls-cert-file={}", file("server.pem")),
        format!("--tls-private-key-file={}", file("server.key")),
        format!("--client-ca-file={}", file("ca.pem")),
        format!("--service-account-issuer={ISSUER}"),
        format!("--service-account-key-file={}", file("accounts.key")),
        format!("--service-account-signing-key-file={}", file("accounts.key")),
        "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
        "--authorization-mode=RBAC".to_owned(),
    ]
}
