//! The smallest source: YAML documents in a directory, looked at twice a second.
//!
//! Polling is level-triggered: nothing can be missed, and it works on every file system. A change takes effect once
//! two looks in a row saw the same file, so a file caught half-written, or between `unlink` and `create`, is never read.
//! The directory is local and authoritative: a file that is gone takes its services with it, down to none.
//! A directory that cannot be read, on the other hand, says nothing, and everything stays.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use meshd_identity::TrustDomain;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::merge::duplicate;
use crate::resources::{self, Document, Id, Resource, ResourceNews, ResourceRecord, ResourceRefusal, Said};
use crate::yaml::Problem;
use crate::{Epoch, Listing, Record, Refused, Scope, Sink, Source, SourceEvent, SourceFuture, Wanted};

const POLL: Duration = Duration::from_millis(500);
/// How often an unchanged directory is reported as such.
const IN_SYNC_EVERY: Duration = Duration::from_secs(10);
/// About 20,000 endpoints; a larger file is a mistake.
const MAX_FILE_BYTES: u64 = 8 * 1024 * 1024;
const MAX_PROBLEMS_PER_FILE: usize = 20;

/// `kind = "files"`: the `*.yaml` and `*.yml` files of one directory.
pub struct FilesSource {
    name: String,
    dir: PathBuf,
    trust_domain: TrustDomain,
}

impl FilesSource {
    pub(crate) const KIND: &'static str = "files";

    pub fn new(name: &str, dir: PathBuf, trust_domain: TrustDomain) -> FilesSource {
        FilesSource { name: name.to_owned(), dir, trust_domain }
    }
}

impl Source for FilesSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        FilesSource::KIND
    }

    fn resource_prefixes(&self) -> Vec<Arc<str>> {
        vec!["".into()]
    }

    /// Says everything, wanted or not: it is here already.
    fn watch(&self, _wanted: watch::Receiver<Wanted>, sink: Sink) -> SourceFuture {
        Box::pin(poll(Files::new(self.dir.clone(), self.trust_domain.clone()), sink))
    }
}

async fn poll(mut files: Files, sink: Sink) {
    let mut ticks = interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut unreadable: Option<String> = None;
    let mut reported = Instant::now();
    loop {
        ticks.tick().await;
        let look = tokio::task::spawn_blocking(move || {
            let seen = files.look();
            (files, seen)
        });
        // A panic in there is ours; the watcher reports a source that ended.
        let Ok((same, seen)) = look.await else { return };
        files = same;
        let event = match seen {
            Look::Changed(seen) => {
                let Seen { records, refused, resources, refused_resources } = seen;
                let (prefix, epoch) = ("".into(), Epoch::default());
                let news = ResourceNews::Listed { prefix, epoch, records: resources, refused: refused_resources };
                sink.send(SourceEvent::Resources(news)).await;
                SourceEvent::Listed(Listing { scope: Scope::Everything, epoch: Epoch::default(), records, refused })
            }
            Look::Unreadable(error) if unreadable.as_ref() == Some(&error) => continue,
            Look::Unreadable(error) => SourceEvent::Unavailable { error },
            Look::Unchanged if unreadable.is_none() && reported.elapsed() < IN_SYNC_EVERY => continue,
            Look::Unchanged => SourceEvent::InSync,
        };
        unreadable = if let SourceEvent::Unavailable { error } = &event { Some(error.clone()) } else { None };
        reported = Instant::now();
        sink.send(event).await;
    }
}

/// What one look at the directory showed.
#[derive(Debug, PartialEq)]
enum Look {
    Changed(Seen),
    Unchanged,
    Unreadable(String),
}

/// What all files say together.
#[derive(Debug, Clone, Default, PartialEq)]
struct Seen {
    records: Vec<Record>,
    refused: Vec<Refused>,
    resources: Vec<ResourceRecord>,
    /// What is wrong with them is told with the files.
    refused_resources: Vec<ResourceRefusal>,
}

/// The directory as last believed.
struct Files {
    dir: PathBuf,
    trust_domain: TrustDomain,
    files: BTreeMap<OsString, File>,
    said: Option<Seen>,
}

impl Files {
    fn new(dir: PathBuf, trust_domain: TrustDomain) -> Files {
        Files { dir, trust_domain, files: BTreeMap::new(), said: None }
    }

