//! Envoy as server and as client of mutual TLS, with nothing but the secrets of our socket.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd_tests::http;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::{Finished, Process, Program};
use meshd_tests::python;
use meshd_tests::wait::until;

use crate::{DEADLINE, pypi};

/// Two lives of a leaf and what they wait for.
const ROTATION: Duration = Duration::from_secs(120);
const TLS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3";

/// An Envoy in a unit of a host, passing on what it accepts.
pub(crate) struct Sidecar<'a> {
    pub(crate) host: &'a str,
    pub(crate) unit: &'a str,
    pub(crate) listen: (Ipv4Addr, u16),
    pub(crate) far: (Ipv4Addr, u16),
    pub(crate) admin: u16,
    pub(crate) side: Side,
}

/// Whose certificate it believes at the far end of its TLS, which is before or behind it: Envoy's matcher of their names.
pub(crate) enum Side {
    Server { client: String, roots: Roots },
    Client { server: String, roots: Roots },
}

/// Where it has its roots from: a secret of our socket, or a file that nobody keeps up to date.
#[derive(Clone)]
pub(crate) enum Roots {
    Secret(&'static str),
    File(PathBuf),
}

impl Sidecar<'_> {
    pub(crate) fn start(&self, mesh: &Mesh) -> Result<Process> {
        let (listener, cluster) = match &self.side {
            Side::Server { client, roots } => {
                (tls("DownstreamTlsContext", client, roots, ", require_client_certificate: true"), String::new())
            }
            Side::Client { server, roots } => (String::new(), tls("UpstreamTlsContext", server, roots, "")),
        };
        let config = include_str!("envoy.yaml")
            .replace("@ADMIN@", &self.admin.to_string())
            .replace("@LISTEN@", &self.listen.0.to_string())
            .replace("@PORT@", &self.listen.1.to_string())
            .replace("@FAR@", &self.far.0.to_string())
            .replace("@FAR_PORT@", &self.far.1.to_string())
            .replace("@SOCKET@", &mesh.daemon(self.host).api_socket().display().to_string())
            .replace("@LISTENER@", &listener)
            .replace("@CLUSTER@", &cluster);
        let host = mesh.host(self.host);
        let path = host.directory().join(format!("envoy-{}.yaml", self.unit));
        fs::write(&path, config)?;
        let program = Program::new(python::envoy(&python::environment()?)?);
        let program = program.args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning", "-c"]);
        let mut envoy = host.spawn(&mesh.in_unit(self.host, self.unit, program.arg(path)))?;
        let (Side::Server { roots, .. } | Side::Client { roots, .. }) = &self.side;
        let wanted = if matches!(roots, Roots::Secret(_)) { 2 } else { 1 };
        let secrets = || self.stat(mesh, "update_success").is_ok_and(|count| count >= wanted);
        until(DEADLINE, "the secrets of an Envoy", || secrets() || !envoy.is_running())?;
        ensure!(envoy.is_running(), "Envoy ended:\n{}", envoy.output());
        Ok(envoy)
    }

    /// The sum of all counters of secrets, or of TLS, whose name ends so.
    pub(crate) fn stat(&self, mesh: &Mesh, name: &str) -> Result<u64> {
        let admin = SocketAddr::from(([127, 0, 0, 1], self.admin));
        let (_, stats) = mesh.host(self.host).within(|| http::get(admin, "/stats"))??;
        let ours = stats.lines().filter(|line| line.contains("sds.") || line.contains(".ssl."));
        let values = ours.filter_map(|line| line.split_once(": ")).filter(|(key, _)| key.ends_with(name));
        values.map(|(_, value)| value.trim().parse::<u64>().context("not a count")).sum()
    }
}

pub(crate) fn exactly(id: &str) -> String {
    format!("exact: \"{id}\"")
}

fn tls(context: &str, peer: &str, roots: &Roots, more: &str) -> String {
    let sds = "{ resource_api_version: V3, api_config_source: { api_type: GRPC, transport_api_version: V3, \
               grpc_services: [{ envoy_grpc: { cluster_name: meshd } }] } }";
    let names = format!("match_typed_subject_alt_names: [{{ san_type: URI, matcher: {{ {peer} }} }}]");
    let believed = match roots {
        Roots::Secret(name) => format!(
            "combined_validation_context: {{ default_validation_context: {{ {names} }}, \
             validation_context_sds_secret_config: {{ name: \"{name}\", sds_config: {sds} }} }}"
        ),
        Roots::File(path) => {
            format!("validation_context: {{ trusted_ca: {{ filename: \"{}\" }}, {names} }}", path.display())
        }
    };
    format!(
        "transport_socket: {{ name: envoy.transport_sockets.tls, typed_config: {{ \"@type\": {TLS}.{context}, \
         common_tls_context: {{ tls_certificate_sds_secret_configs: [{{ name: default, sds_config: {sds} }}], \
         {believed} }}{more} }} }}"
    )
}

fn server(mesh: &Mesh) -> Sidecar<'static> {
    server_with(mesh, Roots::Secret("ROOTCA"))
}

pub(crate) fn server_with(mesh: &Mesh, roots: Roots) -> Sidecar<'static> {
    Sidecar {
        host: "api-1",
        unit: "payments",
        listen: (Ipv4Addr::UNSPECIFIED, 9443),
        far: (Ipv4Addr::LOCALHOST, 8080),
        admin: 9901,
        side: Side::Server { client: exactly(&mesh.spiffe_id("checkout")), roots },
    }
}

