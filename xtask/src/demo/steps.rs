//! The steps of a mesh in health.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use meshd_tests::access_log::AccessEvent;
use meshd_tests::capture::Capture;
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{self, MESH_PORT, PKI_PORT, Plan, ServicePlan};
use meshd_tests::process::Finished;
use meshd_tests::wait::until;

use super::show::Show;

const SOON: Duration = Duration::from_secs(5);
const PAYMENTS: &str = "http://payments.shop.mesh";
/// In a request, and so on no wire.
const SECRET: &str = "secret-order-4711";
pub(super) const SERVERS: [&str; 2] = ["api-1", "api-2"];

pub(super) fn build(show: &mut Show, lab: Arc<Lab>, plan: Plan) -> Result<Mesh> {
    show.step("Four hosts", "Network namespaces on one bridge: pki, web, api-1, api-2. web runs checkout and billing; the others payments and smtp.");
    if !lab.has_units() {
        show.output("cgroup v2 is not writable here: workloads are told apart by uid instead of by systemd unit");
    }
    show.command(
        "pki",
        "meshd-pki.service",
        "meshd-pki init --trust-domain demo.example; meshd-pki run; meshd-pki token create --host web ...",
    );
    let mut mesh = Mesh::prepare(lab, plan)?;
    mesh.start_pki()?;
    show.command("web, api-1, api-2", "meshd.service", "meshd join --token-file ...; meshd run");
    mesh.join_all()?;
    show.claim(true, "the PKI runs and three hosts joined with one-use tokens", String::new)?;
    Ok(mesh)
}

pub(super) fn request_by_name(show: &mut Show, mesh: &Mesh) -> Result<()> {
    show.step(
        "A request by name",
        "An unmodified curl asks for a name of the mesh; the answer comes from another host.",
    );
    show.command("web", "checkout.service", &format!("curl {PAYMENTS}/{SECRET}"));
    let answer = mesh.curl("web", "checkout", &[&format!("{PAYMENTS}/{SECRET}")])?;
    show.output(&said(&answer));
    show.claim(answer.stdout.starts_with("payments on api-"), "payments answered", || said(&answer))?;
    let address = mesh.virtual_address("web", "payments.shop.mesh")?;
    show.claim(address.octets()[0] == 240, &format!("the name stands for the virtual address {address}"), || {
        address.to_string()
    })
}

pub(super) fn two_identities(show: &mut Show, mesh: &Mesh) -> Result<()> {
    show.step(
        "Who the far side saw",
        "Two units of one host arrive with two identities. From the access logs of api-1 and api-2:",
    );
    show.command("web", "billing.service", &format!("curl {PAYMENTS}/"));
    let answer = mesh.curl("web", "billing", &[PAYMENTS])?;
    show.claim(answer.success(), "billing was answered too", || said(&answer))?;
    for unit in ["checkout", "billing"] {
        let identity = mesh.spiffe_id(unit);
        let seen = || events(mesh).into_iter().find(|event| event.client_id.as_ref() == Some(&identity));
        let arrived = until(SOON, "the access log", || seen().is_some());
        if let Some(event) = seen() {
            show.output(&format!("{} -> {}", identity, event.service.unwrap_or_default()));
        }
        show.claim(arrived.is_ok(), &format!("{unit} arrived as {identity}"), || format!("{:#?}", events(mesh)))?;
    }
    Ok(())
}

pub(super) fn server_speaks_first(show: &mut Show, mesh: &Mesh) -> Result<()> {
    show.step("Any TCP", "A server that speaks first; the client half-closes and is still answered.");
    show.command("web", "checkout.service", "talk to smtp.shop.mesh:25, say `hello`, half-close");
    let program = mesh.testkit("web", "checkout", &["talk", "--target", "smtp.shop.mesh:25", "--say", "hello"]);
    let answer = mesh.host("web").run(&program)?;
    show.output(&answer.stdout);
    let lines: Vec<&str> = answer.stdout.lines().collect();
    let in_order = matches!(lines[..], [first, "hello", last] if first.starts_with("220 ") && last.starts_with("221 "));
    show.claim(in_order, "greeting, echo and farewell came through", || said(&answer))
}

pub(super) fn only_tls_on_the_wire(show: &mut Show, capture: Capture) -> Result<()> {
    show.step("Only TLS on the wire", "Everything since the daemons started was captured on web's network card.");
    let pcap = capture.finish()?;
    let tls = pcap.tls_on(MESH_PORT);
    let summary = format!(
        "port {MESH_PORT}: {} TLS records, {} bytes, {} stream directions",
        tls.records, tls.bytes, tls.streams
    );
    show.output(&summary);
    show.claim(tls.foreign.is_empty() && tls.records > 0, "every byte between meshds is in a TLS record", || {
        tls.foreign.join("\n")
    })?;
    let others: Vec<_> =
        pcap.outside(&[MESH_PORT, PKI_PORT]).map(|stream| format!("{} -> {}", stream.from, stream.to)).collect();
    show.claim(others.is_empty(), "nothing crossed beside meshd and the PKI", || others.join("\n"))?;
    show.claim(!pcap.contains(SECRET.as_bytes()), "what curl asked for is nowhere in the capture", || SECRET.to_owned())
}

