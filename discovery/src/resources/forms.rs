//! The forms that text takes in documents: what is checked, and what the published schema says of it.

use std::net::IpAddr;
use std::time::Duration;

use meshd_identity::SpiffeId;

use crate::name::check_label;
use crate::yaml::printable;

use super::shape::Cel;
use super::values::{never_in_a_path, pattern_of, span_of};

pub(crate) struct Form {
    /// As a JSON Schema `pattern`, which may let more pass than [`Form::check`] does. Empty: none.
    pub(crate) pattern: &'static str,
    pub(crate) least: usize,
    pub(crate) most: usize,
    /// What a pattern cannot say, for API servers.
    pub(crate) cel: Option<Cel>,
    check: fn(&str) -> Result<(), String>,
}

impl Form {
    /// Why a text is not of this form, and what to write.
    pub(crate) fn check(&self, text: &str) -> Result<(), String> {
        if text.len() < self.least {
            return Err("is empty; give it a value, or leave the field out".to_owned());
        }
        if text.len() > self.most {
            return Err(format!("has {} bytes and {} are allowed", text.len(), self.most));
        }
        (self.check)(text)
    }
}

const fn form(pattern: &'static str, most: usize, check: fn(&str) -> Result<(), String>) -> Form {
    Form { pattern, least: 1, most, cel: None, check }
}

/// A length of time with bounds.
const fn time(rule: &'static str, message: &'static str, check: fn(&str) -> Result<(), String>) -> Form {
    let form = form(TIME, 32, check);
    Form { cel: Some(Cel { rule, message }), ..form }
}

fn anything(_: &str) -> Result<(), String> {
    Ok(())
}

