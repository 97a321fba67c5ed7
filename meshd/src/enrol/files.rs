//! Reads `enrol.d/*.toml`, all or nothing: a mistake in one file keeps the last good enrolment in force.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;
use meshd_discovery::ServiceName;
use meshd_identity::{SpiffeId, TrustDomain};
use toml::Spanned;

use super::entry::{EnrolFile, FieldError, ServeEntry, WorkloadEntry};
use super::publish::published;
use super::{ClientAddress, Delivery, Enrolment, Mode, Selector, Workload};
use crate::config::{ConfigError, line_of, parse_toml};

#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error(transparent)]
    File(#[from] ConfigError),
    #[error("cannot list {path}: {source}; create the directory, or set `enrol_dir` in meshd.toml")]
    List { path: PathBuf, source: std::io::Error },
}

/// Where nothing may be delivered: it would be a loop, or show a peer what meshd has for this host alone.
#[derive(Clone, Debug, Default)]
pub struct Reserved {
    pub listeners: Vec<SocketAddr>,
    pub virtual_ips: Vec<IpNet>,
}

impl Reserved {
    fn has_port(&self, port: u16) -> bool {
        self.listeners.iter().any(|ours| ours.port() == port)
    }

    fn what(&self, address: SocketAddr) -> Option<&'static str> {
        let ip = address.ip().to_canonical();
        let reaches = |ours: &SocketAddr| {
            let our_ip = ours.ip().to_canonical();
            ours.port() == address.port() && (our_ip == ip || our_ip.is_unspecified() || ip.is_unspecified())
        };
        if self.listeners.iter().any(reaches) {
            return Some("one of meshd's own listeners");
        }
        self.virtual_ips.iter().any(|net| net.contains(&ip)).then_some("a virtual IP, which leads back into the mesh")
    }
}

/// Loads every `*.toml` of `dir`, in name order.
pub fn load(dir: &Path, trust_domain: &TrustDomain, reserved: &Reserved) -> Result<Enrolment, EnrolError> {
    read(&files_of(dir)?, trust_domain, reserved)
}

/// The same, as if the file `path` held `text`: whoever is about to write it asks first.
pub fn load_as_if(
    dir: &Path,
    (path, text): (&Path, &str),
    trust_domain: &TrustDomain,
    reserved: &Reserved,
) -> Result<Enrolment, EnrolError> {
    let mut files = files_of(dir)?;
    files.retain(|(other, _)| other != path);
    files.push((path.to_owned(), text.to_owned()));
    files.sort();
    read(&files, trust_domain, reserved)
}

/// Path and text of every file, in name order.
fn files_of(dir: &Path) -> Result<Vec<(PathBuf, String)>, EnrolError> {
    let list = |source| EnrolError::List { path: dir.into(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(list)? {
        let path = entry.map_err(list)?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let text = std::fs::read_to_string(&path);
            let text = text.map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            files.push((path, text));
        }
    }
    files.sort();
    Ok(files)
}

fn read(files: &[(PathBuf, String)], trust_domain: &TrustDomain, reserved: &Reserved) -> Result<Enrolment, EnrolError> {
    let mut enrolment = Enrolment::default();
    for (path, text) in files {
        let file: EnrolFile = parse_toml(path, text)?;
        let source = Source { path, text };
        for entry in file.workloads {
            enrolment.add(&source, &entry, trust_domain, reserved)?;
        }
    }
    enrolment.order_scopes();
    Ok(enrolment)
}

/// Where an entry was written, for whoever has to change it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    pub path: PathBuf,
    pub line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)
    }
}

/// A file being read.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn origin<T>(&self, entry: &Spanned<T>) -> Origin {
        Origin { path: self.path.into(), line: line_of(self.text, entry.span().start) }
    }

    fn refuse<T>(&self, entry: &Spanned<T>, (field, reason): FieldError) -> ConfigError {
        let Origin { path, line } = self.origin(entry);
        ConfigError::Parse { path, line, reason: format!("{field}: {reason}") }
    }
}

impl Enrolment {
    fn add(
        &mut self,
        source: &Source<'_>,
        entry: &Spanned<WorkloadEntry>,
        trust_domain: &TrustDomain,
        reserved: &Reserved,
    ) -> Result<(), ConfigError> {
        let workload = workload(entry.get_ref(), source.origin(entry), trust_domain, reserved)
            .map_err(|error| source.refuse(entry, error))?;
        let workload = Arc::new(workload);
        if let Some(first) = self.insert(workload.clone()) {
            let reason = format!("{} is enrolled twice: also at {}; keep one of them", workload.unit, first.origin);
            return Err(source.refuse(entry, ("workload", reason)));
        }
        for serve in &entry.get_ref().serve {
            self.add_delivery(&workload, serve.get_ref(), source.origin(serve), reserved)
                .map_err(|error| source.refuse(serve, error))?;
        }
        Ok(())
    }

