//! What all sources say of a target becomes one picture, for those who decide about requests. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use rpds::RedBlackTreeMapSync;

use super::{
    AuthorizationPolicy, Carried, GrpcRoute, HeldResources, HttpRoute, Id, PortRoutes, Resource, ResourceRecord,
    ServicePolicy, Target, TcpRoute, UnclearPolicy,
};
use crate::{Namespaces, ServiceName, Wanted};

/// All there is of one service. Each list is in the order of precedence, the first before the others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attached {
    /// For clients everywhere.
    pub producers: Routes,
    /// For clients of that namespace, instead of the others.
    pub consumers: BTreeMap<Arc<str>, Routes>,
    pub policy: Option<Arc<ServicePolicy>>,
    pub authorization: Vec<Arc<AuthorizationPolicy>>,
    /// What stands for policies that cannot be understood.
    pub unclear: Vec<Arc<UnclearPolicy>>,
}

/// Of a namespace, or of everybody.
#[derive(Debug, Default, PartialEq, Eq)]
struct Policies {
    authorization: Vec<Arc<AuthorizationPolicy>>,
    unclear: Vec<Arc<UnclearPolicy>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Routes {
    pub grpc: Vec<Arc<GrpcRoute>>,
    pub http: Vec<Arc<HttpRoute>>,
    pub tcp: Vec<Arc<TcpRoute>>,
}

impl Attached {
    pub fn routes(&self) -> usize {
        let count = |routes: &Routes| routes.grpc.len() + routes.http.len() + routes.tcp.len();
        count(&self.producers) + self.consumers.values().map(count).sum::<usize>()
    }

    fn routes_of(&mut self, service: &ServiceName, namespace: &Arc<str>) -> &mut Routes {
        match service.namespace() == &**namespace {
            true => &mut self.producers,
            false => self.consumers.entry(namespace.clone()).or_default(),
        }
    }

    fn is_empty(&self) -> bool {
        *self == Attached::default()
    }
}

/// The resources of a directory. Versions share what did not change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attachments {
    services: RedBlackTreeMapSync<ServiceName, Arc<Attached>>,
    namespaces: RedBlackTreeMapSync<Arc<str>, Arc<Policies>>,
    everywhere: Arc<Policies>,
    unclear: Arc<[Arc<UnclearPolicy>]>,
}

impl Attachments {
    pub fn of(&self, service: &ServiceName) -> Option<&Arc<Attached>> {
        self.services.get(service)
    }

    /// The routes that count for clients of a namespace on a port of a service: where there is a consumer route of theirs, those,
    /// else the producer's (GEP-1426). To be asked when something changed, not for each request.
    pub fn routes_for<'a>(
        &'a self,
        service: &ServiceName,
        namespace: &str,
        port: u16,
        carried: Carried,
    ) -> PortRoutes<'a> {
        let Some(attached) = self.of(service) else { return PortRoutes::None };
        let of_consumer = attached.consumers.get(namespace).map(|routes| routes.on(service, port, carried));
        match of_consumer {
            None | Some(PortRoutes::None) => attached.producers.on(service, port, carried),
            Some(own) => own,
        }
    }

    /// In the order of their names.
    pub fn services(&self) -> impl ExactSizeIterator<Item = (&ServiceName, &Arc<Attached>)> {
        self.services.iter()
    }

    /// The policies that decide about a service: its own, those of its namespace, those for everybody.
    pub fn authorization<'a>(
        &'a self,
        service: &ServiceName,
    ) -> impl Iterator<Item = &'a Arc<AuthorizationPolicy>> + use<'a> {
        let own = self.of(service).map(|attached| attached.authorization.as_slice()).unwrap_or_default();
        let namespace = self.namespaces.get(service.namespace());
        let namespace = namespace.map(|policies| policies.authorization.as_slice()).unwrap_or_default();
        own.iter().chain(namespace).chain(&self.everywhere.authorization)
    }

    /// Policies that would decide about a service and cannot be understood, where nothing good is known of them: its own,
    /// those of its namespace, those for everybody. Whom they would have let in nobody knows, so as long as there is one,
    /// nobody may come in.
    pub fn closed_by<'a>(&'a self, service: &ServiceName) -> impl Iterator<Item = &'a Arc<UnclearPolicy>> + use<'a> {
        let own = self.of(service).map(|attached| attached.unclear.as_slice()).unwrap_or_default();
        let namespace = self.namespaces.get(service.namespace());
        let namespace = namespace.map(|policies| policies.unclear.as_slice()).unwrap_or_default();
        own.iter().chain(namespace).chain(&self.everywhere.unclear)
    }

    /// Policies of which cannot even be read what they are for: anything of their namespace.
    pub fn unclear(&self) -> &[Arc<UnclearPolicy>] {
        &self.unclear
    }

    /// The same with what is attached to a target put together anew.
    pub(crate) fn with(&self, target: &Target, layers: &[Layer<'_>]) -> Attachments {
        let resources = believed(target, layers);
        let mut now = self.clone();
        match target {
            Target::Service(service) => {
                let attached = attach(service, resources);
                let same = self.of(service).is_some_and(|before| **before == attached);
                match (attached.is_empty(), same) {
                    (true, _) => now.services.remove_mut(service),
                    (false, true) => true,
                    (false, false) => {
                        now.services.insert_mut(service.clone(), Arc::new(attached));
                        true
                    }
                };
            }
            Target::Namespace(namespace) => match policies(resources) {
                none if none == Policies::default() => drop(now.namespaces.remove_mut(namespace)),
                some => now.namespaces.insert_mut(namespace.clone(), some.into()),
            },
            Target::TrustDomain => now.everywhere = policies(resources).into(),
            Target::Unknown => now.unclear = policies(resources).unclear.into(),
        }
        now
    }
}

