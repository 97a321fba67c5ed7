//! What operators ask a running daemon: a Unix socket for the CLI, an HTTP port for Prometheus.

mod client;
mod control;
mod endpoints;
mod federation;
mod intercept;
mod ledger;
mod pki;
mod probe;
mod registrations;
mod server;
mod show;
pub(crate) mod sources;
mod tasks;
mod view;
mod withheld;

pub use client::{AdminError, fetch, order};
pub use control::{ApplyOrder, Control, Reload};
pub use endpoints::{AcceptOrder, EndpointView, endpoints};
pub use federation::FederationView;
pub use intercept::{InterceptPlan, InterceptStatus};
pub use ledger::{CallerView, LedgerView, PortView, ledger};
pub use pki::PkiView;
pub use probe::{OutcomeAsked, ProbeOutcome, ProbeRequest, ProbeView};
pub use server::{bind, bind_with_mode, serve_metrics, serve_socket};
pub use show::{edges, status};
pub use tasks::TaskView;
pub use view::{EdgeView, EnrolledView, StatusView, View};
pub use withheld::WithheldView;
