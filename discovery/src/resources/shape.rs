//! What may be in a document, as data: the parser checks by it, and the published schemas are made of it (`schema.rs`).

use std::collections::HashSet;

use super::forms::Form;
use crate::yaml::{Field, Problem, Value, printable, unknown};

pub(crate) enum Shape {
    Object(Object),
    /// Any names, each with text: labels and annotations.
    Texts,
    List {
        of: Box<Shape>,
        least: usize,
        most: usize,
        unique: Option<Unique>,
    },
    Text(&'static Form),
    /// One of these words; of others that are known it is said why they are refused.
    Choice {
        words: &'static [&'static str],
        refused: &'static [(&'static str, &'static str)],
    },
    Integer {
        least: u32,
        most: u32,
    },
    Boolean,
    /// Not looked at, such as what controllers write into `status`.
    Anything,
}

#[derive(Default)]
pub(crate) struct Object {
    pub(crate) members: Vec<Member>,
    pub(crate) rules: Vec<Rule>,
    pub(crate) cel: Vec<Cel>,
}

/// Of which each may be in a list once.
#[derive(Clone, Copy)]
pub(crate) enum Unique {
    /// The elements.
    Elements,
    /// What they say in this member.
    By(&'static str),
}

/// What an API server checks by an expression. The parser does so in code, which knows more.
#[derive(Clone, Copy)]
pub(crate) struct Cel {
    pub(crate) rule: &'static str,
    pub(crate) message: &'static str,
}

pub(crate) struct Member {
    pub(crate) name: &'static str,
    pub(crate) need: Need,
    pub(crate) shape: Shape,
    /// For the published schema; ends without a full stop.
    pub(crate) about: &'static str,
}

pub(crate) enum Need {
    Optional,
    /// With an example to show where it is missing.
    Required(&'static str),
    /// Exists in the API, and does not here: why, and what to do instead.
    Refused(&'static str),
}

/// What members say together.
pub(crate) enum Rule {
    AtLeastOne(&'static [&'static str]),
    NotBoth(&'static str, &'static str),
    /// The word of the first member tells which one of the others is there.
    Tagged(&'static str, &'static [(&'static str, &'static str)]),
}

impl Object {
    pub(crate) fn new() -> Object {
        Object::default()
    }

    pub(crate) fn may(mut self, name: &'static str, shape: impl Into<Shape>, about: &'static str) -> Object {
        self.members.push(Member { name, need: Need::Optional, shape: shape.into(), about });
        self
    }

    pub(crate) fn must(
        mut self,
        name: &'static str,
        shape: impl Into<Shape>,
        example: &'static str,
        about: &'static str,
    ) -> Object {
        self.members.push(Member { name, need: Need::Required(example), shape: shape.into(), about });
        self
    }

    pub(crate) fn refused(mut self, name: &'static str, instead: &'static str) -> Object {
        self.members.push(Member { name, need: Need::Refused(instead), shape: Shape::Anything, about: "" });
        self
    }

    pub(crate) fn cel(mut self, rule: &'static str, message: &'static str) -> Object {
        self.cel.push(Cel { rule, message });
        self
    }

    pub(crate) fn rule(mut self, rule: Rule) -> Object {
        self.rules.push(rule);
        self
    }

    fn check(&self, field: &Field<'_>, problems: &mut Vec<Problem>) {
        let offered = || self.members.iter().filter(|member| !matches!(member.need, Need::Refused(_)));
        let names: Vec<&str> = offered().map(|member| member.name).collect();
        let Some(entries) = field.entries() else {
            return field.refuse(problems, format!("must be a mapping, found {}", field.node.value));
        };
        let mut given: Vec<(&str, Field<'_>)> = Vec::new();
        for (name, line, value) in entries {
            match self.members.iter().find(|member| member.name == name) {
                None => {
                    let reason = unknown("field", name, &names);
                    problems.push(Problem { line, field: value.path, reason });
                    continue;
                }
                Some(Member { need: Need::Refused(instead), .. }) => {
                    let reason = format!("is not supported by meshd: {instead}");
                    problems.push(Problem { line, field: value.path, reason });
                    continue;
                }
                Some(member) => member.shape.check(&value, problems),
            }
            given.push((name, value));
        }
        let field_line = field.node.line;
        for member in offered() {
            if let Need::Required(example) = member.need
                && !given.iter().any(|(name, _)| *name == member.name)
            {
                let path = if field.path.is_empty() { String::new() } else { format!("{}.", field.path) };
                let (field, reason) =
                    (format!("{path}{}", member.name), format!("missing; add it, for example `{example}`"));
                problems.push(Problem { line: field_line, field, reason });
            }
        }
        self.rules.iter().for_each(|rule| rule.check(field, &given, problems));
    }
}

impl From<Object> for Shape {
    fn from(object: Object) -> Shape {
        Shape::Object(object)
    }
}

impl From<&'static Form> for Shape {
    fn from(form: &'static Form) -> Shape {
        Shape::Text(form)
    }
}

impl Shape {
    pub(crate) fn words(words: &'static [&'static str]) -> Shape {
        Shape::Choice { words, refused: &[] }
    }