    fn add_delivery(
        &mut self,
        owner: &Arc<Workload>,
        serve: &ServeEntry,
        origin: Origin,
        reserved: &Reserved,
    ) -> Result<(), FieldError> {
        let service: ServiceName =
            serve.service.parse().map_err(|error| ("workload.serve.service", format!("{error}")))?;
        let deliver = deliver(owner, serve)?;
        if serve.port == 0 || deliver.port() == 0 {
            return Err(("workload.serve.port", format!("{service}: port 0 cannot be served; give 1..65535")));
        }
        if let Some(what) = reserved.what(deliver) {
            let reason = format!("{deliver} is {what}; deliver to an address the application listens on");
            return Err(("workload.serve.deliver", reason));
        }
        if serve.client_address == ClientAddress::ProxyV2 && serve.mode != Mode::Strict {
            let reason = format!(
                "{service}: on a permissive port any plaintext caller can write the \"proxy-v2\" header itself, and name \
                 any caller in it; set mode = \"strict\""
            );
            return Err(("workload.serve.client_address", reason));
        }
        let published = published(serve)?;
        self.agree_on_registration(&service, owner, published.as_ref())?;
        let delivery = Arc::new(Delivery {
            service: service.clone(),
            port: serve.port,
            owner: owner.clone(),
            deliver,
            mode: serve.mode,
            client_address: serve.client_address,
            local_ok: serve.local_ok.clone(),
            plaintext_from: serve.plaintext_from.clone(),
            published,
            origin,
        });
        if self.by_target.insert((service.clone(), serve.port), delivery.clone()).is_some() {
            return Err(("workload.serve", format!("{service}:{} is served twice on this host", serve.port)));
        }
        self.deliveries.push(delivery);
        Ok(())
    }
}

fn deliver(owner: &Workload, serve: &ServeEntry) -> Result<SocketAddr, FieldError> {
    match (serve.deliver, &owner.selector) {
        (Some(deliver), _) => Ok(deliver),
        (None, Selector::Port(port)) => Ok((Ipv4Addr::LOCALHOST, *port).into()),
        (None, _) => {
            let reason = format!("{}: say where the application listens, like \"127.0.0.1:8080\"", serve.service);
            Err(("workload.serve.deliver", reason))
        }
    }
}

