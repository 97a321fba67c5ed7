//! WHICH objects of an area are followed: as few as the server can tell apart. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::objects::{Kind, SERVICE_NAME};
use super::remote::Collection;
use crate::{Scope, ServiceName};

/// More names than this are followed with all others: a selector is a part of an address, and the server matches it
/// against every object.
pub(super) const MOST_NAMED: usize = 64;

type Selector = BTreeMap<String, String>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pick {
    area: Scope,
    /// Of a namespace, these alone; `None`: all of the area.
    names: Option<BTreeSet<ServiceName>>,
}

impl Pick {
    /// What is wanted of an area that is read for these.
    pub(super) fn of(area: &Scope, told_as: &[Scope]) -> Pick {
        let name = |scope: &Scope| match scope {
            Scope::Service(name) => Some(name.clone()),
            _ => None,
        };
        let names = match area {
            Scope::Service(_) => None,
            _ => told_as.iter().map(name).collect(),
        };
        Pick { area: area.clone(), names }
    }

    pub(super) fn holds(&self, name: &ServiceName) -> bool {
        self.names.as_ref().map_or_else(|| self.area.holds(name), |names| names.contains(name))
    }

    pub(super) fn covers(&self, scope: &Scope) -> bool {
        match (&self.names, scope) {
            (None, scope) => self.area.overlaps(scope),
            (Some(names), Scope::Service(name)) => names.contains(name),
            (Some(_), _) => false,
        }
    }

    pub(super) fn is_one(&self) -> bool {
        matches!(self.area, Scope::Service(_))
    }

    /// Which pods are there depends on which Services are.
    pub(super) fn is_by_selectors(&self) -> bool {
        self.names.is_some() || matches!(self.area, Scope::Service(_))
    }

    /// What is followed of a kind, where its Services select pods so; nothing where no pods are behind them.
    pub(super) fn collection<'a>(
        &self,
        kind: Kind,
        selectors: impl Iterator<Item = &'a Selector>,
    ) -> Option<Collection> {
        let labels = match kind {
            Kind::Pod if self.is_by_selectors() => pods_of(&selectors.filter(|it| !it.is_empty()).collect::<Vec<_>>())?,
            Kind::Slice => self.slices(),
            _ => String::new(),
        };
        let is_little = self.is_by_selectors() && (kind != Kind::Pod || !labels.is_empty());
        Some(Collection { kind, area: self.area.clone(), labels, is_little })
    }

    fn slices(&self) -> String {
        match &self.names {
            Some(names) if names.len() <= MOST_NAMED => one_of(SERVICE_NAME, names.iter().map(ServiceName::name)),
            _ => String::new(),
        }
    }
}

/// Labels that all pods of these selectors have, and as few others as can be said: alternatives of one label only.
fn pods_of(selectors: &[&Selector]) -> Option<String> {
    let first = selectors.first()?;
    if selectors.iter().all(|selector| selector == first) {
        let labels: Vec<String> = first.iter().map(|(key, value)| format!("{key}={value}")).collect();
        return Some(labels.join(","));
    }
    let values = |key: &String| selectors.iter().map(|selector| selector.get(key)).collect::<Option<BTreeSet<_>>>();
    // Of several the one that tells most apart.
    let shared = first.keys().filter_map(|key| Some((key, values(key)?)));
    let best = shared.filter(|(_, values)| values.len() <= MOST_NAMED).max_by_key(|(_, values)| values.len());
    Some(best.map(|(key, values)| one_of(key, values.into_iter().map(String::as_str))).unwrap_or_default())
}

fn one_of<'a>(label: &str, values: impl Iterator<Item = &'a str>) -> String {
    format!("{label} in ({})", values.collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selectors(all: &[&[(&str, &str)]]) -> Vec<Selector> {
        let selector = |one: &&[(&str, &str)]| one.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        all.iter().map(selector).collect()
    }

    fn labels(pick: &Pick, kind: Kind, of: &[Selector]) -> Option<String> {
        pick.collection(kind, of.iter()).map(|collection| collection.labels)
    }

    fn named(number: usize) -> Pick {
        let told_as: Vec<Scope> = (0..number).map(|n| Scope::Service(format!("s{n}.shop").parse().unwrap())).collect();
        Pick::of(&Scope::Namespace("shop".into()), &told_as)
    }

    #[test]
    fn of_a_namespace_no_slices_but_those_of_named_services_are_followed() {
        let pick = named(3);
        assert_eq!(labels(&pick, Kind::Slice, &[]).unwrap(), "kubernetes.io/service-name in (s0,s1,s2)");
        assert!(pick.holds(&"s1.shop".parse().unwrap()) && !pick.holds(&"s3.shop".parse().unwrap()));
        assert_eq!(labels(&named(MOST_NAMED + 1), Kind::Slice, &[]).unwrap(), "", "too many to be named");
        let all = Pick::of(&Scope::Namespace("shop".into()), &[Scope::Namespace("shop".into())]);
        assert!(all.holds(&"s3.shop".parse().unwrap()) && !all.holds(&"s3.bank".parse().unwrap()));
    }

    #[test]
    fn pods_are_followed_by_a_label_that_all_their_services_select_by() {
        let pick = named(3);
        assert_eq!(labels(&pick, Kind::Pod, &selectors(&[&[]])), None, "no pods are behind them");
        let one = selectors(&[&[("app", "a"), ("tier", "web")], &[("app", "a"), ("tier", "web")]]);
        assert_eq!(labels(&pick, Kind::Pod, &one).unwrap(), "app=a,tier=web");
        let alike = selectors(&[&[("app", "a"), ("tier", "web")], &[("app", "b"), ("tier", "web")]]);
        assert_eq!(labels(&pick, Kind::Pod, &alike).unwrap(), "app in (a,b)");
        let unlike = selectors(&[&[("app", "a")], &[("name", "b")]]);
        assert_eq!(labels(&pick, Kind::Pod, &unlike).unwrap(), "", "all of the namespace");
    }
}