/// Of the Kubernetes API: RFC 1123.
pub(crate) static LABEL: Form = form("^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", 63, label);
pub(crate) static SUBDOMAIN: Form =
    form(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", 253, subdomain);
pub(crate) static WORD: Form = form("", 253, anything);
/// The groups of objects that stand for services; `core` is how Linkerd's documents write the empty group.
pub(crate) static GROUP: Form = Form { pattern: "", least: 0, most: 253, cel: None, check: anything };
/// GEP-2257.
const TIME: &str = "^([0-9]{1,5}(h|m|s|ms)){1,4}$";
pub(crate) static DURATION: Form = form(TIME, 32, duration);
/// A duration that is not zero.
pub(crate) static SOME_TIME: Form = time("duration(self) > duration('0s')", "must be longer than nothing", some_time);
/// For how long what happened counts: Linkerd's bounds of a retry budget.
pub(crate) static BUDGET_WINDOW: Form = time(
    "duration(self) >= duration('1s') && duration(self) <= duration('60s')",
    "must be from 1s to 60s",
    budget_window,
);
/// The same of shares of success, which take longer to be seen of services that are asked rarely.
pub(crate) static RATE_WINDOW: Form = time(
    "duration(self) >= duration('1s') && duration(self) <= duration('10m')",
    "must be from 1s to 10m",
    rate_window,
);
/// RFC 9110 5.6.2, as the Gateway API has it.
pub(crate) static HEADER: Form = form("^[A-Za-z0-9!#$%&'*+\\-.^_\\x60|~]+$", 256, header);
pub(crate) static HEADER_VALUE: Form = form("", 4096, header_value);
pub(crate) static QUERY_VALUE: Form = form("", 1024, anything);
pub(crate) static PATH: Form = Form { pattern: "", least: 0, most: 1024, cel: None, check: anything };
pub(crate) static HOSTNAME: Form =
    form(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", 253, hostname);
/// Empty is any.
pub(crate) static GRPC_NAME: Form = Form { pattern: "", least: 0, most: 1024, cel: None, check: anything };
/// A method of HTTP: a token, upper case by custom.
pub(crate) static METHOD: Form = form("^[A-Z]+$", 32, method);
/// A path of an AuthorizationPolicy: exact, or all below with `*` at its end.
pub(crate) static PATH_PATTERN: Form = form(r"^/[^*?#]*\*?$", 1024, path_pattern);
pub(crate) static IDENTITY: Form =
    form("^(\\*|(spiffe://[a-z0-9._-]+/)?ns/[A-Za-z0-9._-]+/sa/[A-Za-z0-9._-]+)$", 2048, identity);
/// Who may serve: somebody in particular.
pub(crate) static MEMBER: Form = form("^(spiffe://[a-z0-9._-]+/)?ns/[A-Za-z0-9._-]+/sa/[A-Za-z0-9._-]+$", 2048, member);
pub(crate) static NETWORK: Form = Form {
    cel: Some(Cel {
        rule: "isIP(self) || (isCIDR(self) && cidr(self).masked() == cidr(self))",
        message: "must be an address, or a network without bits beyond its length, such as 10.0.0.0/8",
    }),
    ..form("^[0-9a-fA-F.:]+(/[0-9]{1,3})?$", 49, network)
};
pub(crate) static EXPRESSION: Form = form("", 1024, expression);
pub(crate) static IP_ADDRESS: Form = form("^[0-9a-fA-F.:]+$", 45, ip_address);
/// `zone` and `network`, which end up in metrics.
pub(crate) static TAG: Form = Form { pattern: "^[A-Za-z0-9._-]*$", least: 0, most: 63, cel: None, check: anything };

fn label(text: &str) -> Result<(), String> {
    check_label("name", text).map_err(|error| error.to_string())
}

fn subdomain(text: &str) -> Result<(), String> {
    text.split('.').try_for_each(label)
}

fn duration(text: &str) -> Result<(), String> {
    span_of(text).map(drop)
}

fn some_time(text: &str) -> Result<(), String> {
    match span_of(text)? {
        Duration::ZERO => Err("must be longer than nothing; leave the field out for the default".to_owned()),
        _ => Ok(()),
    }
}

fn budget_window(text: &str) -> Result<(), String> {
    within(text, 60, "must be from 1s to 60s")
}

fn rate_window(text: &str) -> Result<(), String> {
    within(text, 600, "must be from 1s to 10m")
}

fn within(text: &str, most: u64, bounds: &str) -> Result<(), String> {
    let span = span_of(text)?;
    let is_within = span >= Duration::from_secs(1) && span <= Duration::from_secs(most);
    if is_within { Ok(()) } else { Err(bounds.to_owned()) }
}

fn header(text: &str) -> Result<(), String> {
    let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    if text.chars().all(token) {
        return Ok(());
    }
    let hint = if text.starts_with(':') { "; a method, path or host has a field of its own" } else { "" };
    Err(format!("`{}` is not the name of a header (RFC 9110){hint}", printable(text)))
}

fn header_value(text: &str) -> Result<(), String> {
    if text.chars().any(char::is_control) {
        return Err("contains a control character, which no header may; remove it".to_owned());
    }
    Ok(())
}

fn hostname(text: &str) -> Result<(), String> {
    if text.parse::<IpAddr>().is_ok() {
        return Err("is an IP address; write a host name".to_owned());
    }
    subdomain(text)
}

fn method(text: &str) -> Result<(), String> {
    if text.chars().all(|c| c.is_ascii_uppercase()) {
        return Ok(());
    }
    Err(format!("`{}` is not a method; write it in capitals, like GET", printable(text)))
}

fn path_pattern(text: &str) -> Result<(), String> {
    let exact = text.strip_suffix('*').unwrap_or(text);
    if !exact.starts_with('/') {
        return Err("must begin with `/`, like `/admin/*`".to_owned());
    }
    if let Some(part) = never_in_a_path(exact, exact.len() == text.len()) {
        return Err(format!("contains `{part}`, which no path has when it is matched"));
    }
    match exact.contains('*') {
        true => {
            Err("contains `*`; one `*` at the end stands for everything below, and nothing else is special".to_owned())
        }
        false => Ok(()),
    }
}

fn identity(text: &str) -> Result<(), String> {
    if text == "*" {
        return Ok(());
    }
    member(text)
}

fn member(text: &str) -> Result<(), String> {
    // Which trust domain is ours makes no difference to the form.
    let ours = "own.invalid".parse().map_err(|_| "cannot be checked".to_owned())?;
    SpiffeId::parse_in(&ours, text).map(drop).map_err(|error| error.to_string())
}

fn network(text: &str) -> Result<(), String> {
    super::values::network_of(text).map(drop)
}

fn expression(text: &str) -> Result<(), String> {
    pattern_of(text).map(drop)
}

fn ip_address(text: &str) -> Result<(), String> {
    text.parse::<IpAddr>().map(drop).map_err(|_| format!("`{}` is not an IP address", printable(text)))
}
