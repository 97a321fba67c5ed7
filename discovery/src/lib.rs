//! What the mesh knows about services: sources are watched, merged by precedence, and published as one immutable
//! [`Directory`].
//!
//! ```text
//! Source (files, ...) --SourceEvent--> Held (what is believed of it) --merge--> Directory  (watch::Receiver)
//!                                          \-------------------------------> SourceHealth, shown by `meshd status`
//! ```
//! A source that fails never empties the directory: what it said last stays in force and its health says why. Nor does
//! one that suddenly says less: `belief.rs`.

mod backoff;
mod belief;
mod config;
mod consul;
mod directory;
mod documents;
mod etcd;
#[cfg(any(test, feature = "testing"))]
pub mod fake;
mod files;
mod held;
mod interests;
mod kubernetes;
mod lookups;
mod merge;
mod name;
mod record;
mod register;
mod registration;
pub mod resources;
mod resync;
mod saved;
mod shared;
mod source;
mod stored;
mod suspicion;
mod types;
mod unix_time;
mod watch;
mod watched;
pub mod write;
mod yaml;

pub use belief::{Belief, REPEATED_FOR};
pub use config::{ConfigError, Configured, Imports, Namespaces, NamespacesError, Provides, SourceConfig, SourceKind};
pub use consul::{ConsulSource, Settings as ConsulSettings, SettingsError as ConsulSettingsError};
pub use directory::Directory;
pub use documents::{DEFAULT_MESH_PORT, DEFAULT_WEIGHT, MAX_WEIGHT};
pub use etcd::EtcdSource;
pub use files::FilesSource;
pub use kubernetes::{KubernetesSettings, KubernetesSource};
pub use lookups::{Import, Looked, Lookups, Why};
pub use name::{NameError, ServiceName};
pub use record::{Definition, Place, PortTarget, Record};
#[cfg(any(test, feature = "testing"))]
pub use register::fake as fake_registry;
pub use register::{
    Answer, Found, Hold, HostConfig, Key, Offer, Over, Owner, Phase, Registrar, RegistrarError, RegistrationHealth,
    Registrations,
};
pub use registration::Registration;
pub use saved::Keep;
pub use source::{Change, Epoch, Listing, Refused, Scope, Sink, Source, SourceEvent, SourceFuture, Wanted};
pub use types::{Endpoint, Health, Protocol, Service, ServicePort, Transport};
pub use watch::{Losses, Suspects, Watcher, settled};
pub use watched::SourceHealth;
