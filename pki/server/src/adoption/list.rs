//! What a list says is judged before anything of it is taken over: it has been in other hands.

use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, ensure};
use meshd_identity::{SpiffeId, TrustDomain, root_id};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::commands::workload;
use crate::keeping::roster::{KnownRoot, Roster, SCHEMA};
use crate::lifetimes::Lifetimes;
use crate::times::{rfc3339, seconds, unix, unix_ms};

/// Reads a list, with of its roots those only under which a certificate can be valid still.
pub(super) fn read(path: &Path, text: &[u8], ours: &TrustDomain, now: SystemTime) -> anyhow::Result<Roster> {
    let named = || path.display();
    let mut roster: Roster =
        serde_json::from_slice(text).with_context(|| format!("{} is no hosts.json of meshd-pki", named()))?;
    ensure!(roster.schema == SCHEMA, "it has schema {}, this meshd-pki reads {SCHEMA}", roster.schema);
    let theirs = &roster.trust_domain;
    ensure!(theirs == ours, "it is of the trust domain `{theirs}`, this PKI is `{ours}`");
    check(&mut roster, now).with_context(|| format!("{} is not what a meshd-pki writes", named()))?;
    let skew = seconds(Lifetimes::default().skew);
    let ended = |until: i64| until + 2 * skew <= unix(now);
    roster.roots.retain(|root| !ended(root.not_after) && !root.leaves_until.is_some_and(ended));
    Ok(roster)
}

/// A list that was changed by somebody must not make hosts of what is none, nor grant what no entry can, nor bring this
/// PKI's sequences into the far future.
fn check(roster: &mut Roster, now: SystemTime) -> anyhow::Result<()> {
    let latest = unix_ms(now + Lifetimes::default().skew);
    for sequence in [roster.sequence, roster.deny_sequence] {
        let at = rfc3339(i64::try_from(sequence / 1000).unwrap_or(i64::MAX));
        ensure!(sequence <= latest, "a sequence of it is from {at}, it is {} here", rfc3339(unix(now)));
    }
    for root in &mut roster.roots {
        let id = root.id.clone();
        check_root(root).with_context(|| format!("root `{id}`"))?;
    }
    let domain = &roster.trust_domain;
    for known in &roster.hosts {
        SpiffeId::host(domain, &known.id).with_context(|| format!("host `{}`", known.id))?;
    }
    let by_host = roster.entries.iter().map(|permitted| &permitted.entry.spiffe_id);
    for id in by_host.chain(roster.label_entries.iter().map(|entry| &entry.spiffe_id)) {
        workload(domain, id).with_context(|| format!("entry `{id}`"))?;
    }
    Ok(())
}

/// What the certificate says counts.
fn check_root(root: &mut KnownRoot) -> anyhow::Result<()> {
    let (rest, parsed) = X509Certificate::from_der(&root.certificate)?;
    ensure!(rest.is_empty() && parsed.is_ca(), "its certificate is not of an authority");
    ensure!(root_id(&root.certificate) == root.id, "its certificate is of {}", root_id(&root.certificate));
    root.not_after = parsed.validity().not_after.timestamp();
    Ok(())
}
