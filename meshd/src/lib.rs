//! meshd: the mesh daemon of one host.
//!
//! An application's connection is captured by the kernel (`capture`), arrives at a worker (`proxy`),
//! is identified, resolved, balanced and carried over mutual TLS (`transport`) to the meshd of another
//! host, whose `proxy::inbound` authorizes and delivers it. What the steps need to know comes from
//! `enrol` (which units of this host are whom), the discovery crate (where services are) and
//! `meshd-pki-client` (certificates); `dns` gives services names and virtual IPs. `telemetry` counts,
//! `admin` shows, `app` puts it all together, `lifecycle` ends it.

pub mod admin;
pub mod app;
pub mod attest;
pub mod capture;
pub mod check;
pub mod config;
pub mod dns;
pub mod durable;
pub mod enrol;
pub mod fault;
mod host;
pub mod lifecycle;
mod offers;
pub mod only_one;
pub mod proxy;
mod raw;
pub mod telemetry;
mod tool;
pub mod transport;
mod unix_time;
pub mod workload_api;
