//! Reads `enrol.d/*.toml`, all or nothing: a mistake in one file keeps the last good enrolment in force.

use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;
use meshd_discovery::ServiceName;
use meshd_identity::{SpiffeId, TrustDomain};
use serde::Deserialize;
use toml::Spanned;

use super::{Delivery, Enrolment, Mode, Selector, Workload};
use crate::config::{ConfigError, line_of, read_toml_text};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EnrolFile {
    #[serde(default, rename = "workload")]
    workloads: Vec<Spanned<WorkloadEntry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WorkloadEntry {
    unit: Option<String>,
    uid: Option<u32>,
    namespace: String,
    name: String,
    #[serde(default)]
    serve: Vec<Spanned<ServeEntry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServeEntry {
    service: String,
    port: u16,
    deliver: SocketAddr,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    local_ok: Vec<u32>,
    #[serde(default)]
    plaintext_from: Vec<IpNet>,
}

#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error(transparent)]
    File(#[from] ConfigError),
    #[error("cannot list {path}: {source}; create the directory, or set `enrol_dir` in meshd.toml")]
    List { path: PathBuf, source: std::io::Error },
}

/// Loads every `*.toml` of `dir`, in name order.
pub fn load(dir: &Path, trust_domain: &TrustDomain, reserved: &[SocketAddr]) -> Result<Enrolment, EnrolError> {
    let list = |source| EnrolError::List { path: dir.into(), source };
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(list)? {
        let path = entry.map_err(list)?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            paths.push(path);
        }
    }
    paths.sort();
    let mut enrolment = Enrolment::default();
    for path in &paths {
        let (file, text): (EnrolFile, String) = read_toml_text(path)?;
        for entry in file.workloads {
            enrolment.add(&Origin { path, text: &text }, entry, trust_domain, reserved)?;
        }
    }
    Ok(enrolment)
}

/// Where an entry was read, to say so when it is refused.
struct Origin<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Origin<'_> {
    fn refuse<T>(&self, entry: &Spanned<T>, field: &str, reason: &str) -> ConfigError {
        let line = line_of(self.text, entry.span().start);
        ConfigError::Parse { path: self.path.into(), line, reason: format!("{field}: {reason}") }
    }
}

impl Enrolment {
    fn add(
        &mut self,
        origin: &Origin<'_>,
        entry: Spanned<WorkloadEntry>,
        trust_domain: &TrustDomain,
        reserved: &[SocketAddr],
    ) -> Result<(), ConfigError> {
        let workload = Arc::new(workload(origin, &entry, trust_domain)?);
        match self.by_selector.entry(workload.selector.clone()) {
            Entry::Occupied(_) => {
                return Err(origin.refuse(&entry, "workload", &format!("{} is enrolled twice", workload.unit)));
            }
            Entry::Vacant(slot) => slot.insert(workload.clone()),
        };
        for serve in &entry.get_ref().serve {
            self.add_delivery(&workload, serve.get_ref(), reserved)
                .map_err(|(field, reason)| origin.refuse(serve, field, &reason))?;
        }
        self.workloads.push(workload);
        Ok(())
    }

    fn add_delivery(
        &mut self,
        owner: &Arc<Workload>,
        serve: &ServeEntry,
        reserved: &[SocketAddr],
    ) -> Result<(), (&'static str, String)> {
        let service: ServiceName =
            serve.service.parse().map_err(|error| ("workload.serve.service", format!("{error}")))?;
        if serve.port == 0 || serve.deliver.port() == 0 {
            return Err(("workload.serve.port", format!("{service}: port 0 cannot be served; give 1..65535")));
        }
        // Delivering to ourselves would be a loop; a peer must never reach a meshd listener through us.
        if reserved.iter().any(|ours| ours.port() == serve.deliver.port()) {
            let reason = format!("{} is one of meshd's own listeners; deliver to the application's", serve.deliver);
            return Err(("workload.serve.deliver", reason));
        }
        let delivery = Arc::new(Delivery {
            service: service.clone(),
            port: serve.port,
            owner: owner.clone(),
            deliver: serve.deliver,
            mode: serve.mode,
            local_ok: serve.local_ok.clone(),
            plaintext_from: serve.plaintext_from.clone(),
        });
        if self.by_target.insert((service.clone(), serve.port), delivery.clone()).is_some() {
            return Err(("workload.serve", format!("{service}:{} is served twice on this host", serve.port)));
        }
        self.deliveries.push(delivery);
        Ok(())
    }
}

