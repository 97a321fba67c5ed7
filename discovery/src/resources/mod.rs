//! Resources: what operators say about services beyond what they are, in documents with apiVersion and kind. Routes of the
//! Gateway API, policies of our own, and what is imported from Linkerd and SMI by conversion. docs/routes-and-policies.md
//! is the reference.
//!
//! ```text
//! text --yaml.rs--> tree with lines --shape.rs--> checked --serde--> Resource --held.rs, attach.rs--> Directory
//! ```

mod alternatives;
mod attach;
mod authorization_policy;
mod conflicts;
mod filters;
mod forms;
mod grpc_route;
mod held;
mod http_route;
mod mesh_service;
mod news;
mod precedence;
mod quantities;
mod read;
mod references;
mod schema;
mod service_policy;
mod service_profile;
mod shape;
mod store;
mod tcp_route;
mod traffic_split;
mod unclear_policy;
mod validate;
mod values;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ServiceName;
use precedence::RouteSpec;

pub(crate) use attach::Layer as ResourceLayer;
pub use attach::{Attached, Attachments, Routes};
pub use authorization_policy::{
    Action, AuthorizationPolicy, AuthorizationRule, AuthorizationSpec, HeaderCondition, Operation, Origin, Request,
};
pub use conflicts::{Conflict, conflicts};
pub use filters::{Filter, HeaderChange, HeaderValue, PathChange, Redirect, Rewrite, Sampled};
pub use grpc_route::{GrpcMatch, GrpcMethod, GrpcRoute, GrpcRule, GrpcSpec};
pub(crate) use held::{HeldResources, Touched as TouchedResources};
pub use http_route::{HttpMatch, HttpRoute, HttpRule, HttpSpec, PathMatch, Retry, RouteTimeouts, ValueMatch};
pub use news::{Change as ResourceChange, News as ResourceNews, Record as ResourceRecord, Refusal as ResourceRefusal};
pub use precedence::{Candidate, Carried, GrpcCandidate, HttpCandidate, PortRoutes, grpc_order, http_order};
pub use read::{Document, read, read_json};
pub(crate) use read::{Said, WRITTEN_BY_KUBERNETES, is_between_services, mesh_service_shape, read_one};
pub use references::{Backend, Parent, PolicyTarget, ServiceKind};
pub use schema::{PUBLISHED, crds, json_schema};
pub use service_policy::{
    Algorithm, Balancing, Failover, Limits, OutlierEjection, Per, PolicyTimeouts, RateLimit, Retries, RetryBudget,
    ServicePolicy, ServiceSpec, SuccessRate,
};
pub(crate) use store::{BASE, MOST_BYTES, StoredKey, base_for};
pub use tcp_route::{TcpRoute, TcpRule, TcpSpec};
pub use unclear_policy::{UnclearPolicy, UnclearSpec};
pub use validate::{Finding, Severity, Text, validate};
pub use values::{Network, PathPattern, Pattern, Peer, Span};

/// The kinds of documents, by whatever source they come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    MeshService,
    HTTPRoute,
    GRPCRoute,
    TCPRoute,
    ServicePolicy,
    AuthorizationPolicy,
    /// Of Linkerd: converted.
    ServiceProfile,
    /// Of SMI: converted.
    TrafficSplit,
}

impl Kind {
    pub const ALL: [Kind; 8] = [
        Kind::MeshService,
        Kind::HTTPRoute,
        Kind::GRPCRoute,
        Kind::TCPRoute,
        Kind::ServicePolicy,
        Kind::AuthorizationPolicy,
        Kind::ServiceProfile,
        Kind::TrafficSplit,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Kind::MeshService => "MeshService",
            Kind::HTTPRoute => "HTTPRoute",
            Kind::GRPCRoute => "GRPCRoute",
            Kind::TCPRoute => "TCPRoute",
            Kind::ServicePolicy => "ServicePolicy",
            Kind::AuthorizationPolicy => "AuthorizationPolicy",
            Kind::ServiceProfile => "ServiceProfile",
            Kind::TrafficSplit => "TrafficSplit",
        }
    }

    pub fn group(self) -> &'static str {
        match self {
            Kind::MeshService | Kind::ServicePolicy | Kind::AuthorizationPolicy => "meshd.dev",
            Kind::HTTPRoute | Kind::GRPCRoute | Kind::TCPRoute => "gateway.networking.k8s.io",
            Kind::ServiceProfile => "linkerd.io",
            Kind::TrafficSplit => "split.smi-spec.io",
        }
    }

    /// Newest first.
    pub fn versions(self) -> &'static [&'static str] {
        match self {
            Kind::MeshService | Kind::ServicePolicy | Kind::AuthorizationPolicy => &["v1alpha1"],
            // What v1beta1 had of an HTTPRoute has not changed since.
            Kind::HTTPRoute => &["v1", "v1beta1"],
            Kind::GRPCRoute => &["v1"],
            Kind::TCPRoute => &["v1", "v1alpha2"],
            Kind::ServiceProfile => &["v1alpha2"],
            Kind::TrafficSplit => &["v1alpha4", "v1alpha3", "v1alpha2", "v1alpha1"],
        }
    }

    /// As it is in keys of stores.
    pub fn lower(self) -> &'static str {
        match self {
            Kind::MeshService => "meshservice",
            Kind::HTTPRoute => "httproute",
            Kind::GRPCRoute => "grpcroute",
            Kind::TCPRoute => "tcproute",
            Kind::ServicePolicy => "servicepolicy",
            Kind::AuthorizationPolicy => "authorizationpolicy",
            Kind::ServiceProfile => "serviceprofile",
            Kind::TrafficSplit => "trafficsplit",
        }
    }

    /// As it is in paths of the Kubernetes API.
    pub fn plural(self) -> &'static str {
        match self {
            Kind::MeshService => "meshservices",
            Kind::HTTPRoute => "httproutes",
            Kind::GRPCRoute => "grpcroutes",
            Kind::TCPRoute => "tcproutes",
            Kind::ServicePolicy => "servicepolicies",
            Kind::AuthorizationPolicy => "authorizationpolicies",
            Kind::ServiceProfile => "serviceprofiles",
            Kind::TrafficSplit => "trafficsplits",
        }
    }

    pub fn of_lower(text: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.lower() == text)
    }

    /// Says where requests go; the rest says how they are treated.
    pub fn is_route(self) -> bool {
        matches!(self, Kind::HTTPRoute | Kind::GRPCRoute | Kind::TCPRoute | Kind::ServiceProfile | Kind::TrafficSplit)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Which document it is: there is one of each in a source.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Id {
    pub kind: Kind,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

/// What every resource has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Meta {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    /// As Kubernetes writes it, in UTC, so that text order is order in time.
    #[serde(default, rename = "creationTimestamp", skip_serializing_if = "Option::is_none")]
    pub created: Option<Arc<str>>,
}

impl Meta {
    /// The Gateway API's way out of a tie: the oldest, then the first in the order of `namespace/name`. What has no time
    /// of its creation comes after what has one.
    pub fn precedence<'m>(&'m self) -> impl Ord + use<'m> {
        (self.created.is_none(), self.created.as_deref(), &*self.namespace, &*self.name)
    }
}

