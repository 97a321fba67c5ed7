//! The gRPC APIs by which programs of a host get their identity, generated from `proto/`: the SPIFFE Workload API, and
//! what Envoy's secret discovery needs.

pub mod spiffe {
    // Generated code follows its own style.
    #![allow(clippy::all, unreachable_pub, unused_qualifications)]
    // The standard gives it no package.
    tonic::include_proto!("_");
}

pub mod envoy {
    #![allow(clippy::all, unreachable_pub, unused_qualifications)]
    tonic::include_proto!("envoy.service.secret.v3");
}

/// Claims of a token.
pub use prost_types::{ListValue, Struct, Value, value::Kind};
