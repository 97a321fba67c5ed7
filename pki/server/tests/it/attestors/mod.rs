//! Hosts that come in by what they have already: machine certificates, and tokens of Kubernetes; and pods of Istio.

pub(crate) mod istio;
mod kubernetes;
mod machines;
