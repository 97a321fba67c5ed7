//! What routes do to requests on their way: `filters` of the Gateway API.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Backend;
use super::forms::{HEADER, HEADER_VALUE, HOSTNAME, PATH, WORD};
use super::references::{backend_alone, check_backend};
use super::shape::{Object, Rule, Shape};
use crate::ServiceName;
use crate::yaml::{Field, Problem, Value};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all_fields = "camelCase")]
pub enum Filter {
    RequestHeaderModifier {
        request_header_modifier: HeaderChange,
    },
    ResponseHeaderModifier {
        response_header_modifier: HeaderChange,
    },
    RequestMirror {
        request_mirror: Sampled,
    },
    RequestRedirect {
        request_redirect: Redirect,
    },
    #[serde(rename = "URLRewrite")]
    UrlRewrite {
        url_rewrite: Rewrite,
    },
}

/// In this order: `set`, `add`, `remove`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HeaderChange {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<HeaderValue>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub add: Vec<HeaderValue>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<Arc<str>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderValue {
    pub name: Arc<str>,
    pub value: Arc<str>,
}

/// Copies of a share of the requests, whose answers are thrown away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sampled {
    pub backend_ref: Backend,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fraction: Option<Fraction>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fraction {
    pub numerator: u32,
    #[serde(default = "hundred")]
    pub denominator: u32,
}

fn hundred() -> u32 {
    100
}

