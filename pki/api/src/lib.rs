//! The wire APIs of the PKI: with hosts (`proto/meshd/pki/v1`) and with operators (`proto/meshd/pki/admin/v1`); and that of
//! Istio, for its proxies (`proto/istio/v1/auth`).

mod codec;

pub mod v1 {
    // Generated code follows its own style.
    #![allow(clippy::all, unreachable_pub, unused_qualifications)]
    tonic::include_proto!("meshd.pki.v1");
}

pub mod admin {
    #![allow(clippy::all, unreachable_pub, unused_qualifications)]
    tonic::include_proto!("meshd.pki.admin.v1");
}

pub mod istio {
    #![allow(clippy::all, unreachable_pub, unused_qualifications)]
    tonic::include_proto!("istio.v1.auth");

    pub use prost_types::value::Kind;
    pub use prost_types::{Struct, Value};
}

/// The most identities one `IssueBatch` may carry.
pub const MAX_BATCH: usize = 500;
/// A batch of the largest size with its certificates stays well below this.
pub const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;
