//! `meshd validate`: all that is wrong with documents before anybody reads them, and what they say to each other. Pure.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use meshd_identity::TrustDomain;
use serde::Serialize;

use super::read::{Said, read};
use super::{Id, Resource, Target, authorization_policy, conflicts};
use crate::ServiceName;
use crate::documents::Described;
use crate::yaml::Problem;

/// What is to be looked at, and what to call it.
#[derive(Debug, Clone)]
pub struct Text {
    pub file: String,
    pub text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The document is refused.
    Error,
    /// It is taken, and may not do what was meant.
    Warning,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Finding {
    pub file: String,
    pub line: u64,
    pub severity: Severity,
    /// Empty when it is about a whole text.
    pub field: String,
    /// What is wrong, and what to do.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { file, line, severity, field, message } = self;
        let warning = if *severity == Severity::Warning { "warning: " } else { "" };
        let field = if field.is_empty() { String::new() } else { format!("{field}: ") };
        write!(f, "{file}:{line}: {warning}{field}{message}")
    }
}

/// Everything found, in the order of the texts and their lines, and how many documents there are.
pub fn validate(texts: &[Text], trust_domain: &TrustDomain) -> (Vec<Finding>, usize) {
    let mut check =
        Check { findings: Vec::new(), seen: BTreeMap::new(), services: BTreeMap::new(), resources: Vec::new() };
    let mut documents = 0;
    for Text { file, text } in texts {
        let found = read(text, trust_domain);
        documents += found.len();
        if found.is_empty() {
            check.say(&Place { file, line: 1 }, Severity::Warning, "", "holds no document".to_owned());
        }
        for document in found {
            let place = Place { file, line: document.line };
            for Problem { line, field, reason } in document.warnings {
                check.say(&Place { file, line }, Severity::Warning, &field, reason);
            }
            match document.outcome {
                Ok(said) => check.take(&place, document.id, said),
                Err(problems) => {
                    problems.into_iter().for_each(|Problem { line, field, reason }| {
                        check.say(&Place { file, line }, Severity::Error, &field, reason);
                    });
                }
            }
        }
    }
    check.cross();
    let order: BTreeMap<&str, usize> = texts.iter().enumerate().map(|(n, text)| (text.file.as_str(), n)).collect();
    check.findings.sort_by_key(|found| (order.get(found.file.as_str()).copied(), found.line, found.severity));
    // What one is converted into may lack the same twice.
    let mut told = HashSet::new();
    check.findings.retain(|found| told.insert(found.clone()));
    (check.findings, documents)
}

#[derive(Debug, Clone)]
struct Place<'t> {
    file: &'t str,
    line: u64,
}

struct Check<'t> {
    findings: Vec<Finding>,
    seen: BTreeMap<Id, Place<'t>>,
    services: BTreeMap<ServiceName, Described>,
    resources: Vec<(Place<'t>, Resource)>,
}

impl<'t> Check<'t> {
    fn say(&mut self, place: &Place<'_>, severity: Severity, field: &str, message: String) {
        let Place { file, line } = place;
        self.findings.push(Finding {
            file: (*file).to_owned(),
            line: *line,
            severity,
            field: field.to_owned(),
            message,
        });
    }

    fn take(&mut self, place: &Place<'t>, id: Option<Id>, said: Said) {
        if let Some(id) = id {
            if let Some(first) = self.seen.get(&id) {
                let message = format!("{id} is already at {}:{}; remove one of them", first.file, first.line);
                return self.say(place, Severity::Error, "metadata.name", message);
            }
            self.seen.insert(id, place.clone());
        }
        match said {
            Said::Service(described) => drop(self.services.insert(described.service.clone(), *described)),
            Said::Resources(resources) => {
                self.resources.extend(resources.into_iter().map(|resource| (place.clone(), resource)));
            }
        }
    }

    /// What only shows when all documents are seen together. Where no services are given, they are elsewhere.
    fn cross(&mut self) {
        for (place, resource) in std::mem::take(&mut self.resources) {
            if !self.services.is_empty() {
                self.check_references(&place, &resource);
            }
            if let Resource::Authorization(policy) = &resource {
                for (field, message) in authorization_policy::warnings(&policy.spec) {
                    self.say(&place, Severity::Warning, &field, message);
                }
            }
            self.resources.push((place, resource));
        }
        let resources: Vec<Resource> = self.resources.iter().map(|(_, resource)| resource.clone()).collect();
        for conflict in conflicts(&resources) {
            let place = self.resources.iter().find(|(_, resource)| resource.id() == conflict.loser);
            let Some(place) = place.map(|(place, _)| place.clone()) else { continue };
            let message =
                format!("{} contradicts {}, which holds: {}", conflict.loser, conflict.winner, conflict.about);
            self.say(&place, Severity::Warning, "", message);
        }
    }

    fn check_references(&mut self, place: &Place<'_>, resource: &Resource) {
        let namespace = resource.meta().namespace.clone();
        let mut missing = Vec::new();
        for (n, parent) in resource.parents().iter().enumerate() {
            let Some(service) = parent.service(&namespace) else { continue };
            missing.extend(self.unknown(&service, parent.port).map(|why| (format!("spec.parentRefs[{n}]"), why)));
        }
        if resource.parents().is_empty() {
            for target in resource.targets() {
                let Target::Service(service) = target else { continue };
                missing.extend(self.unknown(&service, None).map(|why| ("spec.targetRef".to_owned(), why)));
            }
        }
        for (field, service, port) in backends(resource) {
            missing.extend(self.unknown(&service, port).map(|why| (field, why)));
        }
        for (field, message) in missing {
            self.say(place, Severity::Warning, &field, message);
        }
    }

    fn unknown(&self, service: &ServiceName, port: Option<u16>) -> Option<String> {
        let Some(described) = self.services.get(service) else {
            return Some(format!(
                "{service} is not defined in these files; add its MeshService, or see that another source has it"
            ));
        };
        let port = port?;
        let known = described.definition.ports.iter().any(|known| known.port == port);
        (!known).then(|| format!("{service} has no port {port}; use one of its own, or add it to its spec.ports"))
    }
}

/// Where a resource sends to, and where it says so.
fn backends(resource: &Resource) -> Vec<(String, ServiceName, Option<u16>)> {
    let namespace = &resource.meta().namespace;
    let of = |n: usize, backends: &[super::Backend]| {
        let named = |(m, backend): (usize, &super::Backend)| {
            Some((format!("spec.rules[{n}].backendRefs[{m}]"), backend.service(namespace)?, backend.port))
        };
        backends.iter().enumerate().filter_map(named).collect::<Vec<_>>()
    };
    match resource.route() {
        Some(route) => {
            let sends = route.sends().into_iter().enumerate();
            sends.flat_map(|(n, (backends, _))| of(n, backends)).collect()
        }
        None => resource
            .backends()
            .into_iter()
            .map(|service| ("spec.failover.backendRefs".to_owned(), service, None))
            .collect(),
    }
}
