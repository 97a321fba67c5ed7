//! The PKI on a real etcd cluster, with what goes wrong there.

mod cluster;
mod desk;
mod edges;
mod faults;
mod moving;
mod operators;
mod processes;
mod replicas;
mod way;