fn workload(
    origin: &Origin<'_>,
    entry: &Spanned<WorkloadEntry>,
    trust_domain: &TrustDomain,
) -> Result<Workload, ConfigError> {
    let WorkloadEntry { unit, uid, namespace, name, .. } = entry.get_ref();
    let selector = match (unit, uid) {
        (Some(unit), None) if !unit.contains('.') => {
            let reason = format!("`{unit}` names no unit; write it with its kind, like `{unit}.service`");
            return Err(origin.refuse(entry, "workload.unit", &reason));
        }
        (Some(unit), None) => Selector::Unit(unit.as_str().into()),
        (None, Some(uid)) => Selector::Uid(*uid),
        _ => return Err(origin.refuse(entry, "workload", &format!("{name}: give either `unit` or `uid`"))),
    };
    let identity = SpiffeId::workload(trust_domain, namespace, name)
        .map_err(|error| origin.refuse(entry, "workload.namespace/name", &error.to_string()))?;
    if identity.is_system() {
        let reason = "`meshd-system` is reserved for meshd; choose another";
        return Err(origin.refuse(entry, "workload.namespace", reason));
    }
    let unit = match &selector {
        Selector::Unit(unit) => unit.clone(),
        Selector::Uid(uid) => format!("uid:{uid}").into(),
    };
    Ok(Workload { identity, unit, selector })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAYMENTS: &str = r#"
[[workload]]
unit = "payments.service"
namespace = "shop"
name = "payments"
[[workload.serve]]
service = "payments.shop"
port = 80
deliver = "127.0.0.1:8080"
mode = "strict"
"#;

    fn load_text(text: &str) -> Result<Enrolment, EnrolError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("10-test.toml"), text).unwrap();
        load(dir.path(), &"mesh.example".parse().unwrap(), &["0.0.0.0:15008".parse().unwrap()])
    }

    #[test]
    fn a_unit_gets_its_identity_and_deliveries() {
        let enrolment = load_text(PAYMENTS).unwrap();
        let workload = enrolment.workload_of(Some(&"payments.service".into()), 0).unwrap();
        assert_eq!(workload.identity.to_string(), "spiffe://mesh.example/ns/shop/sa/payments");
        let delivery = enrolment.delivery(&"payments.shop".parse().unwrap(), 80).unwrap();
        assert_eq!((delivery.deliver.port(), delivery.mode), (8080, Mode::Strict));
    }

    #[test]
    fn root_is_nobody_unless_enrolled() {
        assert!(load_text(PAYMENTS).unwrap().workload_of(Some(&"sshd.service".into()), 0).is_none());
    }

    #[test]
    fn mistakes_name_file_field_and_remedy() {
        for (text, expected) in [
            (PAYMENTS.replace("unit =", "unti ="), "10-test.toml:3: unknown field `unti`"),
            (PAYMENTS.replace("unit = \"payments.service\"", ""), "give either `unit` or `uid`"),
            (PAYMENTS.replace("payments.service", "payments"), "like `payments.service`"),
            (PAYMENTS.replace("\"shop\"", "\"meshd-system\""), "reserved for meshd"),
            (PAYMENTS.replace("8080", "15008"), "meshd's own listeners"),
            (PAYMENTS.replace("\"payments\"", "\"pay ments\""), "workload.namespace/name"),
            (format!("{PAYMENTS}{PAYMENTS}"), "enrolled twice"),
        ] {
            let message = load_text(&text).unwrap_err().to_string();
            assert!(message.contains("10-test.toml") && message.contains(expected), "{message}");
        }
    }
}
