//! What a mesh is to look like: hosts, units on them, services. Pure text; `mesh` makes it real.

use std::fmt::Write;

use crate::backend;

pub const TRUST_DOMAIN: &str = "demo.example";
pub const MESH_PORT: u16 = 15008;
pub const PKI_PORT: u16 = 15012;

#[derive(Clone)]
pub struct Plan {
    pub trust_domain: String,
    pub pki_host: String,
    pub hosts: Vec<HostPlan>,
    pub services: Vec<ServicePlan>,
    pub access_log: bool,
    /// Proxy threads of every meshd.
    pub threads: usize,
    /// Nothing of the mesh is addressed by IPv4.
    pub ipv6_only: bool,
    /// Life of certificates, as meshd-pki takes it; its default otherwise.
    pub leaf_ttl: Option<&'static str>,
    /// Instead: a leaf's life of which everything else of the PKI follows, roots included.
    pub rehearse: Option<&'static str>,
    /// More options of `meshd-pki run`.
    pub pki_options: Vec<String>,
}

#[derive(Clone)]
pub struct HostPlan {
    pub name: String,
    pub workloads: Vec<Workload>,
}

/// A unit with an identity; what it listens on is started by the harness.
#[derive(Clone)]
pub struct Workload {
    pub name: String,
    pub namespace: String,
    pub uid: u32,
    pub app: Option<App>,
    pub serve: Vec<Serve>,
}

#[derive(Clone, Copy)]
pub enum App {
    /// HTTP, any request answered with the name of unit and host.
    EchoHttp { listen: &'static str },
    /// HTTP, any request answered with who calls.
    WhoCalls { listen: &'static str, proxy_header: bool },
    /// Speaks first, then echoes lines.
    Greeter { listen: &'static str },
}

#[derive(Clone)]
pub struct Serve {
    pub service: String,
    pub port: u16,
    pub deliver: String,
    pub strict: bool,
    pub local_ok: Vec<u32>,
    /// How the application learns who calls, in the words of enrol.d.
    pub client_address: &'static str,
}

#[derive(Clone)]
pub struct ServicePlan {
    pub name: String,
    pub namespace: String,
    pub ports: Vec<u16>,
    /// Names of hosts whose meshd answers for it.
    pub hosts: Vec<String>,
    /// Declared protocol, `detect` unless said.
    pub protocol: Option<String>,
}

impl Plan {
    /// The mesh of the demo: checkout and billing on web; payments and smtp on api-1 and api-2.
    pub fn shop() -> Self {
        let api =
            |name: &str| HostPlan { name: name.to_owned(), workloads: vec![Workload::payments(), Workload::smtp()] };
        let clients = vec![Workload::client("checkout", 2003), Workload::client("billing", 2004)];
        Self {
            trust_domain: TRUST_DOMAIN.to_owned(),
            pki_host: "pki".to_owned(),
            hosts: vec![HostPlan { name: "web".to_owned(), workloads: clients }, api("api-1"), api("api-2")],
            services: vec![ServicePlan::new("payments", 80), ServicePlan::new("smtp", 25)],
            access_log: true,
            threads: 2,
            ipv6_only: false,
            leaf_ttl: None,
            rehearse: None,
            pki_options: Vec::new(),
        }
    }

    /// The same with one server host, for scenarios that need to know who answers.
    pub fn shop_with_one_server() -> Self {
        let mut plan = Self::shop();
        plan.hosts.retain(|host| host.name != "api-2");
        for service in &mut plan.services {
            service.hosts.retain(|host| host != "api-2");
        }
        plan
    }

    pub fn host_names(&self) -> Vec<&str> {
        let hosts = self.hosts.iter().map(|host| host.name.as_str());
        std::iter::once(self.pki_host.as_str()).chain(hosts).collect()
    }
}

impl App {
    /// What `testkit` is told, to serve under this name.
    pub fn arguments<'a>(&self, name: &'a str) -> Vec<&'a str> {
        match *self {
            App::EchoHttp { listen } => vec!["echo-http", "--listen", listen, "--name", name],
            App::Greeter { listen } => vec!["greeter", "--listen", listen, "--name", name],
            App::WhoCalls { listen, proxy_header: false } => vec!["who-calls", "--listen", listen],
            App::WhoCalls { listen, proxy_header: true } => vec!["who-calls", "--listen", listen, "--proxy-header"],
        }
    }
}

impl Workload {
    pub fn client(name: &str, uid: u32) -> Self {
        Self { name: name.to_owned(), namespace: "shop".to_owned(), uid, app: None, serve: Vec::new() }
    }

