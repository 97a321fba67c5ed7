//! What the mesh knows about services: sources are watched, merged by precedence, and published as one immutable
//! [`Directory`].
//!
//! ```text
//! Source (files, ...) --SourceEvent--> Watcher --merge--> Directory  (watch::Receiver<Arc<Directory>>)
//!                                         \-------------> SourceHealth, shown by `meshd status`
//! ```
//! A source that fails never empties the directory: what it said last stays in force and its health says why.

mod config;
mod directory;
mod documents;
#[cfg(any(test, feature = "testing"))]
pub mod fake;
mod files;
mod merge;
mod name;
mod source;
mod types;
mod watch;
mod yaml;

pub use config::{Authority, AuthorityError, ConfigError, Configured, SourceConfig, SourceKind};
pub use directory::Directory;
pub use documents::DEFAULT_MESH_PORT;
pub use files::FilesSource;
pub use merge::{Layer, LayerReport, Merged, merge};
pub use name::{NameError, ServiceName};
pub use source::{Offer, Sink, Source, SourceEvent, SourceFuture};
pub use types::{Endpoint, Health, Protocol, Service, ServicePort, Transport};
pub use watch::{SourceHealth, Watcher, settled};
