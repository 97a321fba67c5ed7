//! A Kubernetes API server over an etcd of its own on a host: TLS, RBAC, tokens; controllers where asked for, no nodes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
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
    etcd: Process,
    authority: Authority,
    host: Host,
}

impl Cluster {
    pub fn start(host: &Host) -> Result<Self> {
        let authority = Authority::create(host, &directory_on(host))?;
        authority.issue("server", "/CN=kube-apiserver")?;
        authority.issue("admin", "/O=system:masters/CN=admin")?;
        let accounts = Program::new("openssl").args(["genrsa", "-out"]).arg(authority.file("accounts.key")).arg("2048");
        host.run(&accounts)?.expect_success("the key of service accounts")?;
        let etcd = start_etcd(host)?;
        let apiserver = start_apiserver(host)?;
        let mut cluster = Self { controllers: None, apiserver, etcd, authority, host: host.clone() };
        cluster.wait_ready()?;
        Ok(cluster)
    }

    fn wait_ready(&mut self) -> Result<()> {
        until(READY, "a ready API server", || self.get("/readyz").is_ok() || !self.apiserver.is_running())?;
        ensure!(self.apiserver.is_running(), "kube-apiserver ended:\n{}", self.apiserver.output());
        Ok(())
    }

    /// SIGSTOP and SIGCONT, say, for the API server.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.apiserver.signal(signal)
    }

    pub fn kill_apiserver(&mut self) -> Result<()> {
        self.apiserver.kill()
    }

    pub fn start_apiserver(&mut self) -> Result<()> {
        self.apiserver = start_apiserver(&self.host)?;
        self.wait_ready()
    }

    /// Everything in it is lost; the same addresses, certificates and keys. Controllers that ran run again.
    pub fn restart_empty(&mut self) -> Result<()> {
        let controllers = self.controllers.take().map(|mut process| process.kill()).transpose()?;
        self.apiserver.kill()?;
        self.etcd.kill()?;
        fs::remove_dir_all(directory_on(&self.host).join("etcd"))?;
        self.etcd = start_etcd(&self.host)?;
        self.start_apiserver()?;
        controllers.map_or(Ok(()), |()| self.start_controllers())
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
        fs::write(file("controllers.json"), config.to_string())?;
        let program = Program::new(servers::kube_controller_manager()?).args(["--leader-elect=false"]);
        // No kubelet says that a pod's node is there, and the pod is to stay.
        let without = "--controllers=*,-node-lifecycle-controller,-pod-garbage-collector-controller";
        let program = program.arg(without);
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

    /// Certificate and key of who may do everything.
    pub fn administrator(&self) -> (PathBuf, PathBuf) {
        (self.authority.file("admin.pem"), self.authority.file("admin.key"))
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

    /// The same for many, by one connection.
    pub fn create_all(&self, path: &str, documents: &[Value]) -> Result<()> {
        let requests = self.authority.file("requests");
        let file = |name: &str| self.authority.file(name).display().to_string();
        let request = |document: &Value| {
            format!(
                "url = {:?}\ncacert = {:?}\ncert = {:?}\nkey = {:?}\nheader = \"Content-Type: application/json\"\n\
                 data = {:?}\noutput = \"/dev/null\"\nfail\nsilent\nshow-error\n",
                format!("{}{path}", self.url()),
                file("ca.pem"),
                file("admin.pem"),
                file("admin.key"),
                document.to_string(),
            )
        };
        fs::write(&requests, documents.iter().map(request).collect::<Vec<_>>().join("next\n"))?;
        let program = Program::new("curl").args(["--fail-early", "--config"]).arg(&requests);
        self.host.run(&program)?.expect_success(path)?;
        Ok(())
    }

    /// Changes an object as an administrator: `PATCH`, which merges, or `DELETE`.
    pub fn change(&self, method: &str, path: &str, document: &Value) -> Result<()> {
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let kind = format!("Content-Type: {kind}");
        self.curl(&["-X", method, "-H", &kind, "-d", &document.to_string(), &format!("{}{path}", self.url())])?;
        Ok(())
    }

    /// What `kubectl apply` does with a file of new objects that have no status, as far as the kinds go that are known here.
    pub fn apply(&self, file: &Path) -> Result<()> {
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let is_comment = |document: &&str| document.lines().all(|line| line.is_empty() || line.starts_with('#'));
        for document in text.split("\n---\n").filter(|document| !is_comment(document)) {
            let field = |name: &str| {
                let line = document.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(": "));
                line.map(|text| text.trim_matches('"').to_owned())
                    .with_context(|| format!("{}: no {name} in\n{document}", file.display()))
            };
            let path = match field("kind")?.as_str() {
                "Namespace" => "/api/v1/namespaces".to_owned(),
                "ServiceAccount" => format!("/api/v1/namespaces/{}/serviceaccounts", field("namespace")?),
                "ClusterRole" => "/apis/rbac.authorization.k8s.io/v1/clusterroles".to_owned(),
                kind @ ("Role" | "RoleBinding") => {
                    let plural = format!("{}s", kind.to_lowercase());
                    format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{}/{plural}", field("namespace")?)
                }
                "ClusterRoleBinding" => "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings".to_owned(),
                "CustomResourceDefinition" => "/apis/apiextensions.k8s.io/v1/customresourcedefinitions".to_owned(),
                other => anyhow::bail!("{}: {other} is not known here", file.display()),
            };
            self.create_yaml(&path, document)?;
        }
        Ok(())
    }

    /// Creates what a document says as it is written.
    pub fn create_yaml(&self, path: &str, document: &str) -> Result<()> {
        let url = format!("{}{path}", self.url());
        self.curl(&["-H", "Content-Type: application/yaml", "--data-binary", document, &url])?;
        Ok(())
    }

    /// A pod as a kubelet would have made it: running, ready, with an address.
    pub fn run_pod(&self, namespace: &str, pod: &Value, address: &str) -> Result<()> {
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let made = self.create(&path, pod)?;
        let name = made["metadata"]["name"].as_str().context("a pod without name")?.to_owned();
        let status = json!({ "status": {
            "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }],
            "conditions": [{ "type": "Ready", "status": "True" }],
        } });
        self.change("PATCH", &format!("{path}/{name}/status"), &status)
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

fn start_apiserver(host: &Host) -> Result<Process> {
    host.spawn(&Program::new(servers::kube_apiserver()?).args(arguments(host)))
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
