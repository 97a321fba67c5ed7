//! Documents in a backend, for operators: read, written and deleted by the verbs `get`, `apply` and `delete`.
//!
//! ```text
//! text --manifest.rs--> Manifest (hosts would take it) --apply.rs--> Store (files | etcd | Consul | Kubernetes)
//! ```
//! A [`Store`] carries out single steps on one backend, each over what was read before, so that nobody's change is lost
//! unseen. Hosts do not pass through here: they read the same backend by their `Source`.

mod apply;
mod error;
mod files;
mod kind;
mod manifest;

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::{fmt, io};

use serde_json::Value;

pub use crate::resources::Kind;
pub use apply::{Applying, Outcome, apply, delete};
pub use error::StoreError;
pub use kind::{ResourceName, kind_named};
pub use manifest::{Manifest, NOTED, read, versioned, yaml};

pub(crate) use files::FilesStore;
pub(crate) use kind::Keys;
pub(crate) use manifest::understand;

pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Replaces a file, whole or not at all.
pub type Replace = fn(&Path, &str) -> io::Result<()>;

/// One backend that documents lie in. The simplest one is `FilesStore`.
pub trait Store: Send + Sync {
    /// Of its source.
    fn name(&self) -> &str;

    /// Of one namespace, or all.
    fn list<'a>(&'a self, kind: Kind, namespace: Option<&'a str>) -> Answer<'a, Vec<Stored>>;

    fn get<'a>(&'a self, resource: &'a ResourceName) -> Answer<'a, Option<Stored>>;

    /// False if it was so already.
    fn write<'a>(&'a self, write: Write<'a>) -> Answer<'a, bool>;

    /// `version`: which one it is to be; `None`: any.
    fn remove<'a>(&'a self, resource: &'a ResourceName, version: Option<&'a str>) -> Answer<'a, ()>;
}

/// A document as a backend has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub resource: ResourceName,
    /// Where it lies: a file and line, a key, an object.
    pub origin: String,
    /// Another one after every write.
    pub version: String,
    /// Who wrote it last, and when, as far as the backend knows.
    pub by: Option<String>,
    /// Without what backends add; what is wrong with it if it is no document at all.
    pub document: Result<Value, String>,
}

/// What a write goes over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Over {
    Nothing,
    Version(String),
    /// Whatever is there.
    Anything,
}

/// One document to be written.
#[derive(Clone, Copy)]
pub struct Write<'a> {
    pub manifest: &'a Manifest,
    pub by: &'a By,
    pub over: &'a Over,
    /// All checks, no change.
    pub dry_run: bool,
}

/// Who writes, and when: `root@web 2026-11-22T05:10:00Z`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct By(String);

impl By {
    pub fn new(text: &str) -> By {
        By(crate::yaml::printable(text))
    }
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
