//! Servers others wrote, as they are: Kubernetes' API server behind our PKI, etcd, Consul. Run by `cargo xtask test`; needs
//! root, and the servers or a Go toolchain.

mod applies;
mod bridge;
mod consul;
mod consul_agents;
mod controllers;
mod definitions;
mod etcd;
mod first_lookup;
mod from_consul;
mod from_etcd;
mod from_kubernetes;
mod istio;
mod registering;
mod registers_in_consul;
mod registers_in_etcd;
mod registers_in_kubernetes;
mod resources;
mod scale;
mod several;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::unix::fs::chown;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use meshd_tests::host::Host;
use meshd_tests::kubernetes::{Cluster, ISSUER};
use meshd_tests::lab::Lab;
use meshd_tests::mesh::{Mesh, PKI_UID};
use meshd_tests::plan::Plan;
use meshd_tests::process::Finished;
use meshd_tests::wait::{until, until_some};

const ACCOUNT: (&str, &str) = ("mesh", "meshd");
/// Where meshd answers questions for names.
const DNS: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 53));
const AUDIENCE: &str = "meshd-pki";
/// Longer than anything here takes: what it bounds is a failing test.
const DEADLINE: Duration = Duration::from_secs(30);

/// A mesh whose PKI takes tokens of the account's pods on the node `web`, and nobody joined.
struct Bed {
    mesh: Mesh,
    cluster: Cluster,
    pin: String,
    pod: (&'static str, String),
}

impl Bed {
    fn make() -> Result<Self> {
        Self::make_with(Plan::shop_with_one_server(), |_| String::new())
    }

    /// `more` of the file --attestors, for a PKI on that host.
    fn make_with(mut plan: Plan, more: impl FnOnce(&Host) -> String) -> Result<Self> {
        let lab = Arc::new(Lab::new(&plan.host_names())?);
        let directory = lab.host(&plan.pki_host).directory();
        let attestors = directory.join("attestors.toml");
        let reader = directory.join("reader.token");
        plan.pki_options = vec!["--attestors".to_owned(), attestors.display().to_string()];
        let mut mesh = Mesh::prepare(lab, plan)?;
        let cluster = Cluster::start(&mesh.pki_host())?;
        cluster.create_service_account(ACCOUNT.0, ACCOUNT.1)?;
        let pod = ("meshd-abcde", cluster.create_pod(ACCOUNT.0, ACCOUNT.1, "meshd-abcde", "web")?);
        // It does not show its keys to everybody, but to every account of its own.
        fs::write(&reader, cluster.token(ACCOUNT, ISSUER, None)?)?;
        let text = format!(
            "[[kubernetes]]\nname = \"prod\"\nissuer = \"{ISSUER}\"\njwks_url = \"{url}/openid/v1/jwks\"\n\
             ca_file = \"{authority}\"\nbearer_file = \"{reader}\"\n[[kubernetes.service_account]]\n\
             namespace = \"{namespace}\"\naccount = \"{account}\"\nhost = \"{{node}}\"\nallow = [\"ns/shop/sa/checkout\"]\n",
            url = cluster.url(),
            authority = cluster.authority().display(),
            reader = reader.display(),
            namespace = ACCOUNT.0,
            account = ACCOUNT.1,
        );
        fs::write(&attestors, text + &more(&mesh.pki_host()))?;
        for file in [&attestors, &reader] {
            chown(file, Some(PKI_UID), Some(PKI_UID))?;
        }
        mesh.start_pki()?;
        let pin = mesh.pki(&["pin", "--pki", &mesh.pki_address()])?;
        Ok(Self { mesh, cluster, pin, pod })
    }

    fn token(&self, audience: &str) -> Result<String> {
        self.cluster.token(ACCOUNT, audience, Some((self.pod.0, &self.pod.1)))
    }

    /// Once the PKI, which has just started, has the cluster's keys.
    fn join(&self, token: &str) -> Result<Finished> {
        until_some(DEADLINE, "the cluster's keys at the PKI", || {
            let joined = self.mesh.daemon("web").join_by(&[("--pki-pin", &self.pin), ("--k8s-token", token)]);
            Some(joined).filter(|joined| !joined.as_ref().is_ok_and(|it| it.stderr.contains("knows: none")))
        })?
    }
}

#[test]
fn a_host_joins_by_the_token_a_real_api_server_made_for_its_pod() -> Result<()> {
    let bed = Bed::make()?;
    bed.join(&bed.token(AUDIENCE)?)?.expect_success("joining by a token of Kubernetes")?;
    let hosts = bed.mesh.pki(&["host", "list"])?;
    ensure!(hosts.contains("web"), "the node is no host:\n{hosts}");
    let daemon = bed.mesh.daemon("web");
    daemon.start()?;
    until(DEADLINE, "checkout's identity", || {
        daemon.run(&["status"]).is_ok_and(|status| status.stdout.contains("ns/shop/sa/checkout"))
    })
}

#[test]
fn a_token_for_somebody_else_or_of_a_pod_without_node_is_refused_with_the_reason() -> Result<()> {
    let bed = Bed::make()?;
    let for_others = bed.join(&bed.token("vault")?)?;
    ensure!(
        !for_others.success() && for_others.stderr.contains("is for `vault`, not for `meshd-pki`"),
        "{for_others:?}"
    );
    let unbound = bed.join(&bed.cluster.token(ACCOUNT, AUDIENCE, None)?)?;
    ensure!(!unbound.success() && unbound.stderr.contains("node"), "{unbound:?}");
    Ok(())
}
