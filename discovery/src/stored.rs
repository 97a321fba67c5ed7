//! What is kept under keys of a remote store: one document or registration a key, the service in the key.

use std::sync::Arc;

use meshd_identity::{SYSTEM_NAMESPACE, TrustDomain};

use crate::documents::{self, is_plain_word};
use crate::{Change, Record, Refused, Registration, ServiceName};

/// A document of a thousand endpoints has half of it.
pub(crate) const MOST_BYTES: usize = 128 * 1024;
/// More tell an operator nothing.
const MOST_PROBLEMS: usize = 20;

/// What a key means, and of which service.
pub(crate) enum Meaning {
    Service(ServiceName),
    Endpoint(ServiceName),
}

pub(crate) fn meaning(base: &str, key: &str) -> Option<Meaning> {
    let mut parts = key.strip_prefix(base)?.strip_prefix('/')?.splitn(4, '/');
    let (namespace, name, kind, rest) = (parts.next()?, parts.next()?, parts.next()?, parts.next());
    let service = ServiceName::new(name, namespace).ok().filter(|_| namespace != SYSTEM_NAMESPACE)?;
    match (kind, rest) {
        ("service", None) => Some(Meaning::Service(service)),
        ("endpoints", Some(instance)) if is_plain_word(instance) && !instance.is_empty() => {
            Some(Meaning::Endpoint(service))
        }
        _ => None,
    }
}

/// What was written to a key of that meaning.
pub(crate) fn read(key: &str, meaning: Meaning, value: &[u8], trust_domain: &TrustDomain) -> Change {
    let read = match meaning {
        Meaning::Service(service) => read_document(key, &service, value, trust_domain),
        Meaning::Endpoint(service) => {
            // There may be tens of thousands: one text for both.
            let key: Arc<str> = key.into();
            let record = |place| Record {
                key: key.clone(),
                origin: key,
                service,
                definition: None,
                places: vec![Arc::new(place)],
            };
            Registration::read(value, trust_domain).map(record)
        }
    };
    match read {
        Ok(record) => Change::Set(record),
        Err(problems) => Change::Refused(refused(key, key, &problems)),
    }
}

/// `origin` says to operators what `key` is.
pub(crate) fn refused(key: &str, origin: &str, problems: &[String]) -> Refused {
    let told = problems
        .iter()
        .take(MOST_PROBLEMS)
        .map(|problem| format!("{origin}: {problem} (the last good version stays in force)"));
    Refused { key: key.into(), problems: told.collect() }
}

fn read_document(
    key: &str,
    service: &ServiceName,
    value: &[u8],
    trust_domain: &TrustDomain,
) -> Result<Record, Vec<String>> {
    if value.len() > MOST_BYTES {
        return Err(vec![format!("has {} bytes and {MOST_BYTES} are allowed", value.len())]);
    }
    let text = std::str::from_utf8(value).map_err(|_| vec!["is not UTF-8".to_owned()])?;
    let mut found = documents::parse(text, trust_domain);
    let document = match (found.pop(), found.is_empty()) {
        (Some(document), true) => document,
        (None, _) => return Err(vec!["is empty; it holds one MeshService document".to_owned()]),
        (Some(_), false) => return Err(vec!["holds several documents; give each a key of its own".to_owned()]),
    };
    let shown =
        |problem: &crate::yaml::Problem| format!("line {}: {}: {}", problem.line, problem.field, problem.reason);
    let described = document.outcome.map_err(|problems| problems.iter().map(shown).collect::<Vec<_>>())?;
    if described.service != *service {
        let reason =
            format!("metadata: describes {}, and the key is that of {service}; write it to its own", described.service);
        return Err(vec![reason]);
    }
    Ok(Record { key: key.into(), ..described.record(key.into()) })
}
