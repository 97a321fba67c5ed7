//! A list that is read while the watches go on: what they tell meanwhile is told at once, and the list is brought up to it.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use meshd_etcd::Error;

use super::remote::{Listed, Part, Remote, Told};
use crate::{Scope, ServiceName};

/// What is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Job {
    /// A part, for the first time or again.
    Part(Part),
    /// One service of a part that has more of them.
    Service { name: ServiceName, within: Scope },
}

pub(super) struct Beside {
    pub(super) job: Job,
    /// How far all was known when it began.
    pub(super) begun_at: u64,
    /// What the watches told of it since.
    since: Vec<(u64, Told)>,
    answer: Pin<Box<dyn Future<Output = Result<Listed, Error>> + Send>>,
}

impl Job {
    /// What is followed already, and of which this is all or some.
    pub(super) fn part(&self) -> Part {
        match self {
            Job::Part(part) => part.clone(),
            Job::Service { within, .. } => Part::Services(within.clone()),
        }
    }

    fn list(&self) -> Part {
        match self {
            Job::Part(part) => part.clone(),
            Job::Service { name, .. } => Part::Services(Scope::Service(name.clone())),
        }
    }
}

impl Beside {
    pub(super) fn begin<R: Remote + 'static>(job: Job, begun_at: u64, remote: &R) -> Beside {
        let (mut remote, list) = (remote.another(), job.list());
        let answer = Box::pin(async move { remote.list(&list).await });
        Beside { job, begun_at, since: Vec::new(), answer }
    }

    /// The watch of a part told something.
    pub(super) fn heard(
        &mut self,
        part: &Part,
        news: &[(u64, Told)],
        service_of: impl Fn(&str) -> Option<ServiceName>,
    ) {
        if self.job.part() != *part {
            return;
        }
        let concerns = |told: &Told| match &self.job {
            Job::Part(_) => true,
            Job::Service { name, .. } => service_of(told.key()).as_ref() == Some(name),
        };
        self.since.extend(news.iter().filter(|(_, told)| concerns(told)).cloned());
    }

    /// What was listed, and what was told since.
    pub(super) fn bring_up(self, listed: Listed) -> (Job, Listed) {
        (self.job, brought_up(listed, self.since))
    }
}

/// For good where nothing is read.
pub(super) async fn answer(beside: &mut Option<Beside>) -> Result<Listed, Error> {
    match beside {
        Some(beside) => beside.answer.as_mut().await,
        None => std::future::pending().await,
    }
}

/// As it was when the last of the changes was made.
fn brought_up(listed: Listed, since: Vec<(u64, Told)>) -> Listed {
    let Listed { mut epoch, told } = listed;
    let as_of = epoch.position;
    let mut by_key: BTreeMap<Arc<str>, Told> = told.into_iter().map(|told| (told.key().clone(), told)).collect();
    for (revision, told) in since.into_iter().filter(|(revision, _)| *revision > as_of) {
        epoch.position = epoch.position.max(revision);
        if told.is_removal() {
            by_key.remove(told.key());
        } else {
            by_key.insert(told.key().clone(), told);
        }
    }
    Listed { epoch, told: by_key.into_values().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Change, Epoch, fake};

    fn set(name: &str, address: &str) -> Told {
        Told::Service(Change::Set(fake::record(name, &[address])))
    }

    #[test]
    fn a_list_is_brought_up_to_what_was_told_after_it_was_made_and_not_before() {
        let listed = Listed {
            epoch: Epoch { store: "one".into(), position: 10 },
            told: vec![set("a.shop", "10.0.0.1"), set("b.shop", "10.0.0.2"), set("c.shop", "10.0.0.3")],
        };
        let removed = |key: &str| Told::Service(Change::Removed(key.into()));
        let since = vec![
            (9, removed("a.shop")),
            (10, set("c.shop", "10.0.0.8")),
            (11, set("d.shop", "10.0.0.4")),
            (12, removed("b.shop")),
            (13, set("c.shop", "10.0.0.9")),
        ];
        let now = brought_up(listed, since);
        assert_eq!(now.epoch.position, 13);
        assert_eq!(now.told, [set("a.shop", "10.0.0.1"), set("c.shop", "10.0.0.9"), set("d.shop", "10.0.0.4")]);
    }
}
