//! One service of an area that has more of them, read again by itself because an endpoint of it cannot be reached. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::area::{Happened, is_before};
use super::kept::Kept;
use super::lists::{Answer, Lists, Plan};
use super::objects::{Kind, Object};
use super::pick::Pick;
use super::work::Task;
use crate::{Scope, ServiceName};

#[derive(Debug)]
pub(super) struct Reread {
    task: Task,
    /// As of where each kind was known when it was asked for.
    known: BTreeMap<Kind, String>,
    /// What watches said something of since: they know better.
    heard: BTreeSet<Id>,
}

/// Which object.
type Id = (Kind, Arc<str>);

fn id_of(object: &Object) -> Id {
    match object {
        Object::Service(service) => (Kind::Service, service.name.as_str().into()),
        Object::Slice(slice) => (Kind::Slice, slice.key.clone()),
        Object::Pod(key, _) => (Kind::Pod, key.clone()),
        Object::Lease(lease) => (Kind::Lease, lease.name.as_str().into()),
        Object::Mesh(document) => (Kind::Mesh, document.name.as_str().into()),
    }
}

/// What is asked for, as for a service that is followed by itself: little, which the server's cache tells.
pub(super) fn plan(name: &ServiceName, known: BTreeMap<Kind, String>) -> Plan {
    let scope = Scope::Service(name.clone());
    Plan { pick: Pick::of(&scope, std::slice::from_ref(&scope)), scope, known }
}

impl Reread {
    pub(super) fn new(plan: &Plan, task: Task) -> Reread {
        Reread { task, known: plan.known.clone(), heard: BTreeSet::new() }
    }

    pub(super) fn is(&self, number: u64) -> bool {
        self.task.number == number
    }

    pub(super) fn hears(&mut self, happened: &Happened) {
        let (Happened::Set(object) | Happened::Gone(object)) = happened;
        self.heard.insert(id_of(object));
    }

    /// What of the answer no watch has told; `None`: the store was put back.
    pub(super) fn news(self, name: &ServiceName, lists: Lists, kept: &Kept) -> Option<Vec<Happened>> {
        let mut news = Vec::new();
        for (kind, answer) in lists {
            let Answer::Listed(_, listed) = answer else { continue };
            if self.known.get(&kind).is_some_and(|known| is_before(&listed.position, known)) {
                return None;
            }
            let there: BTreeSet<Id> = listed.objects.iter().map(id_of).collect();
            if kind == Kind::Slice {
                let gone = kept.slices_of(name).filter(|slice| !there.contains(&(kind, slice.key.clone())));
                news.extend(gone.map(|slice| Happened::Gone(Object::Slice(slice.clone()))));
            }
            news.extend(listed.objects.into_iter().filter(|object| is_of(object, name)).map(Happened::Set));
        }
        news.retain(|(Happened::Set(object) | Happened::Gone(object))| !self.heard.contains(&id_of(object)));
        Some(news)
    }
}

/// The server selects pods, and cannot select all else.
fn is_of(object: &Object, name: &ServiceName) -> bool {
    match object {
        Object::Service(service) => service.name == *name,
        Object::Slice(slice) => slice.service == *name,
        Object::Mesh(document) => document.name == *name,
        Object::Pod(..) | Object::Lease(_) => true,
    }
}