pub(super) fn not_enrolled(show: &mut Show, mesh: &Mesh) -> Result<()> {
    show.step("Not enrolled, not let in", "A process of another unit on the same host tries the same name.");
    show.command("web", "stray.service", &format!("curl {PAYMENTS}/"));
    let answer = mesh.curl("web", "stray", &[PAYMENTS])?;
    show.output(&said(&answer));
    show.claim(!answer.success() && answer.stdout.is_empty(), "it was refused", || said(&answer))?;
    let told = || mesh.daemon("web").log().lines().find(|line| line.contains("stray.service")).map(str::to_owned);
    let named = until(SOON, "the log line", || told().is_some());
    show.output(&told().unwrap_or_default());
    show.claim(named.is_ok(), "meshd's log says who it was and what to do", || mesh.daemon("web").log())
}

pub(super) fn strict_port(show: &mut Show, mesh: &Mesh) -> Result<()> {
    show.step("A strict port", "payments listens on every address of api-1, but only the mesh may call it.");
    let own = format!("http://{}:8080/", mesh.host("api-1").address());
    for (host, url) in [("api-1", "http://127.0.0.1:8080/"), ("api-1", &own), ("web", &own)] {
        show.command(host, "stray.service", &format!("curl {url}"));
        let answer = mesh.curl(host, "stray", &["--max-time", "3", url])?;
        show.claim(!answer.success() && answer.stdout.is_empty(), &format!("refused: {}", said(&answer)), || {
            said(&answer)
        })?;
    }
    let answer = mesh.curl("web", "checkout", &[PAYMENTS])?;
    show.claim(answer.success(), "through the mesh it answers as before", || said(&answer))
}

pub(super) fn unknown_target(show: &mut Show, mesh: &Mesh) -> Result<()> {
    show.step(
        "Not an open proxy",
        "web's files are wrong: they claim port 81 of payments too. The far meshd has no such service.",
    );
    let wrong = ServicePlan { ports: vec![80, 81], ..ServicePlan::new("payments", 80) };
    let document = plan::document(&wrong, &mesh.endpoints(&wrong));
    mesh.daemon("web").resource("payments.yaml", &document)?;
    let refused = || SERVERS.iter().map(|host| refused_as(mesh, host, "unknown_target")).sum::<f64>();
    let before = refused();
    show.command("web", "checkout.service", &format!("curl {PAYMENTS}:81/"));
    let url = format!("{PAYMENTS}:81/");
    let mut last = None;
    // The first tries may come before the files are read again, and are refused on this side.
    let counted = until(SOON, "a refusal", || {
        last = mesh.curl("web", "checkout", &["--max-time", "5", &url]).ok();
        refused() > before
    });
    let last = last.map(|answer| said(&answer)).unwrap_or_default();
    show.output(&last);
    show.claim(
        counted.is_ok(),
        "refused over there and counted: meshd_refused_total{error=\"unknown_target\"}",
        || last,
    )?;
    mesh.daemon("web")
        .resource("payments.yaml", &plan::document(&ServicePlan::new("payments", 80), &mesh.endpoints(&wrong)))
}

pub(super) fn status_and_edges(show: &mut Show, mesh: &Mesh) -> Result<()> {
    show.step("What an operator sees", "From web:");
    for verb in ["status", "edges"] {
        show.command("web", "root", &format!("meshd {verb}"));
        let answer = mesh.daemon("web").run(&[verb])?;
        show.output(&answer.stdout);
        let what = format!("`meshd {verb}` speaks of payments.shop");
        show.claim(answer.success() && answer.stdout.contains("payments"), &what, || said(&answer))?;
    }
    Ok(())
}

/// Refusals a host counted under this error.
fn refused_as(mesh: &Mesh, host: &str, error: &str) -> f64 {
    mesh.daemon(host).metrics().map_or(0.0, |metrics| metrics.sum("meshd_refused_total", &[("error", error)]))
}

fn events(mesh: &Mesh) -> Vec<AccessEvent> {
    let all = SERVERS.iter().flat_map(|host| mesh.daemon(host).access_log());
    all.filter(AccessEvent::is_inbound).collect()
}

pub(super) fn said(answer: &Finished) -> String {
    format!("{}{}", answer.stdout, answer.stderr).trim().to_owned()
}
