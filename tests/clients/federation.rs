//! An Envoy whose mesh has dealings with two others: it verifies each peer under the roots of the trust domain it names.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{HostPlan, Plan, Workload};
use meshd_tests::wait::until;

use crate::envoy::{Roots, Side, Sidecar, call, exactly};
use crate::{DEADLINE, pypi};

const OURS: &str = "ours.example";
const PORT: u16 = 9443;

/// One host with one unit in a trust domain and a PKI of its own.
fn prepare(lab: &Arc<Lab>, plan: &Plan) -> Result<Mesh> {
    let mut mesh = Mesh::prepare(lab.clone(), plan.clone())?;
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.start_all()?;
    Ok(mesh)
}

fn plan(domain: &str, host: &str, workload: Workload) -> Plan {
    Plan {
        trust_domain: domain.to_owned(),
        pki_host: format!("pki-{host}"),
        hosts: vec![HostPlan { name: host.to_owned(), workloads: vec![workload] }],
        services: Vec::new(),
        ..Plan::shop()
    }
}

/// `mesh` believes identities of the other from now on.
fn follow(mesh: &Mesh, other: &Mesh, domain: &str) -> Result<()> {
    let url = format!("https://{}/.well-known/spiffe-bundle", other.pki_address());
    let bundle = other.pki_host().command("curl", &["--silent", "--fail", "--insecure", &url])?;
    let file = mesh.pki_directory().join(format!("{domain}.jwks"));
    fs::write(&file, bundle)?;
    let (file, identity) = (file.display().to_string(), format!("spiffe://{domain}/ns/meshd-system/sa/pki"));
    let profile = ["--profile", "https_spiffe", "--spiffe-id", &identity, "--bundle", &file];
    let add = ["federation", "add", "--trust-domain", domain, "--url", &url, "--for", "*"];
    mesh.pki(&[&add[..], &profile].concat())?;
    Ok(())
}

/// Whether our Envoy lets in the checkout of a mesh, as openssl shows it what PyPI's client fetched.
fn is_served(mesh: &Mesh, host: &str, to: SocketAddr) -> Result<bool> {
    let (fetched, directory) = pypi::fetch(mesh, host, "checkout")?;
    fetched.expect_success("fetching checkout's identity")?;
    let (chain, key) = (directory.join("chain.pem"), directory.join("key.pem"));
    let (chain, key) = (chain.display(), key.display());
    let answered = call(mesh, host, to, &format!("-cert_chain {chain} -cert {chain} -key {key}"))?;
    Ok(answered.stdout.contains("payments on ours"))
}

#[test]
fn an_envoy_lets_in_peers_of_both_federated_trust_domains_and_of_no_third() -> Result<()> {
    let checkout = || Workload::client("checkout", 2003);
    let ours = plan(OURS, "ours", Workload::payments());
    let [first, second, third] =
        ["first", "second", "third"].map(|name| plan(&format!("{name}.example"), name, checkout()));
    let all = [&ours, &first, &second, &third];
    let lab = Arc::new(Lab::new(&all.map(Plan::host_names).concat())?);
    let [ours, first, second, third] = all.map(|plan| prepare(&lab, plan));
    let (ours, first, second, third) = (ours?, first?, second?, third?);
    follow(&ours, &first, "first.example")?;
    follow(&ours, &second, "second.example")?;
    follow(&first, &ours, OURS)?;

    // Checkout of any trust domain has the name asked for: only roots tell them apart.
    let side = Side::Server { client: "suffix: \"/ns/shop/sa/checkout\"".to_owned(), roots: Roots::Secret("ALL") };
    let listen = (Ipv4Addr::UNSPECIFIED, PORT);
    let far = (Ipv4Addr::LOCALHOST, 8080);
    let server = Sidecar { host: "ours", unit: "payments", listen, far, admin: 9901, side };
    let _server = server.start(&ours)?;
    let to = SocketAddr::from((ours.host("ours").address(), PORT));
    until(DEADLINE, "a peer of the first trust domain", || is_served(&first, "first", to).is_ok_and(|served| served))?;
    until(DEADLINE, "a peer of the second", || is_served(&second, "second", to).is_ok_and(|served| served))?;
    let unverified = || server.stat(&ours, "fail_verify_error");
    let before = unverified()?;
    ensure!(!is_served(&third, "third", to)?, "a peer of a trust domain nobody federated is served");
    ensure!(unverified()? == before + 1, "it was not refused for its certificate");

    let side =
        Side::Client { server: exactly(&format!("spiffe://{OURS}/ns/shop/sa/payments")), roots: Roots::Secret("ALL") };
    let listen = (Ipv4Addr::LOCALHOST, 10000);
    let far = (ours.host("ours").address(), PORT);
    let client = Sidecar { host: "first", unit: "checkout", listen, far, admin: 9901, side };
    let _client = client.start(&first)?;
    let ask = || first.curl("first", "stray", &["--max-time", "5", "http://127.0.0.1:10000/"]);
    until(DEADLINE, "Envoy to reach Envoy across trust domains", || {
        ask().is_ok_and(|answer| answer.stdout.contains("payments on ours"))
    })
    .with_context(|| ours.daemon("ours").log())?;

    ours.pki(&["federation", "remove", "--trust-domain", "second.example"])?;
    until(DEADLINE, "the second trust domain to be shut out", || {
        is_served(&second, "second", to).is_ok_and(|served| !served)
    })?;
    ensure!(is_served(&first, "first", to)?, "the first trust domain was shut out, too");
    Ok(())
}