fn workload(
    entry: &WorkloadEntry,
    origin: Origin,
    trust_domain: &TrustDomain,
    reserved: &Reserved,
) -> Result<Workload, FieldError> {
    let selector = entry.selector()?;
    if let Selector::Port(port) = selector
        && reserved.has_port(port)
    {
        return Err(("workload.port", format!("{port} is one of meshd's own listeners; give the application's")));
    }
    let identity = SpiffeId::workload(trust_domain, &entry.namespace, &entry.name)
        .map_err(|error| ("workload.namespace/name", error.to_string()))?;
    if identity.is_system() {
        return Err(("workload.namespace", "`meshd-system` is reserved for meshd; choose another".to_owned()));
    }
    Ok(Workload { identity, unit: selector.to_string().into(), selector, user_sessions: entry.user_sessions, origin })
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
        let reserved = Reserved {
            listeners: vec!["0.0.0.0:15008".parse().unwrap()],
            virtual_ips: vec!["240.240.0.0/16".parse().unwrap()],
        };
        load(dir.path(), &"mesh.example".parse().unwrap(), &reserved)
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
    fn a_listener_of_ours_reserves_its_address_and_no_other() {
        let listeners = vec!["127.0.0.1:53".parse().unwrap(), "0.0.0.0:15008".parse().unwrap()];
        let reserved = Reserved { listeners, ..Reserved::default() };
        let is_taken = |address: &str| reserved.what(address.parse().unwrap()).is_some();
        assert!(!is_taken("10.0.0.5:53") && !is_taken("127.0.0.1:54"));
        for taken in ["127.0.0.1:53", "[::ffff:127.0.0.1]:53", "0.0.0.0:53", "[::]:53", "10.0.0.5:15008"] {
            assert!(is_taken(taken), "{taken}");
        }
    }

    #[test]
    fn who_calls_is_announced_on_strict_ports_only() {
        let announced = format!("{PAYMENTS}client_address = \"proxy-v2\"\n");
        assert!(load_text(&announced).is_ok());
        let error = load_text(&announced.replace("strict", "permissive")).unwrap_err().to_string();
        assert!(error.contains("workload.serve.client_address") && error.contains("mode = \"strict\""), "{error}");
    }

    #[test]
    fn root_is_nobody_unless_enrolled() {
        assert!(load_text(PAYMENTS).unwrap().workload_of(Some(&"sshd.service".into()), 0).is_none());
    }

    #[test]
    fn mistakes_name_file_field_and_remedy() {
        for (text, expected) in [
            (PAYMENTS.replace("unit =", "unti ="), "10-test.toml:3: unknown field `unti`"),
            (PAYMENTS.replace("unit = \"payments.service\"", ""), "give either `unit`, `uid` or `port`"),
            (PAYMENTS.replace("payments.service", "payments"), "like `payments.service`"),
            (PAYMENTS.replace("\"shop\"", "\"meshd-system\""), "reserved for meshd"),
            (PAYMENTS.replace("8080", "15008"), "meshd's own listeners"),
            (PAYMENTS.replace("127.0.0.1", "240.240.3.4"), "a virtual IP"),
            (PAYMENTS.replace("127.0.0.1", "[::ffff:240.240.3.4]"), "a virtual IP"),
            (PAYMENTS.replace("\"payments\"", "\"pay ments\""), "workload.namespace/name"),
            (PAYMENTS.replace("deliver = \"127.0.0.1:8080\"", ""), "workload.serve.deliver: payments.shop: say where"),
            (PAYMENTS.replace("unit = \"payments.service\"", "port = 15008"), "meshd's own listeners"),
            (PAYMENTS.replace("payments.service", "*.scope"), "login sessions"),
            (format!("{PAYMENTS}{PAYMENTS}"), "payments.service is enrolled twice: also at"),
        ] {
            let message = load_text(&text).unwrap_err().to_string();
            assert!(message.contains("10-test.toml") && message.contains(expected), "{message}");
        }
    }

    fn claim(selector: &str, name: &str) -> String {
        format!("[[workload]]\n{selector}\nnamespace = \"shop\"\nname = \"{name}\"\n")
    }

    #[test]
    fn an_exact_unit_wins_over_patterns_the_longest_pattern_over_others_and_any_unit_over_the_uid() {
        let text = [
            claim("unit = \"docker-*.scope\"", "any"),
            claim("unit = \"docker-3f*.scope\"", "some"),
            claim("unit = \"docker-3fa9.scope\"", "one"),
            claim("uid = 7", "user"),
        ];
        let enrolment = load_text(&text.concat()).unwrap();
        let name = |unit: &str, uid| {
            let found = enrolment.workload_of(Some(&unit.into()), uid)?;
            Some(found.identity.name().to_owned())
        };
        assert_eq!(name("docker-3fa9.scope", 7).as_deref(), Some("one"));
        assert_eq!(name("docker-3fb0.scope", 7).as_deref(), Some("some"));
        assert_eq!(name("docker-4.scope", 7).as_deref(), Some("any"));
        assert_eq!(name("docker-4.service", 7).as_deref(), Some("user"));
        assert_eq!(name("docker-4.service", 0), None);
    }

    #[test]
    fn a_workload_known_by_its_port_serves_that_port_unless_it_says_another() {
        let serve = "[[workload.serve]]\nservice = \"db.shop\"\nport = 80\n";
        let enrolment = load_text(&format!("{}{serve}", claim("port = 5432", "db"))).unwrap();
        let delivery = enrolment.delivery(&"db.shop".parse().unwrap(), 80).unwrap();
        assert_eq!(delivery.deliver, "127.0.0.1:5432".parse().unwrap());
        let enrolment = load_text(&format!("{}{serve}deliver = \"127.0.0.1:9\"", claim("port = 5432", "db"))).unwrap();
        assert_eq!(enrolment.deliveries()[0].deliver.port(), 9);
    }

    #[test]
    fn what_is_about_to_be_written_is_judged_with_all_other_files() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("10-a.toml"), PAYMENTS).unwrap();
        let path = dir.path().join("90-cli.toml");
        std::fs::write(&path, "not even TOML").unwrap();
        let judge = |text: &str| {
            load_as_if(dir.path(), (&path, text), &"mesh.example".parse().unwrap(), &Reserved::default())
                .map_err(|error| error.to_string())
        };
        assert_eq!(judge(&claim("uid = 7", "user")).unwrap().workloads().len(), 2);
        let error = judge(&claim("unit = \"payments.service\"", "other")).unwrap_err();
        assert!(error.contains("90-cli.toml:1") && error.contains("10-a.toml:2"), "{error}");
    }
}
