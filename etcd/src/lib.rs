//! What the mesh needs of etcd: reading, transactions, watching, leases; over TLS, with any of its ways to authenticate,
//! on the first member that answers. Why not a client crate: docs/adr/0008.

mod client;
mod connection;
mod ops;
mod settings;

pub use client::{Client, Error, Listed, Watches, Watching};
pub use ops::{Prefix, absent, created_at, delete, get, none_changed_since, put, unchanged};
pub use settings::{Settings, SettingsError};

pub mod api {
    // Generated code follows its own style.
    #![allow(clippy::all, unreachable_pub, unused_qualifications)]
    tonic::include_proto!("etcdserverpb");
}