    pub(crate) fn list(of: impl Into<Shape>, most: usize) -> Shape {
        Shape::List { of: Box::new(of.into()), least: 0, most, unique: None }
    }

    pub(crate) fn list_of_some(of: impl Into<Shape>, most: usize) -> Shape {
        Shape::List { of: Box::new(of.into()), least: 1, most, unique: None }
    }

    pub(crate) fn unique(mut self, each: Unique) -> Shape {
        if let Shape::List { unique, .. } = &mut self {
            *unique = Some(each);
        }
        self
    }

    pub(crate) fn integer(least: u32, most: u32) -> Shape {
        Shape::Integer { least, most }
    }

    /// All that is wrong with a field.
    pub(crate) fn check(&self, field: &Field<'_>, problems: &mut Vec<Problem>) {
        match self {
            Shape::Object(object) => object.check(field, problems),
            Shape::Texts => check_texts(field, problems),
            Shape::List { of, least, most, unique } => {
                check_list(field, of, *least, *most, problems);
                unique.iter().for_each(|unique| unique.check(field, problems));
            }
            Shape::Text(form) => check_text(field, form, problems),
            Shape::Choice { words, refused } => check_choice(field, words, refused, problems),
            Shape::Integer { least, most } => drop(field.integer(*least..=*most, problems)),
            Shape::Boolean => drop(field.boolean(problems)),
            Shape::Anything => {}
        }
    }
}

fn check_texts(field: &Field<'_>, problems: &mut Vec<Problem>) {
    match field.entries() {
        Some(entries) => entries.for_each(|(_, _, value)| {
            value.text(problems);
        }),
        None => field.refuse(problems, format!("must be a mapping, found {}", field.node.value)),
    }
}

fn check_list(field: &Field<'_>, of: &Shape, least: usize, most: usize, problems: &mut Vec<Problem>) {
    let Some(items) = field.list(problems) else { return };
    if items.len() < least {
        field.refuse(problems, "is empty; list at least one, or leave the field out");
    }
    if items.len() > most {
        field.refuse(problems, format!("has {} elements and {most} are allowed", items.len()));
    }
    items.iter().for_each(|item| of.check(item, problems));
}

impl Unique {
    fn check(self, field: &Field<'_>, problems: &mut Vec<Problem>) {
        let mut seen = HashSet::new();
        for item in field.list(&mut Vec::new()).unwrap_or_default() {
            let said = match self {
                Unique::Elements => Some(item.node.to_json()),
                Unique::By(name) => item.entry(name).map(|field| field.node.to_json()),
            };
            let Some(said) = said else { continue };
            let said = said.as_str().map_or_else(|| said.to_string(), str::to_owned);
            let shown = printable(&said);
            if !seen.insert(said) {
                item.refuse(problems, format!("`{shown}` is listed twice; remove one of them"));
            }
        }
    }
}

fn check_text(field: &Field<'_>, form: &Form, problems: &mut Vec<Problem>) {
    let Some(text) = field.text(problems) else { return };
    if let Err(reason) = form.check(text) {
        field.refuse(problems, reason);
    }
}

fn check_choice(
    field: &Field<'_>,
    words: &'static [&'static str],
    refused: &[(&str, &str)],
    problems: &mut Vec<Problem>,
) {
    if let Value::Text(text) = &field.node.value
        && let Some((word, instead)) = refused.iter().find(|(word, _)| word == text)
    {
        return field.refuse(problems, format!("`{word}` is not supported by meshd: {instead}"));
    }
    let choices: Vec<(&'static str, ())> = words.iter().map(|word| (*word, ())).collect();
    field.choice(&choices, problems);
}

impl Rule {
    fn check(&self, field: &Field<'_>, given: &[(&str, Field<'_>)], problems: &mut Vec<Problem>) {
        let has = |name: &str| given.iter().any(|(given, _)| *given == name);
        let listed = |names: &[&str]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let count = |names: &[&str]| names.iter().filter(|name| has(name)).count();
        match self {
            Rule::AtLeastOne(names) if count(names) == 0 => {
                field.refuse(problems, format!("says nothing; give at least one of {}", listed(names)));
            }
            Rule::NotBoth(one, other) if has(one) && has(other) => {
                field.refuse(problems, format!("`{one}` and `{other}` exclude each other; remove one of them"));
            }
            Rule::Tagged(tag, members) => {
                let tag = given.iter().find(|(name, _)| name == tag);
                let Some((_, Field { node, .. })) = tag else { return };
                let Value::Text(word) = &node.value else { return };
                for (value, member) in *members {
                    match (value == word, has(member)) {
                        (true, false) => {
                            field.refuse(problems, format!("with `{word}` the field `{member}` is needed; add it"));
                        }
                        (false, true) => {
                            field.refuse(problems, format!("`{member}` has no meaning with `{word}`; remove it"));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
}
