//! HOW an area is listed: each kind after the other, all of them before anything is told of it.

use std::collections::BTreeMap;

use super::error::Error;
use super::objects::{Kind, Listed, Object};
use super::pick::Pick;
use super::remote::{Collection, Remote};
use crate::Scope;

/// In this order: the selectors of Services say which pods, and pods of a slice that are known need not be waited for.
const KINDS: [Kind; 4] = [Kind::Service, Kind::Slice, Kind::Pod, Kind::Mesh];

/// What is to be asked for.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) scope: Scope,
    pub(super) pick: Pick,
    /// As of where each kind is known.
    pub(super) known: BTreeMap<Kind, String>,
}

pub(super) type Lists = Vec<(Kind, Answer)>;

#[derive(Debug)]
pub(super) enum Answer {
    Listed(Collection, Listed),
    /// There is nothing of the kind: no pods behind Services, no documents in the cluster.
    Nothing,
    /// Documents are there, and may not be read.
    Denied(String),
}

impl Plan {
    pub(super) async fn read<R: Remote>(&self, remote: &R) -> Result<Lists, Error> {
        let mut lists = Lists::new();
        let mut selectors = Vec::new();
        for kind in KINDS {
            let answer = match self.pick.collection(kind, selectors.iter()) {
                None => Answer::Nothing,
                Some(what) => self.list(remote, what).await?,
            };
            if let (Kind::Service, Answer::Listed(_, listed)) = (kind, &answer) {
                selectors = self.selectors(&listed.objects);
            }
            lists.push((kind, answer));
        }
        Ok(lists)
    }

    async fn list<R: Remote>(&self, remote: &R, what: Collection) -> Result<Answer, Error> {
        let known = self.known.get(&what.kind).map(String::as_str);
        match remote.list(&what, known).await {
            Err(Error::NotServed) => Ok(Answer::Nothing),
            // Services need not suffer for what came with another right.
            Err(error @ Error::Forbidden { .. }) if what.kind == Kind::Mesh => Ok(Answer::Denied(error.to_string())),
            listed => Ok(Answer::Listed(what, listed?)),
        }
    }

    fn selectors(&self, services: &[Object]) -> Vec<BTreeMap<String, String>> {
        let selector = |object: &Object| match object {
            Object::Service(service) if self.pick.holds(&service.name) => Some(service.selector.clone()),
            _ => None,
        };
        services.iter().filter_map(selector).collect()
    }
}
