//! How bytes travel between hosts: docs/wire.md, normative.
//!
//! `wire` holds the protocol's names and limits, `tls` the certificates' side of it, `trust` whom it believes, `secure_io` the
//! encrypted byte stream, `mesh` one HTTP/2 connection over it, `dial` opens them and `pool` shares them, until `generations`
//! says that they are old; `chunk` reads a local application's bytes.

pub mod chunk;
pub mod denied;
pub mod dial;
pub mod generations;
pub mod mesh;
pub mod pool;
pub mod secure_io;
pub mod self_check;
pub mod tls;
pub mod trust;
pub mod wire;
