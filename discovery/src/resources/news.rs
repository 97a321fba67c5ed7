//! What a source tells of resources, and what of it is this host's concern.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Resource, Target};
use crate::{Epoch, Refused, Wanted};

/// Something a source says under a key of its own. An import is several resources.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub key: Arc<str>,
    /// Where to look for it, in messages.
    pub origin: Arc<str>,
    pub resources: Vec<Resource>,
}

impl Record {
    /// It stands for a document that nobody understands.
    pub(crate) fn is_unclear(&self) -> bool {
        matches!(self.resources[..], [Resource::Unclear(_)])
    }
}

/// A document that cannot be understood; what its key said before stays in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub key: Arc<str>,
    /// Full messages for the operator.
    pub problems: Vec<String>,
    /// What its key says where it said nothing good before: of what would have decided who may do what, that nobody knows.
    pub meanwhile: Option<Record>,
}

impl From<Refused> for Refusal {
    fn from(Refused { key, problems }: Refused) -> Refusal {
        Refusal { key, problems, meanwhile: None }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Set(Record),
    /// By its key.
    Removed(Arc<str>),
    Refused(Refusal),
}

/// What a source tells of resources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// All there is below a prefix of keys. What was said before of it, and is not in it, is gone.
    Listed { prefix: Arc<str>, epoch: Epoch, records: Vec<Record>, refused: Vec<Refusal> },
    /// What happened since the list of that prefix, up to a position.
    Changed { prefix: Arc<str>, position: u64, changes: Vec<Change> },
}

impl Change {
    /// Whether it is this host's concern. What cannot be understood may be.
    pub(crate) fn is_wanted(&self, wanted: &Wanted) -> bool {
        match self {
            Change::Set(record) => is_wanted(&record.resources, wanted),
            Change::Removed(_) | Change::Refused(_) => true,
        }
    }
}

impl News {
    /// All there is, out of what was read of each key.
    pub(crate) fn listed(prefix: Arc<str>, epoch: Epoch, read: impl Iterator<Item = Change>) -> News {
        let (mut records, mut refused) = (Vec::new(), Vec::new());
        for change in read {
            match change {
                Change::Set(record) => records.push(record),
                Change::Refused(key) => refused.push(key),
                Change::Removed(_) => {}
            }
        }
        News::Listed { prefix, epoch, records, refused }
    }

    /// Without what is no concern of this host.
    pub(crate) fn wanted(self, wanted: &Wanted) -> News {
        match self {
            News::Listed { prefix, epoch, mut records, refused } => {
                records.retain(|record| is_wanted(&record.resources, wanted));
                News::Listed { prefix, epoch, records, refused }
            }
            News::Changed { prefix, position, changes } => {
                let left_out = |change| match change {
                    // It may have been before.
                    Change::Set(record) if !is_wanted(&record.resources, wanted) => Change::Removed(record.key),
                    change => change,
                };
                News::Changed { prefix, position, changes: changes.into_iter().map(left_out).collect() }
            }
        }
    }
}

impl News {
    pub(super) fn prefix(&self) -> &Arc<str> {
        match self {
            News::Listed { prefix, .. } | News::Changed { prefix, .. } => prefix,
        }
    }

    /// Nothing but what cannot be read or understood, which says nothing of how the source is.
    pub(crate) fn is_trouble(&self) -> bool {
        let refused = |change: &Change| matches!(change, Change::Refused(_));
        matches!(self, News::Changed { changes, .. } if !changes.is_empty() && changes.iter().all(refused))
    }
}

impl Default for News {
    fn default() -> News {
        News::Changed { prefix: "".into(), position: 0, changes: Vec::new() }
    }
}

/// Policies decide here, too, about what is served here and imported nowhere; routes are for those who import.
pub(super) fn is_wanted(resources: &[Resource], wanted: &Wanted) -> bool {
    resources.iter().any(|resource| {
        let targets = || resource.targets().into_iter();
        !resource.kind().is_route()
            || targets().any(|target| matches!(target, Target::Service(service) if wanted.covers(&service)))
    })
}