/// One source; in the order of precedence, first wins.
pub(crate) struct Layer<'a> {
    pub(crate) source: &'a Arc<str>,
    pub(crate) routes: &'a Namespaces,
    pub(crate) policies: &'a Namespaces,
    pub(crate) held: &'a HeldResources,
}

impl Layer<'_> {
    fn may_say(&self, id: &Id) -> bool {
        let granted = if id.kind.is_route() { self.routes } else { self.policies };
        granted.covers(&id.namespace)
    }

    /// Where what is believed of it sends those who use what is wanted.
    pub(crate) fn backends(&self, wanted: &Wanted) -> Vec<ServiceName> {
        let is_wanted = |target: Target| matches!(target, Target::Service(service) if wanted.covers(&service));
        let resources = self.held.records().flat_map(|record| &record.resources);
        let used =
            resources.filter(|resource| self.may_say(&resource.id()) && resource.targets().into_iter().any(is_wanted));
        used.flat_map(Resource::backends).collect()
    }

    /// What it closes by documents that cannot be understood. Full messages.
    pub(crate) fn closed(&self) -> impl Iterator<Item = String> {
        let granted = |record: &&ResourceRecord| record.resources.iter().all(|resource| self.may_say(&resource.id()));
        let message = |record: &ResourceRecord| {
            let targets: Vec<String> =
                record.resources.iter().flat_map(Resource::targets).map(|target| target.to_string()).collect();
            let id = record.resources.first().map(|resource| resource.id().to_string()).unwrap_or_default();
            format!(
                "{}: {id} cannot be understood and never was, so what it is for counts as closed ({}); correct or remove it",
                record.origin,
                targets.join(", ")
            )
        };
        self.held.unclear().filter(granted).map(message)
    }

    /// What the source says without being granted it. Full messages.
    pub(crate) fn not_granted(&self) -> impl Iterator<Item = String> {
        let resources =
            self.held.records().flat_map(|record| record.resources.iter().map(move |resource| (record, resource)));
        resources.filter(|(_, resource)| !self.may_say(&resource.id())).map(|(record, resource)| {
            let id = resource.id();
            let what = if id.kind.is_route() { "routes" } else { "policies" };
            let Id { namespace, .. } = &id;
            format!(
                "{}: {id} is passed over: source `{}` is not granted {what} of namespace {namespace}; add `provides = {{ {what} = \
                 [\"{namespace}\"] }}` to its [[source]] in meshd.toml, or remove it there",
                record.origin, self.source
            )
        })
    }
}

/// Of each name, what the first source says that may; all of an earlier source before what later ones say.
fn believed<'a>(target: &Target, layers: &[Layer<'a>]) -> Vec<&'a Resource> {
    let mut resources = Vec::new();
    for (n, layer) in layers.iter().enumerate() {
        for id in layer.held.at(target).filter(|id| layer.may_say(id)) {
            let shadowed = layers[..n].iter().any(|earlier| earlier.may_say(id) && earlier.held.get(id).is_some());
            let found = layer.held.get(id).map(|(resource, _)| resource).filter(|_| !shadowed);
            // The name may be said by two keys, and only one of them holds.
            resources
                .extend(found.filter(|resource| resource.targets().contains(target)).map(|resource| (n, resource)));
        }
    }
    resources.sort_by(|(n, one), (m, other)| (n, one.meta().precedence()).cmp(&(m, other.meta().precedence())));
    resources.into_iter().map(|(_, resource)| resource).collect()
}

fn policies(resources: Vec<&Resource>) -> Policies {
    let mut policies = Policies::default();
    for resource in resources {
        match resource {
            Resource::Authorization(policy) => policies.authorization.push(policy.clone()),
            Resource::Unclear(policy) => policies.unclear.push(policy.clone()),
            _ => {}
        }
    }
    policies
}

fn attach(service: &ServiceName, resources: Vec<&Resource>) -> Attached {
    let mut attached = Attached::default();
    for resource in resources {
        let namespace = &resource.meta().namespace;
        match resource {
            Resource::Grpc(route) => attached.routes_of(service, namespace).grpc.push(route.clone()),
            Resource::Http(route) => attached.routes_of(service, namespace).http.push(route.clone()),
            Resource::Tcp(route) => attached.routes_of(service, namespace).tcp.push(route.clone()),
            // The first of them holds.
            Resource::Service(policy) => drop(attached.policy.get_or_insert_with(|| policy.clone())),
            Resource::Authorization(policy) => attached.authorization.push(policy.clone()),
            Resource::Unclear(policy) => attached.unclear.push(policy.clone()),
        }
    }
    attached
}

#[cfg(test)]
#[path = "attach_tests.rs"]
mod tests;