/// A resource of a known kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object<S> {
    pub metadata: Meta,
    pub spec: S,
}

/// A good document, or what one was converted into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind")]
pub enum Resource {
    #[serde(rename = "HTTPRoute")]
    Http(Arc<HttpRoute>),
    #[serde(rename = "GRPCRoute")]
    Grpc(Arc<GrpcRoute>),
    #[serde(rename = "TCPRoute")]
    Tcp(Arc<TcpRoute>),
    #[serde(rename = "ServicePolicy")]
    Service(Arc<ServicePolicy>),
    #[serde(rename = "AuthorizationPolicy")]
    Authorization(Arc<AuthorizationPolicy>),
    /// Instead of an AuthorizationPolicy that cannot be understood.
    #[serde(rename = "UnclearPolicy")]
    Unclear(Arc<UnclearPolicy>),
}

/// What a resource is attached to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    Service(ServiceName),
    Namespace(Arc<str>),
    TrustDomain,
    /// Of a document that cannot be understood: nobody knows what it is for.
    Unknown,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Service(service) => service.fmt(f),
            Target::Namespace(namespace) => write!(f, "namespace {namespace}"),
            Target::TrustDomain => f.write_str("everybody"),
            Target::Unknown => f.write_str("something that cannot be read"),
        }
    }
}

impl Resource {
    pub fn kind(&self) -> Kind {
        match self {
            Resource::Http(_) => Kind::HTTPRoute,
            Resource::Grpc(_) => Kind::GRPCRoute,
            Resource::Tcp(_) => Kind::TCPRoute,
            Resource::Service(_) => Kind::ServicePolicy,
            Resource::Authorization(_) | Resource::Unclear(_) => Kind::AuthorizationPolicy,
        }
    }

    pub fn meta(&self) -> &Meta {
        match self {
            Resource::Http(route) => &route.metadata,
            Resource::Grpc(route) => &route.metadata,
            Resource::Tcp(route) => &route.metadata,
            Resource::Service(policy) => &policy.metadata,
            Resource::Authorization(policy) => &policy.metadata,
            Resource::Unclear(policy) => &policy.metadata,
        }
    }

    pub fn id(&self) -> Id {
        let meta = self.meta();
        Id { kind: self.kind(), namespace: meta.namespace.clone(), name: meta.name.clone() }
    }

    pub fn parents(&self) -> &[Parent] {
        self.route().map(RouteSpec::parents).unwrap_or_default()
    }

    fn route(&self) -> Option<&dyn RouteSpec> {
        match self {
            Resource::Http(route) => Some(&route.spec),
            Resource::Grpc(route) => Some(&route.spec),
            Resource::Tcp(route) => Some(&route.spec),
            Resource::Service(_) | Resource::Authorization(_) | Resource::Unclear(_) => None,
        }
    }

    /// What it is attached to, each once.
    pub fn targets(&self) -> Vec<Target> {
        let namespace = &self.meta().namespace;
        let mut targets: Vec<Target> = match self {
            Resource::Service(policy) => policy.spec.target_ref.target(namespace).into_iter().collect(),
            Resource::Authorization(policy) => policy.spec.target_ref.target(namespace).into_iter().collect(),
            Resource::Unclear(policy) => {
                let target = policy.spec.target_ref.as_ref().and_then(|target| target.target(namespace));
                vec![target.unwrap_or(Target::Unknown)]
            }
            _ => self.parents().iter().filter_map(|parent| parent.service(namespace)).map(Target::Service).collect(),
        };
        targets.sort();
        targets.dedup();
        targets
    }

    /// The services it sends to, besides those it is attached to.
    pub fn backends(&self) -> Vec<ServiceName> {
        let namespace = &self.meta().namespace;
        let of = |backends: &[Backend]| backends.iter().filter_map(|backend| backend.service(namespace)).collect();
        match (self, self.route()) {
            (Resource::Service(policy), _) => {
                policy.spec.failover.as_ref().map_or_else(Vec::new, |failover| of(&failover.backend_refs))
            }
            (_, Some(route)) => {
                let sends = route.sends().into_iter();
                sends
                    .flat_map(|(backends, filters)| [of(backends), filters::mirrors(filters, namespace)].concat())
                    .collect()
            }
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;
