//! A probe as a page: one line per step, and at a failure what to do.

use meshd::admin::ProbeView;
use meshd::fault::Fault;

use super::inside::Event;
use super::{Report, Resolved};

pub(super) fn page(report: &Report) -> String {
    let mut lines = vec![format!("probe {} as {}", report.url, report.caller)];
    lines.push(line("who", &who(&report.known)));
    lines.push(line("resolve", &resolved(&report.resolved)));
    lines.push(line("service", &service(&report.known)));
    lines.extend(report.events.iter().map(event));
    lines.push(line("outcome", &outcome(report)));
    if let Some(advice) = advice(report) {
        lines.push(line("remedy", &advice));
    }
    lines.join("\n") + "\n"
}

fn line(step: &str, text: &str) -> String {
    format!("  {step:<9} {text}")
}

fn who(known: &ProbeView) -> String {
    let Some(identity) = &known.identity else { return "not enrolled".to_owned() };
    let by = known.enrolled_by.as_deref().unwrap_or_default();
    let certificate = match (known.certificate_expires_in_s, &known.pki_refusal) {
        (Some(left), _) if left > 0 => format!("certificate for {} min", left / 60),
        (Some(_), _) => "certificate EXPIRED".to_owned(),
        (None, Some(refusal)) => format!("no certificate: {refusal}"),
        (None, None) => "no certificate yet".to_owned(),
    };
    format!("{identity} by {by}, {certificate}")
}

fn resolved(resolved: &Resolved) -> String {
    let Resolved { address, us, system } = resolved;
    let system = match system.as_deref() {
        None => String::new(),
        Some([]) => "; the host's own resolver knows no such name: see [dns]".to_owned(),
        Some(others) => {
            let others: Vec<String> = others.iter().map(ToString::to_string).collect();
            format!("; the host's own resolver says {}: see [dns]", others.join(", "))
        }
    };
    format!("{address} ({}){system}", millis(*us))
}

fn service(known: &ProbeView) -> String {
    let Some(service) = &known.service else { return "none has this address: it is not captured".to_owned() };
    if !known.has_port {
        return format!("{service}, which has no such port");
    }
    let endpoints = known.endpoints.iter().map(|endpoint| {
        let zone = if endpoint.zone.is_empty() { String::new() } else { format!(" in {}", endpoint.zone) };
        format!(
            "\n            {} {} {}{zone}, {}",
            endpoint.dial, endpoint.transport, endpoint.identity, endpoint.health
        )
    });
    format!("{service}, {} endpoints{}", known.endpoints.len(), endpoints.collect::<String>())
}

fn event(event: &Event) -> String {
    match event {
        Event::Bound { port } => line("from", &format!("port {port}")),
        Event::Connected { us } => line("connect", &format!("done ({})", millis(*us))),
        Event::FirstByte { us } => line("answer", &format!("first byte after {}", millis(*us))),
        Event::Status { line: status } => line("", status),
        Event::Said { bytes, text } => line("", &format!("{bytes} bytes: {text}")),
        Event::Silent => line("answer", "the far side waits for us to speak: connected, that is all to see"),
        Event::Closed => line("answer", "the far side closed the connection without a word"),
        Event::Failed { step, error } => line(step, &format!("FAILED: {error}")),
    }
}

fn outcome(report: &Report) -> String {
    let Some(outcome) = &report.outcome else { return format!("{}; meshd had no part in it", report.result) };
    let at = outcome.endpoint.map(|endpoint| format!(" at {endpoint}")).unwrap_or_default();
    let far = outcome.server_id.as_deref().map(|id| format!(" ({id})")).unwrap_or_default();
    let meaning = Fault::from_label(&report.result).map(|fault| format!(": {}", fault.meaning().trim()));
    format!(
        "{}{}{at}{far}, {} bytes sent, {} received",
        report.result,
        meaning.unwrap_or_default(),
        outcome.bytes_sent,
        outcome.bytes_received
    )
}

fn advice(report: &Report) -> Option<String> {
    let known = &report.known;
    let advice = match Fault::from_label(&report.result)? {
        Fault::Unenrolled => match &known.identity {
            None => format!("meshd enrol {} --as ns/<namespace>/sa/<name>", selector(&report.caller)),
            Some(identity) => {
                let short = identity.split_once("/ns/").map_or(identity.clone(), |(_, rest)| format!("ns/{rest}"));
                format!("permit it at the PKI: meshd-pki entry add --host {} {short}", known.host_id)
            }
        },
        Fault::NoService => "give the service this port, or call one it has: meshd status".to_owned(),
        Fault::NoEndpoints => "no host serves it: see its document and the sources in meshd status".to_owned(),
        Fault::ConnectRefused | Fault::ConnectTimeout | Fault::TlsHandshake => {
            "see `meshd check` on the endpoint's host, and whether its port is reachable from here".to_owned()
        }
        Fault::UnknownTarget | Fault::Misdirected | Fault::IdentityMismatch => {
            "the endpoint's host does not serve it under this identity: `meshd enrol --list` there".to_owned()
        }
        Fault::Unfederated => {
            "see the trust domains in `meshd status` on both hosts, and `meshd-pki federation list`".to_owned()
        }
        Fault::Denied | Fault::Banned => "the far side's policy refuses this identity".to_owned(),
        _ => "see the logs of meshd on both hosts".to_owned(),
    };
    Some(advice)
}

fn selector(caller: &str) -> String {
    caller.strip_prefix("uid:").map_or_else(|| caller.to_owned(), |uid| format!("--uid {uid}"))
}

fn millis(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}
