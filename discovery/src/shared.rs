//! Texts that the places of a service repeat, each kept once: a service of a thousand endpoints has three zones.

use std::sync::Arc;

use meshd_identity::SpiffeId;

use crate::Place;

/// Zones, networks and identities of one service are few. What differs beyond this keeps its own.
const MOST: usize = 16;

#[derive(Default)]
pub(crate) struct Shared {
    words: Vec<Arc<str>>,
    identities: Vec<SpiffeId>,
}

impl Shared {
    /// What the places of a service share with those that are known.
    pub(crate) fn of<'a>(known: impl Iterator<Item = &'a Arc<Place>>) -> Shared {
        let mut shared = Shared::default();
        for place in known.take(MOST) {
            for word in [&place.zone, &place.network] {
                note(&mut shared.words, word);
            }
            place.identity.iter().for_each(|identity| note(&mut shared.identities, identity));
        }
        shared
    }

    pub(crate) fn share(&mut self, place: &mut Arc<Place>) {
        // Who else holds it has kept it long since.
        let Some(place) = Arc::get_mut(place) else { return };
        for word in [&mut place.zone, &mut place.network] {
            *word = known(&mut self.words, word);
        }
        if let Some(identity) = &mut place.identity {
            *identity = known(&mut self.identities, identity);
        }
    }
}

fn note<T: Clone + PartialEq>(known: &mut Vec<T>, value: &T) {
    if known.len() < MOST && !known.contains(value) {
        known.push(value.clone());
    }
}

fn known<T: Clone + PartialEq>(all: &mut Vec<T>, value: &T) -> T {
    note(all, value);
    all.iter().find(|known| *known == value).unwrap_or(value).clone()
}