fn client(mesh: &Mesh, unit: &'static str, port: u16, admin: u16) -> Sidecar<'static> {
    client_with(mesh, unit, (port, admin), Roots::Secret("ALL"))
}

pub(crate) fn client_with(
    mesh: &Mesh,
    unit: &'static str,
    (port, admin): (u16, u16),
    roots: Roots,
) -> Sidecar<'static> {
    let side = Side::Client { server: exactly(&mesh.spiffe_id("payments")), roots };
    let far = (mesh.host("api-1").address(), 9443);
    Sidecar { host: "web", unit, listen: (Ipv4Addr::LOCALHOST, port), far, admin, side }
}

/// One request through openssl from a host.
pub(crate) fn call(mesh: &Mesh, host: &str, to: SocketAddr, options: &str) -> Result<Finished> {
    let request = "printf 'GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n'";
    let openssl = format!("{request} | openssl s_client -quiet -connect {to} {options}");
    mesh.host(host).run(&Program::new("sh").args(["-c", &openssl]))
}

pub(crate) fn ask(mesh: &Mesh, port: u16) -> Result<String> {
    let url = format!("http://127.0.0.1:{port}/");
    Ok(mesh.curl("web", "stray", &["--max-time", "5", &url])?.stdout)
}

#[test]
fn two_envoys_speak_mutual_tls_across_renewals_and_only_with_whom_they_should() -> Result<()> {
    let mesh = Mesh::start(Plan { leaf_ttl: Some("20"), ..Plan::shop_with_one_server() })?;
    let (server, checkout, billing) =
        (server(&mesh), client(&mesh, "checkout", 10000, 9901), client(&mesh, "billing", 10001, 9902));
    let _running = [server.start(&mesh)?, checkout.start(&mesh)?, billing.start(&mesh)?];
    ensure!(ask(&mesh, 10000)?.starts_with("payments on api-1"), "checkout's Envoy is not served");
    ensure!(ask(&mesh, 10001)?.is_empty(), "billing's Envoy is served");
    ensure!(server.stat(&mesh, "fail_verify_san")? >= 1, "billing was not refused for its name");

    let renewed = |envoy: &Sidecar<'_>| envoy.stat(&mesh, "default.update_success").is_ok_and(|count| count >= 3);
    let mut answers = 0;
    until(DEADLINE, "two renewals at both ends", || {
        // One connection each: every answer is a handshake with what is in force now.
        let answered = ask(&mesh, 10000).is_ok_and(|body| body.starts_with("payments on api-1"));
        answers = if answered { answers + 1 } else { 0 };
        !answered || renewed(&server) && renewed(&checkout)
    })?;
    ensure!(answers > 1, "a connection failed around a renewal");
    Ok(())
}

#[test]
fn envoys_follow_the_root_from_one_to_the_next() -> Result<()> {
    let mesh = Mesh::start(Plan { rehearse: Some("10s"), ..Plan::shop_with_one_server() })?;
    let (server, checkout) = (server(&mesh), client(&mesh, "checkout", 10000, 9901));
    let _running = [server.start(&mesh)?, checkout.start(&mesh)?];
    let signs = || {
        let status = mesh.pki_status().ok()?;
        let roots = status["authorities"].as_array()?.iter();
        let mut active = roots.filter(|one| one["kind"] == "root" && one["state"] == "active");
        active.next()?["id"].as_str().map(str::to_owned)
    };
    let first = signs().context("no active root")?;
    let updates = || checkout.stat(&mesh, "ALL.update_success").unwrap_or(0);
    let mut since = None;
    until(ROTATION, "the next root, and every certificate under it", || {
        let answered = ask(&mesh, 10000).is_ok_and(|body| body.starts_with("payments on api-1"));
        if since.is_none() && signs().is_some_and(|id| id != first) {
            since = Some(updates());
        }
        // The root before leaves the bundle after every certificate under it has ended.
        !answered || since.is_some_and(|since| updates() > since)
    })?;
    ensure!(ask(&mesh, 10000)?.starts_with("payments on api-1"), "an Envoy lost its peer while roots were replaced");
    Ok(())
}

#[test]
fn openssl_with_what_pypis_client_saved_is_served_by_envoy_and_without_it_is_not() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let _running = server(&mesh).start(&mesh)?;
    let (fetched, directory) = pypi::fetch(&mesh, "web", "checkout")?;
    fetched.expect_success("fetching checkout's identity")?;
    let file = |name: &str| directory.join(name).display().to_string();
    let (chain, key, roots) = (file("chain.pem"), file("key.pem"), file("roots.pem"));
    let verified = format!("-verify_return_error -CAfile {roots}");
    let call = |certificate: &str| {
        call(&mesh, "web", (mesh.host("api-1").address(), 9443).into(), &format!("{verified} {certificate}"))
    };
    let served = call(&format!("-cert_chain {chain} -cert {chain} -key {key}"))?;
    ensure!(served.stdout.contains("payments on api-1"), "{served:?}");
    let nobody = call("")?;
    ensure!(!nobody.stdout.contains("payments on api-1"), "{nobody:?}");
    Ok(())
}
