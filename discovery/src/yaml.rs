//! YAML as a tree that remembers lines, and a reader over it whose refusals name the line, the field and the remedy.
//!
//! Typed deserialisation stops at the first error and says "invalid u16"; an operator needs all errors of a document
//! at once, with the path of each and what would be right.

use std::collections::HashSet;
use std::fmt;
use std::ops::RangeInclusive;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// A document is written by people: far beyond any real one, far below what would cost memory.
const MAX_ALIAS_EVENTS: usize = 50_000;
/// Of what the parser says.
const MOST_SAID: usize = 300;

/// One thing wrong in a document. Lines count from 1 in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) line: u64,
    /// `spec.endpoints[1].address`; empty when the text is not YAML at all.
    pub(crate) field: String,
    pub(crate) reason: String,
}

pub(crate) struct Node {
    pub(crate) line: u64,
    pub(crate) value: Value,
}

pub(crate) enum Value {
    Null,
    Boolean(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

pub(crate) struct Entry {
    key: String,
    key_line: u64,
    node: Node,
}

/// Parses one document; `first_line` is where it starts in its file.
pub(crate) fn parse(text: &str, first_line: u64) -> Result<Node, Problem> {
    let options = serde_saphyr::options! {
        with_snippet: false,
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: MAX_ALIAS_EVENTS },
    };
    let mut node: Node = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let line = error.location().map_or(1, |location| location.line().max(1));
        Problem { line: line + first_line - 1, field: String::new(), reason: syntax_reason(&error) }
    })?;
    node.shift(first_line - 1);
    Ok(node)
}

/// What came as JSON already, such as an object of Kubernetes: it has no lines.
impl From<&serde_json::Value> for Node {
    fn from(json: &serde_json::Value) -> Node {
        use serde_json::Value as Json;
        let integer = |number: &serde_json::Number| number.as_i128().map(Value::Integer);
        let value = match json {
            Json::Null => Value::Null,
            Json::Bool(value) => Value::Boolean(*value),
            Json::Number(number) => {
                integer(number).unwrap_or_else(|| Value::Float(number.as_f64().unwrap_or(f64::NAN)))
            }
            Json::String(text) => Value::Text(text.clone()),
            Json::Array(items) => Value::List(items.iter().map(Node::from).collect()),
            Json::Object(map) => {
                let entry = |(key, json): (&String, _)| Entry { key: key.clone(), key_line: 0, node: Node::from(json) };
                Value::Map(map.iter().map(entry).collect())
            }
        };
        Node { line: 0, value }
    }
}

/// The parser's words without its own "at line .., column .." (which counts from the document, not the file).
fn syntax_reason(error: &serde_saphyr::Error) -> String {
    let message = error.to_string();
    let said = message.find(" at line ").map_or(message.as_str(), |end| &message[..end]);
    // The parser's advice is for programmers.
    let said = legible(said.split(", set DuplicateKeyPolicy").next().unwrap_or(said));
    format!("not valid YAML: {said}; correct the text (indentation, brackets, quotes, repeated keys) at this line")
}

/// Words that may repeat text of a file, fit for one line; their own quotes and escapes stay.
fn legible(said: &str) -> String {
    let mut line = String::new();
    for letter in said.chars().take(MOST_SAID) {
        match letter {
            '\'' | '"' | '\\' => line.push(letter),
            letter => line.extend(letter.escape_debug()),
        }
    }
    line
}

