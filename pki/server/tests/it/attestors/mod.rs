//! Hosts that come in by what they have already: machine certificates, and tokens of Kubernetes.

mod kubernetes;
mod machines;
