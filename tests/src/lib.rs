//! The harness: hosts as network namespaces on one machine, a mesh built on them, faults, captures, and asserts on
//! metrics and access logs. Scenarios and `cargo xtask demo|bench` stand on it; nothing here is specific to one of them.

pub mod access_log;
pub mod authority;
pub mod backend;
pub mod binaries;
mod cache;
pub mod capture;
mod cgroup;
pub mod clock;
pub mod command;
pub mod consul;
pub mod daemon;
pub mod disk;
pub mod dns;
pub mod etcd;
pub mod fault;
pub mod host;
pub mod http;
pub mod kubernetes;
pub mod lab;
pub mod load;
pub mod machine;
pub mod mesh;
pub mod metrics;
pub mod packages;
pub mod pcap;
pub mod plan;
pub mod process;
pub mod python;
pub mod root;
pub mod servers;
pub mod wait;