    fn look(&mut self) -> Look {
        let listing = match list(&self.dir) {
            Ok(listing) => listing,
            Err(error) => return Look::Unreadable(unreadable(&self.dir, &error)),
        };
        // At start there is nothing to wait for: what is there is taken at once, and looked at again.
        let at_once = self.said.is_none();
        let mut changed = self.forget_missing(&listing);
        for name in listing {
            let path = self.dir.join(&name);
            let file = self.files.entry(name).or_default();
            file.missing = false;
            changed |= file.look(&path, at_once, &self.trust_domain);
        }
        if !changed && !at_once {
            return Look::Unchanged;
        }
        let now = self.records();
        if self.said.as_ref() == Some(&now) {
            return Look::Unchanged;
        }
        self.said = Some(now.clone());
        Look::Changed(now)
    }

    fn forget_missing(&mut self, listing: &BTreeSet<OsString>) -> bool {
        let before = self.files.len();
        self.files.retain(|name, file| listing.contains(name) || !std::mem::replace(&mut file.missing, true));
        self.files.len() != before
    }

    /// All good documents in the order of file names and lines; of those of one name, the first holds.
    fn records(&self) -> Seen {
        let mut seen = Seen::default();
        let mut defined: BTreeMap<&Id, Arc<str>> = BTreeMap::new();
        for (name, file) in &self.files {
            let path = self.dir.join(name);
            let mut problems = file.problems.clone();
            for good in &file.good {
                let origin: Arc<str> = format!("{}:{}", path.display(), good.line).into();
                match defined.entry(&good.id) {
                    Entry::Occupied(first) => problems.push(good.duplicate(&origin, first.get())),
                    Entry::Vacant(free) => {
                        free.insert(origin.clone());
                        good.say(origin, &mut seen);
                    }
                }
            }
            if !problems.is_empty() {
                seen.refused.push(Refused { key: path.display().to_string().into(), problems });
            }
            for id in file.failed.keys().filter(|id| !file.holds(id)) {
                let refused = Refused { key: key_of(id), problems: Vec::new() };
                match id.kind {
                    resources::Kind::MeshService => seen.refused.push(refused),
                    _ => seen.refused_resources.push(file.refusal(refused, id, &path)),
                }
            }
        }
        seen
    }
}

/// Of a service, what it is called; of anything else, what it is, too.
fn key_of(id: &Id) -> Arc<str> {
    match id.kind {
        resources::Kind::MeshService => format!("{}.{}", id.name, id.namespace).into(),
        kind => format!("{}/{}/{}", kind.lower(), id.namespace, id.name).into(),
    }
}

pub(crate) fn list(dir: &Path) -> io::Result<BTreeSet<OsString>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        // Editors and package managers leave hidden files and `x.yaml~` about.
        let hidden = name.as_encoded_bytes().starts_with(b".");
        let yaml = Path::new(&name).extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        if yaml && !hidden {
            names.insert(name);
        }
    }
    Ok(names)
}

fn unreadable(dir: &Path, error: &io::Error) -> String {
    format!(
        "cannot read directory {}: {error}; create it and let meshd's user read it (an existing, empty directory means \
         no services; until then the last known services stay)",
        dir.display()
    )
}

#[derive(Default)]
struct File {
    /// As of the previous look; a change counts when it has been the same twice.
    seen: Option<Fingerprint>,
    applied: Option<Fingerprint>,
    missing: bool,
    good: Vec<Good>,
    /// Documents of which only the name is good: what is known of them stays, also what an earlier life knew. Each with what
    /// stands for it where nothing is known.
    failed: BTreeMap<Id, Option<Resource>>,
    problems: Vec<String>,
}

struct Good {
    line: u64,
    id: Id,
    said: Said,
}

impl Good {
    fn say(&self, origin: Arc<str>, seen: &mut Seen) {
        match &self.said {
            Said::Service(described) => seen.records.push(described.record(origin)),
            Said::Resources(said) => {
                seen.resources.push(ResourceRecord { key: key_of(&self.id), origin, resources: said.clone() });
            }
        }
    }