impl Sampled {
    /// So many of so many requests; all, unless told otherwise.
    pub fn share(&self) -> (u32, u32) {
        match (self.percent, self.fraction) {
            (Some(percent), _) => (percent, 100),
            (None, Some(Fraction { numerator, denominator })) => (numerator, denominator),
            (None, None) => (1, 1),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Redirect {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheme: Option<Arc<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<Arc<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathChange>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    #[serde(default = "found")]
    pub status_code: u16,
}

fn found() -> u16 {
    302
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Rewrite {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<Arc<str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathChange>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all_fields = "camelCase")]
pub enum PathChange {
    ReplaceFullPath {
        replace_full_path: Arc<str>,
    },
    /// Of the PathPrefix that matched.
    ReplacePrefixMatch {
        replace_prefix_match: Arc<str>,
    },
}

/// Where copies go.
pub(super) fn mirrors(filters: &[Filter], namespace: &str) -> Vec<ServiceName> {
    let mirror = |filter: &Filter| match filter {
        Filter::RequestMirror { request_mirror } => request_mirror.backend_ref.service(namespace),
        _ => None,
    };
    filters.iter().filter_map(mirror).collect()
}

const REFUSED: &[(&str, &str)] = &[
    ("ExtensionRef", "extensions of other implementations mean nothing here; say it by a ServicePolicy"),
    ("CORS", "let the program answer CORS requests, or set the headers by ResponseHeaderModifier"),
    ("ExternalAuth", "use an AuthorizationPolicy"),
];

fn header_change(about: &'static str) -> (Shape, &'static str) {
    let header = || {
        let object = Object::new().must("name", &HEADER, "name: x-version", "of the header");
        Shape::list(object.must("value", &HEADER_VALUE, "value: v2", "at most 4096 bytes"), 16)
    };
    let change = Object::new()
        .may("set", header(), "replaces what is there")
        .may("add", header(), "is added to what is there")
        .may("remove", Shape::list(&HEADER, 16), "names of headers")
        .rule(Rule::AtLeastOne(&["set", "add", "remove"]));
    (change.into(), about)
}

fn path_change() -> Object {
    Object::new()
        .must(
            "type",
            Shape::words(&["ReplaceFullPath", "ReplacePrefixMatch"]),
            "type: ReplaceFullPath",
            "what is replaced",
        )
        .may("replaceFullPath", &PATH, "the path instead")
        .may("replacePrefixMatch", &PATH, "what stands instead of the prefix that matched")
        .rule(Rule::Tagged(
            "type",
            &[("ReplaceFullPath", "replaceFullPath"), ("ReplacePrefixMatch", "replacePrefixMatch")],
        ))
}

fn mirror() -> Object {
    let fraction = Object::new().must("numerator", Shape::integer(0, u32::MAX), "numerator: 5", "so many").may(
        "denominator",
        Shape::integer(1, u32::MAX),
        "of so many; 100 by default",
    );
    Object::new()
        .must("backendRef", backend_alone(), "backendRef: { name: shadow, port: 80 }", "where copies go")
        .may("percent", Shape::integer(0, 100), "of the requests; all by default")
        .may("fraction", fraction, "of the requests")
        .rule(Rule::NotBoth("percent", "fraction"))
}

fn redirect() -> Object {
    Object::new()
        .may("scheme", Shape::words(&["http", "https"]), "of the new location")
        .may("hostname", &HOSTNAME, "of the new location")
        .may("path", path_change(), "of the new location")
        .may("port", Shape::integer(1, 65535), "of the new location")
        .may("statusCode", Shape::integer(301, 308), "301, 302, 303, 307 or 308; 302 by default")
}

fn rewrite() -> Object {
    Object::new()
        .may("hostname", &HOSTNAME, "the host the program sees")
        .may("path", path_change(), "the path the program sees")
        .rule(Rule::AtLeastOne(&["hostname", "path"]))
}

pub(super) fn http_filters() -> Shape {
    let (request, request_about) = header_change("headers of the request");
    let (response, response_about) = header_change("headers of the response");
    let words = &["RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror", "RequestRedirect", "URLRewrite"];
    let filter = Object::new()
        .must("type", Shape::Choice { words, refused: REFUSED }, "type: RequestHeaderModifier", "what it does")
        .may("requestHeaderModifier", request, request_about)
        .may("responseHeaderModifier", response, response_about)
        .may("requestMirror", mirror(), "copies")
        .may("requestRedirect", redirect(), "the answer is a redirect")
        .may("urlRewrite", rewrite(), "another host or path for the program")
        .refused("extensionRef", "extensions of other implementations mean nothing here; say it by a ServicePolicy")
        .refused("cors", "let the program answer CORS requests")
        .refused("externalAuth", "use an AuthorizationPolicy")
        .rule(Rule::Tagged(
            "type",
            &[
                ("RequestHeaderModifier", "requestHeaderModifier"),
                ("ResponseHeaderModifier", "responseHeaderModifier"),
                ("RequestMirror", "requestMirror"),
                ("RequestRedirect", "requestRedirect"),
                ("URLRewrite", "urlRewrite"),
            ],
        ));
    Shape::list(filter, 16)
}

pub(super) fn grpc_filters() -> Shape {
    let (request, request_about) = header_change("headers of the request");
    let (response, response_about) = header_change("headers of the response");
    let words = &["RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror"];
    let filter = Object::new()
        .must("type", Shape::Choice { words, refused: REFUSED }, "type: RequestHeaderModifier", "what it does")
        .may("requestHeaderModifier", request, request_about)
        .may("responseHeaderModifier", response, response_about)
        .may("requestMirror", mirror(), "copies")
        .refused("extensionRef", "extensions of other implementations mean nothing here; say it by a ServicePolicy")
        .rule(Rule::Tagged(
            "type",
            &[
                ("RequestHeaderModifier", "requestHeaderModifier"),
                ("ResponseHeaderModifier", "responseHeaderModifier"),
                ("RequestMirror", "requestMirror"),
            ],
        ));
    Shape::list(filter, 16)
}

/// What the filters of a list say together, by the rules of the Gateway API. `prefixes`: the rule has one match, and it
/// is a PathPrefix.
pub(super) fn check_filters(holder: &Field<'_>, prefix: bool, has_backends: bool, problems: &mut Vec<Problem>) {
    let Some(list) = holder.entry("filters") else { return };
    let Value::List(_) = &list.node.value else { return };
    let mut seen: Vec<&str> = Vec::new();
    for filter in list.list(problems).unwrap_or_default() {
        let Some(Value::Text(kind)) = filter.entry("type").map(|field| &field.node.value) else { continue };
        if seen.contains(&kind.as_str()) && kind != "RequestMirror" {
            filter.refuse(problems, format!("`{kind}` is given twice; put both into one"));
        }
        seen.push(kind);
        if let Some(backend) = filter.entry("requestMirror").and_then(|mirror| mirror.entry("backendRef")) {
            check_backend(&backend, problems);
        }
        check_fraction(&filter, problems);
        if kind == "RequestRedirect" && has_backends {
            filter.refuse(problems, "a rule that redirects sends nothing to `backendRefs`; remove one of them");
        }
        check_redirect(&filter, problems);
        for member in ["requestRedirect", "urlRewrite"] {
            let path = filter.entry(member).and_then(|member| member.entry("path"));
            let Some(replaced) = path.and_then(|path| path.entry("replacePrefixMatch")) else { continue };
            if !prefix {
                replaced.refuse(problems, "needs a rule with exactly one match, and that of type PathPrefix");
            }
        }
    }
    if seen.contains(&"RequestRedirect") && seen.contains(&"URLRewrite") {
        list.refuse(problems, "a redirect and a rewrite exclude each other; remove one of them");
    }
}

fn check_fraction(filter: &Field<'_>, problems: &mut Vec<Problem>) {
    let Some(fraction) = filter.entry("requestMirror").and_then(|mirror| mirror.entry("fraction")) else { return };
    let number = |name| match fraction.entry(name).map(|field| &field.node.value) {
        Some(Value::Integer(number)) => Some(*number),
        _ => None,
    };
    if let Some(numerator) = number("numerator")
        && numerator > number("denominator").unwrap_or(100)
    {
        fraction.refuse(problems, "is more than all requests; the numerator is at most the denominator");
    }
}

fn check_redirect(filter: &Field<'_>, problems: &mut Vec<Problem>) {
    let Some(code) = filter.entry("requestRedirect").and_then(|redirect| redirect.entry("statusCode")) else { return };
    if matches!(code.node.value, Value::Integer(304..=306)) {
        code.refuse(problems, "is no redirect; use 301, 302, 303, 307 or 308");
    }
}

/// Names are for the eyes of operators.
pub(super) fn rule_name() -> (&'static str, &'static super::forms::Form, &'static str) {
    ("name", &WORD, "for messages and metrics")
}
