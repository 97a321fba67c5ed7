//! How far one kind of objects is known, and by which watch.

use super::remote::Collection;
use super::work::Task;

/// Objects of one kind.
#[derive(Debug, Default)]
pub(super) struct Feed {
    pub(super) what: Option<Collection>,
    /// As of where they are known.
    pub(super) position: Option<String>,
    /// What a watch says of before its list is old.
    listed: u64,
    pub(super) watch: Option<Task>,
    /// It cannot be followed, until it is listed again: the cluster has no such kind, does not show it, or has forgotten
    /// what a watch from there needs.
    pub(super) is_away: bool,
}

impl Feed {
    pub(super) fn away() -> Feed {
        Feed { is_away: true, ..Feed::default() }
    }

    /// False for what is known already.
    pub(super) fn moves(&mut self, position: &str) -> bool {
        let is_news = position.parse().map_or(!position.is_empty(), |position: u64| position > self.listed);
        if is_news {
            self.position = Some(position.to_owned());
        }
        is_news
    }

    pub(super) fn says(&self, number: u64) -> bool {
        self.watch.as_ref().is_some_and(|watch| watch.number == number)
    }

    /// It is watched again when it was listed again.
    pub(super) fn give_up(&mut self) {
        (self.watch, self.is_away) = (None, true);
    }

    pub(super) fn is_watched(&self) -> bool {
        self.is_away || self.watch.as_ref().is_some_and(|watch| watch.is_begun)
    }

    /// A watch that goes on tells the same once more at most.
    pub(super) fn listed(&mut self, what: Collection, position: String, goes_on: bool) {
        if !goes_on || self.what.as_ref() != Some(&what) {
            self.watch = None;
        }
        let known = self.position.take().filter(|known| self.watch.is_some() && is_before(&position, known));
        self.listed = position.parse().unwrap_or(0);
        self.position = Some(known.unwrap_or(position));
        (self.what, self.is_away) = (Some(what), false);
    }
}

/// Numbers in all versions of Kubernetes there are.
pub(super) fn is_before(position: &str, known: &str) -> bool {
    matches!((position.parse::<u64>(), known.parse::<u64>()), (Ok(position), Ok(known)) if position < known)
}