    fn duplicate(&self, origin: &str, first: &str) -> String {
        match &self.said {
            Said::Service(described) => duplicate(origin, &described.service, first),
            Said::Resources(_) => {
                format!("{origin}: {} is already said by {first}, which holds; remove one of them", self.id)
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Fingerprint {
    inode: u64,
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Fingerprint {
    fn of(metadata: &fs::Metadata) -> Fingerprint {
        Fingerprint {
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl File {
    /// True when there is something new to say about this file.
    fn look(&mut self, path: &Path, at_once: bool, trust_domain: &TrustDomain) -> bool {
        let fingerprint = match fs::metadata(path) {
            Ok(metadata) => Fingerprint::of(&metadata),
            Err(error) => return self.fail(unreadable_file(path, &error.to_string())),
        };
        if self.applied == Some(fingerprint) {
            return false;
        }
        if self.seen.replace(fingerprint) != Some(fingerprint) && !at_once {
            return false;
        }
        match read(path) {
            Ok(text) => self.apply(path, resources::read(&text, trust_domain)),
            Err(reason) => return self.fail(unreadable_file(path, &reason)),
        }
        // Taken at first sight: it may still be being written, so the next look reads it again.
        self.applied = (!at_once).then_some(fingerprint);
        true
    }

    /// The file as a whole cannot be read: its last good documents stay.
    fn fail(&mut self, problem: String) -> bool {
        self.applied = None;
        let news = self.problems != [problem.as_str()];
        self.problems = vec![problem];
        news
    }

    fn apply(&mut self, path: &Path, documents: Vec<Document>) {
        let named: BTreeSet<Id> = documents.iter().filter_map(|document| document.id.clone()).collect();
        // A document whose name cannot be read might be any of those that are missing now.
        let nameless = documents.iter().any(|document| document.id.is_none());
        let (mut good, mut failed, mut problems) = (Vec::new(), BTreeMap::new(), Vec::new());
        for document in documents {
            let meanwhile = document.id.as_ref().and_then(|id| document.meanwhile(id));
            let Document { line, id, outcome, .. } = document;
            match (outcome, id) {
                (Ok(said), Some(id)) => good.push(Good { line, id, said }),
                // What is good has a name.
                (Ok(_), None) => {}
                (Err(found), id) => {
                    let kept = id.as_ref().map_or(!self.good.is_empty(), |id| self.holds(id));
                    problems.extend(found.iter().map(|problem| message(path, problem, kept)));
                    failed.extend(id.map(|id| (id, meanwhile)));
                }
            }
        }
        let replaced: BTreeSet<Id> = good.iter().map(|good| good.id.clone()).collect();
        let stays = |id: &Id| !replaced.contains(id) && (failed.contains_key(id) || (nameless && !named.contains(id)));
        good.extend(std::mem::take(&mut self.good).into_iter().filter(|old| stays(&old.id)));
        self.good = good;
        self.failed = failed;
        self.problems = capped(path, problems);
    }

    fn refusal(&self, refused: Refused, id: &Id, path: &Path) -> ResourceRefusal {
        let meanwhile = self.failed.get(id).and_then(Clone::clone);
        let origin: Arc<str> = path.display().to_string().into();
        let record = |resource| ResourceRecord { key: refused.key.clone(), origin, resources: vec![resource] };
        ResourceRefusal { meanwhile: meanwhile.map(record), ..refused.clone().into() }
    }

    fn holds(&self, id: &Id) -> bool {
        self.good.iter().any(|good| good.id == *id)
    }
}

pub(crate) fn read(path: &Path) -> Result<String, String> {
    let metadata = fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(format!("it has {} bytes and {MAX_FILE_BYTES} are allowed; split it", metadata.len()));
    }
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = good.iter().filter(|byte| **byte == b'\n').count() + 1;
        format!("line {line} is not UTF-8; save the file as UTF-8")
    })
}

fn unreadable_file(path: &Path, reason: &str) -> String {
    format!(
        "{}: cannot be read: {reason}; its last good documents stay in force until it is corrected or removed",
        path.display()
    )
}

fn message(path: &Path, problem: &Problem, kept: bool) -> String {
    let field = if problem.field.is_empty() { String::new() } else { format!("{}: ", problem.field) };
    let kept = if kept { " (the last good version stays in force)" } else { "" };
    format!("{}:{}: {field}{}{kept}", path.display(), problem.line, problem.reason)
}

fn capped(path: &Path, mut problems: Vec<String>) -> Vec<String> {
    let more = problems.len().saturating_sub(MAX_PROBLEMS_PER_FILE);
    if more > 0 {
        problems.truncate(MAX_PROBLEMS_PER_FILE);
        problems.push(format!("{}: and {more} more problems", path.display()));
    }
    problems
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
