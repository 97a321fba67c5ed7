//! Conditions of a ServiceProfile as matches of an HTTPRoute: any of several, each of which is all of its parts.

use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::forms::{EXPRESSION, METHOD};
use super::shape::{Object, Rule, Shape};

/// A rule of an HTTPRoute has no more.
pub(super) const MOST_MATCHES: usize = 64;
/// Conditions within conditions.
pub(super) const DEEPEST: usize = 4;

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Condition {
    all: Vec<Condition>,
    any: Vec<Condition>,
    path_regex: Option<String>,
    method: Option<String>,
}

pub(super) fn condition(depth: usize) -> Object {
    let leaf = Object::new()
        .may("pathRegex", &EXPRESSION, "of the whole path")
        .may("method", &METHOD, "of the request")
        .refused("not", "an HTTPRoute cannot say what does not match; put a rule for it before this one");
    if depth == 0 {
        return leaf;
    }
    leaf.may("all", Shape::list_of_some(condition(depth - 1), 16), "all of them")
        .may("any", Shape::list_of_some(condition(depth - 1), 64), "any of them")
        .rule(Rule::AtLeastOne(&["all", "any", "pathRegex", "method"]))
}

#[derive(Clone, Default)]
pub(super) struct Alternative {
    path: Option<String>,
    method: Option<String>,
}

impl Alternative {
    pub(super) fn json(self) -> Json {
        let mut found = json!({});
        // Also where any path will do: among expressions the first rule holds, as in a profile, and a prefix comes later.
        let path = self.path.unwrap_or_else(|| ".*".to_owned());
        found["path"] = json!({ "type": "RegularExpression", "value": path });
        if let Some(method) = self.method {
            found["method"] = method.into();
        }
        found
    }

    fn and(mut self, other: &Alternative) -> Result<Alternative, &'static str> {
        for (mine, theirs) in [(&mut self.path, &other.path), (&mut self.method, &other.method)] {
            if mine.is_some() && theirs.is_some() && mine != theirs {
                return Err(
                    "asks one request to match two paths or methods, which an HTTPRoute cannot; write one expression",
                );
            }
            *mine = mine.take().or_else(|| theirs.clone());
        }
        Ok(self)
    }
}

pub(super) fn alternatives(condition: &Condition) -> Result<Vec<Alternative>, &'static str> {
    let own = Alternative { path: condition.path_regex.clone(), method: condition.method.clone() };
    let mut found = vec![own];
    let any: Result<Vec<_>, _> = condition.any.iter().map(alternatives).collect();
    let any = any?.concat();
    let parts = condition.all.iter().map(alternatives).chain((!any.is_empty()).then_some(Ok(any)));
    for part in parts {
        let part = part?;
        if found.len() * part.len() > MOST_MATCHES {
            return Err("its condition becomes too many matches; split the route");
        }
        let both = found.iter().flat_map(|one| part.iter().map(|other| one.clone().and(other)));
        found = both.collect::<Result<_, _>>()?;
    }
    Ok(found)
}
