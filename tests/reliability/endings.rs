//! No certificate is forgotten: what listens shows one whose end somebody watches.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use meshd_identity::{SpiffeId, server_name};
use meshd_tests::command;
use meshd_tests::host::Host;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{MESH_PORT, PKI_PORT, Plan};
use meshd_tests::process::Program;

#[test]
fn every_listener_with_tls_shows_a_certificate_whose_end_is_watched() -> Result<()> {
    let mesh = Mesh::start(Plan::shop())?;
    let pki = mesh.pki_metrics()?.sum("meshd_pki_certificate_not_after_seconds", &[("kind", "endpoint")]) as u64;
    let shown = ends_shown(&mesh.host("pki"), &[None])?;
    ensure!(shown == [(PKI_PORT, pki)], "of the PKI end {shown:?}, watched is {pki}");
    let listed = ends_listed(&mesh)?;
    ensure!(listed.contains(&pki), "meshd-pki status lists {listed:?} and not {pki}");
    for name in ["web", "api-1", "api-2"] {
        let watched = ends_watched(&mesh, name)?;
        let mut identities: Vec<Option<SpiffeId>> = Vec::new();
        for id in watched.keys().filter(|id| !id.contains("meshd-system")) {
            identities.push(Some(id.parse()?));
        }
        let shown = ends_shown(&mesh.host(name), &identities)?;
        // Everything it serves is asked for by name, on the one port that speaks TLS.
        ensure!(shown.len() == identities.len(), "{name} shows {shown:?} for {identities:?}");
        for (port, end) in shown {
            ensure!(port == MESH_PORT, "{name} speaks TLS on {port}, which is not known to");
            ensure!(watched.values().any(|watched| *watched == end), "{name}: {end} is not among {watched:?}");
            ensure!(listed.contains(&end), "{name}: meshd-pki status lists {listed:?} and not {end}");
        }
    }
    Ok(())
}

/// Port and end of every certificate shown on a host, to who asks for these identities.
fn ends_shown(host: &Host, identities: &[Option<SpiffeId>]) -> Result<Vec<(u16, u64)>> {
    let text = host.command("ss", &["--tcp", "--listening", "--numeric", "--no-header"])?;
    let mut listening: Vec<(String, u16)> = Vec::new();
    for address in text.lines().filter_map(|line| line.split_whitespace().nth(3)) {
        let (on, port) = address.rsplit_once(':').context("not an address")?;
        let any = ["0.0.0.0", "[::]", "*"].contains(&on);
        listening.push((if any { "127.0.0.1" } else { on }.to_owned(), port.parse()?));
    }
    listening.sort();
    listening.dedup();
    let mut shown = Vec::new();
    for (on, port) in listening {
        for identity in identities {
            let end = end_of_certificate(host, &format!("{on}:{port}"), identity.as_ref())?;
            shown.extend(end.map(|end| (port, end)));
        }
    }
    Ok(shown)
}

/// In seconds since 1970; `None` where no TLS is spoken.
fn end_of_certificate(host: &Host, address: &str, identity: Option<&SpiffeId>) -> Result<Option<u64>> {
    let name = identity.map_or("-noservername".to_owned(), |id| format!("-servername {}", server_name(id)));
    let command = format!(
        "timeout 5 openssl s_client -connect {address} {name} </dev/null 2>/dev/null | \
         openssl x509 -noout -enddate 2>/dev/null"
    );
    let said = host.run(&Program::new("sh").args(["-c", &command]))?.stdout;
    let Some(end) = said.trim().strip_prefix("notAfter=") else { return Ok(None) };
    unix(end).map(Some)
}

/// Of any certificate, by `meshd-pki status`.
fn ends_listed(mesh: &Mesh) -> Result<BTreeSet<u64>> {
    let status = mesh.pki_status()?;
    let all = status["certificates"].as_array().context("no certificates")?;
    all.iter().map(|one| unix(one["not_after"].as_str().context("no end")?)).collect()
}

fn unix(time: &str) -> Result<u64> {
    let seconds = command::run("date", &["--utc", "--date", time, "+%s"])?;
    seconds.trim().parse().with_context(|| format!("not a time: {time}"))
}

/// By identity.
pub(crate) fn ends_watched(mesh: &Mesh, host: &str) -> Result<BTreeMap<String, u64>> {
    let text = mesh.daemon(host).metrics_text()?;
    let lines = text.lines().filter_map(|line| line.strip_prefix("identity_cert_expiration_timestamp_seconds{id=\""));
    let ends = lines.filter_map(|line| {
        let (id, value) = line.split_once("\"} ")?;
        Some((id.to_owned(), value.parse::<f64>().ok()? as u64))
    });
    Ok(ends.collect())
}