    /// Listens on every address, so that only `strict` keeps strangers out.
    pub fn payments() -> Self {
        let app = Some(App::EchoHttp { listen: "0.0.0.0:8080" });
        let serve = vec![Serve::new("payments.shop", 80, "127.0.0.1:8080", true)];
        Self { app, serve, ..Self::client("payments", 2001) }
    }

    pub fn smtp() -> Self {
        let app = Some(App::Greeter { listen: "127.0.0.1:2525" });
        let serve = vec![Serve::new("smtp.shop", 25, "127.0.0.1:2525", false)];
        Self { app, serve, ..Self::client("smtp", 2002) }
    }

    pub fn unit(&self) -> String {
        format!("{}.service", self.name)
    }

    pub fn identity(&self) -> String {
        format!("ns/{}/sa/{}", self.namespace, self.name)
    }
}

impl Serve {
    pub fn new(service: &str, port: u16, deliver: &str, strict: bool) -> Self {
        Self {
            service: service.to_owned(),
            port,
            deliver: deliver.to_owned(),
            strict,
            local_ok: Vec::new(),
            client_address: "none",
        }
    }
}

impl ServicePlan {
    pub fn new(name: &str, port: u16) -> Self {
        Self {
            name: name.to_owned(),
            namespace: "shop".to_owned(),
            ports: vec![port],
            hosts: vec!["api-1".to_owned(), "api-2".to_owned()],
            protocol: None,
        }
    }
}

/// `enrol.d/harness.toml`. Without cgroup2 a workload is known by its uid.
pub fn enrolment(workloads: &[Workload], by_unit: bool) -> String {
    let mut text = String::new();
    for workload in workloads {
        let who = if by_unit { format!("unit = \"{}\"", workload.unit()) } else { format!("uid = {}", workload.uid) };
        let Workload { namespace, name, .. } = workload;
        let _ = writeln!(text, "[[workload]]\n{who}\nnamespace = \"{namespace}\"\nname = \"{name}\"");
        for serve in &workload.serve {
            let Serve { service, port, deliver, strict, local_ok, client_address } = serve;
            let mode = if *strict && backend::can_be_strict() { "strict" } else { "permissive" };
            let _ = writeln!(text, "  [[workload.serve]]\n  service = \"{service}\"\n  port = {port}");
            let _ = writeln!(text, "  deliver = \"{deliver}\"\n  mode = \"{mode}\"\n  local_ok = {local_ok:?}");
            // Only on strict ports; where a backend has none, what else a plan serves can still be tested.
            let can_be = mode == "strict" || *client_address != "proxy-v2";
            let client_address = if can_be { client_address } else { "none" };
            let _ = writeln!(text, "  client_address = {client_address:?}");
        }
    }
    text
}

/// One `MeshService` document; `endpoints` are addresses.
pub fn document(service: &ServicePlan, endpoints: &[String]) -> String {
    let ServicePlan { name, namespace, .. } = service;
    let mut text = format!(
        "apiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata: {{ name: {name}, namespace: {namespace} }}\n"
    );
    let _ = writeln!(text, "spec:\n  ports:");
    for port in &service.ports {
        let protocol = service.protocol.as_ref().map(|protocol| format!(", protocol: {protocol}")).unwrap_or_default();
        let _ = writeln!(text, "    - {{ port: {port}{protocol} }}");
    }
    let _ = writeln!(text, "  endpoints:");
    for address in endpoints {
        let _ = writeln!(text, "    - {{ address: \"{address}\" }}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_is_enrolled_by_unit_or_by_uid() {
        let by_unit = enrolment(&[Workload::payments()], true);
        assert!(by_unit.contains("unit = \"payments.service\"") && by_unit.contains("mode = \"strict\""), "{by_unit}");
        let by_uid = enrolment(&[Workload::payments()], false);
        assert!(by_uid.contains("uid = 2001") && !by_uid.contains("unit ="), "{by_uid}");
    }

    #[test]
    fn a_document_names_every_port_and_endpoint() {
        let text = document(&ServicePlan::new("payments", 80), &["10.87.0.13".to_owned()]);
        assert!(text.contains("- { port: 80 }") && text.contains("address: \"10.87.0.13\""), "{text}");
    }
}