impl Node {
    /// The same without lines. What is empty (`zone:`) is left out, as it counts as absent.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        use serde_json::Value as Json;
        match &self.value {
            Value::Null => Json::Null,
            Value::Boolean(value) => Json::Bool(*value),
            Value::Integer(value) => i64::try_from(*value).map_or(Json::Null, Json::from),
            Value::Float(value) => Json::from(*value),
            Value::Text(text) => Json::String(text.clone()),
            Value::List(items) => items.iter().map(Node::to_json).collect(),
            Value::Map(entries) => {
                let given = entries.iter().filter(|entry| !matches!(entry.node.value, Value::Null));
                given.map(|entry| (entry.key.clone(), entry.node.to_json())).collect()
            }
        }
    }

    /// Takes out what is below a key of a mapping.
    pub(crate) fn take(&mut self, key: &str) -> Option<Node> {
        let Value::Map(entries) = &mut self.value else { return None };
        let at = entries.iter().position(|entry| entry.key == key)?;
        Some(entries.remove(at).node)
    }

    /// What is below a key of a mapping.
    pub(crate) fn get_mut(&mut self, key: &str) -> Option<&mut Node> {
        let Value::Map(entries) = &mut self.value else { return None };
        entries.iter_mut().find(|entry| entry.key == key).map(|entry| &mut entry.node)
    }

    fn shift(&mut self, lines: u64) {
        self.line += lines;
        match &mut self.value {
            Value::List(items) => items.iter_mut().for_each(|item| item.shift(lines)),
            Value::Map(entries) => entries.iter_mut().for_each(|entry| {
                entry.key_line += lines;
                entry.node.shift(lines);
            }),
            _ => {}
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Node, D::Error> {
        let Spanned { value, referenced, .. } = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Node { line: referenced.line(), value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Boolean(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
        Ok(Value::Integer(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let (mut map, mut keys) = (Vec::new(), HashSet::new());
        while let Some((key, node)) = entries.next_entry::<Spanned<String>, Node>()? {
            if !keys.insert(key.value.clone()) {
                return Err(de::Error::custom(format!("duplicate key `{}`", key.value)));
            }
            map.push(Entry { key: key.value, key_line: key.referenced.line(), node });
        }
        Ok(Value::Map(map))
    }
}

/// A node together with its path from the root of the document.
pub(crate) struct Field<'n> {
    pub(crate) path: String,
    pub(crate) node: &'n Node,
}

/// The entries of a mapping whose keys are all known.
pub(crate) struct Fields<'n> {
    path: String,
    line: u64,
    entries: &'n [Entry],
}

impl<'n> Field<'n> {
    pub(crate) fn root(node: &'n Node) -> Field<'n> {
        Field { path: String::new(), node }
    }

    pub(crate) fn refuse(&self, problems: &mut Vec<Problem>, reason: impl Into<String>) {
        let field = if self.path.is_empty() { "document" } else { &self.path };
        problems.push(Problem { line: self.node.line, field: field.to_owned(), reason: reason.into() });
    }

    /// A mapping with no keys but `known`; an unknown one is refused with the nearest known name.
    pub(crate) fn mapping(&self, known: &[&str], problems: &mut Vec<Problem>) -> Option<Fields<'n>> {
        let Value::Map(entries) = &self.node.value else {
            self.refuse(problems, format!("must be a mapping with {}, found {}", listed(known), self.node.value));
            return None;
        };
        for entry in entries.iter().filter(|entry| !known.contains(&entry.key.as_str())) {
            let field = join(&self.path, &printable(&entry.key));
            problems.push(Problem { line: entry.key_line, field, reason: unknown("field", &entry.key, known) });
        }
        Some(Fields { path: self.path.clone(), line: self.node.line, entries })
    }

    /// Its entries if it is a mapping: the name, the line it is on, and what is there.
    pub(crate) fn entries(&self) -> Option<impl Iterator<Item = (&'n str, u64, Field<'n>)>> {
        let Value::Map(entries) = &self.node.value else { return None };
        let path = self.path.clone();
        let given = entries.iter().filter(|entry| !matches!(entry.node.value, Value::Null));
        Some(given.map(move |entry| {
            let field = Field { path: join(&path, &printable(&entry.key)), node: &entry.node };
            (entry.key.as_str(), entry.key_line, field)
        }))
    }

    /// The fields at and below this one that are written and empty (`from:`), which otherwise count as absent.
    pub(crate) fn empty(&self) -> Vec<Field<'n>> {
        let below = |field: Field<'n>| field.empty();
        match &self.node.value {
            Value::Null => vec![Field { path: self.path.clone(), node: self.node }],
            Value::List(items) => {
                let element = |(index, node)| Field { path: format!("{}[{index}]", self.path), node };
                items.iter().enumerate().map(element).flat_map(below).collect()
            }
            Value::Map(entries) => {
                let value =
                    |entry: &'n Entry| Field { path: join(&self.path, &printable(&entry.key)), node: &entry.node };
                entries.iter().map(value).flat_map(below).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The entry of that name of a mapping.
    pub(crate) fn entry(&self, name: &str) -> Option<Field<'n>> {
        self.entries()?.find(|(key, ..)| *key == name).map(|(.., field)| field)
    }

    /// The text of the entry of that name, if that is what it is.
    pub(crate) fn word(&self, name: &str) -> Option<&'n str> {
        match &self.entry(name)?.node.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The elements of the list of that name, if that is what it is.
    pub(crate) fn items(&self, name: &str) -> Vec<Field<'n>> {
        self.entry(name).and_then(|list| list.list(&mut Vec::new())).unwrap_or_default()
    }

    pub(crate) fn list(&self, problems: &mut Vec<Problem>) -> Option<Vec<Field<'n>>> {
        let Value::List(items) = &self.node.value else {
            self.refuse(problems, format!("must be a list, found {}; write each element after `- `", self.node.value));
            return None;
        };
        let element = |(index, node)| Field { path: format!("{}[{index}]", self.path), node };
        Some(items.iter().enumerate().map(element).collect())
    }

    pub(crate) fn text(&self, problems: &mut Vec<Problem>) -> Option<&'n str> {
        match &self.node.value {
            Value::Text(text) => return Some(text),
            found @ (Value::Integer(_) | Value::Float(_) | Value::Boolean(_)) => {
                self.refuse(problems, format!("must be text, found {found}; put it in quotes"));
            }
            found => self.refuse(problems, format!("must be text, found {found}")),
        }
        None
    }

    pub(crate) fn boolean(&self, problems: &mut Vec<Problem>) -> Option<bool> {
        if let Value::Boolean(value) = self.node.value {
            return Some(value);
        }
        self.refuse(problems, format!("must be true or false, found {}", self.node.value));
        None
    }

    pub(crate) fn integer(&self, range: RangeInclusive<u32>, problems: &mut Vec<Problem>) -> Option<u32> {
        if let Value::Integer(value) = self.node.value
            && let Ok(value) = u32::try_from(value)
            && range.contains(&value)
        {
            return Some(value);
        }
        let (low, high) = range.into_inner();
        self.refuse(problems, format!("must be a whole number from {low} to {high}, found {}", self.node.value));
        None
    }

    pub(crate) fn port(&self, problems: &mut Vec<Problem>) -> Option<u16> {
        self.integer(1..=u32::from(u16::MAX), problems).and_then(|port| u16::try_from(port).ok())
    }

    /// One of a fixed set of words.
    pub(crate) fn choice<T: Copy>(&self, choices: &[(&'static str, T)], problems: &mut Vec<Problem>) -> Option<T> {
        let text = self.text(problems)?;
        if let Some((_, value)) = choices.iter().find(|(name, _)| *name == text) {
            return Some(*value);
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        self.refuse(problems, unknown("value", text, &names));
        None
    }
}

impl<'n> Fields<'n> {
    /// An empty value (`zone:`) counts as absent, as it does in Kubernetes.
    pub(crate) fn get(&self, key: &str) -> Option<Field<'n>> {
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        if matches!(entry.node.value, Value::Null) {
            return None;
        }
        Some(Field { path: join(&self.path, key), node: &entry.node })
    }

    pub(crate) fn require(&self, key: &str, example: &str, problems: &mut Vec<Problem>) -> Option<Field<'n>> {
        let found = self.get(key);
        if found.is_none() {
            let line = self.entries.iter().find(|entry| entry.key == key).map_or(self.line, |entry| entry.key_line);
            let reason = format!("missing; add it, for example `{example}`");
            problems.push(Problem { line, field: join(&self.path, key), reason });
        }
        found
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("nothing"),
            Value::Boolean(value) => write!(f, "`{value}`"),
            Value::Integer(value) => write!(f, "the number {value}"),
            Value::Float(value) => write!(f, "the number {value}"),
            Value::Text(text) => write!(f, "the text `{}`", printable(text)),
            Value::List(_) => f.write_str("a list"),
            Value::Map(_) => f.write_str("a mapping"),
        }
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn listed(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// `unknown field ...`, with the nearest known name when one is near enough to be what was meant.
pub(crate) fn unknown(what: &str, found: &str, known: &[&str]) -> String {
    let distance = |name: &&&str| strsim::damerau_levenshtein(&found.to_lowercase(), &name.to_lowercase());
    let nearest = known.iter().min_by_key(distance).filter(|name| distance(name) <= 1 + name.len() / 3);
    let advice = match nearest {
        Some(name) if known.len() == 1 => format!("did you mean `{name}`?"),
        Some(name) => format!("did you mean `{name}`? known: {}", listed(known)),
        None => format!("use one of {}", listed(known)),
    };
    format!("unknown {what} `{}`; {advice}", printable(found))
}

/// Text out of a file, fit for one line of a log.
pub fn printable(text: &str) -> String {
    text.chars().take(120).flat_map(char::escape_debug).collect()
}
