//! HAProxy on both hosts, as its users get the most out of it: HTTP/2 on pooled TLS 1.3 connections with certificates
//! on both sides between them. (In TCP mode every connection costs a handshake: 20 times as much.)

pub(crate) const NEAR: &str = include_str!("haproxy-near.cfg");
pub(crate) const FAR: &str = include_str!("haproxy-far.cfg");
pub(crate) const ARGUMENTS: &[&str] = &["-db", "-f"];
