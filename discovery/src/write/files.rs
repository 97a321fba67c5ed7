//! Documents in a directory of this host, one file for each that is written here. What people wrote stays theirs: a file
//! with several documents is never touched.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Answer, Kind, Over, Replace, ResourceName, Store, StoreError, Stored, Write, manifest};
use crate::{documents, files};

pub(crate) struct FilesStore {
    name: String,
    dir: PathBuf,
    replace: Replace,
}

/// A document in a file.
struct Found {
    path: PathBuf,
    /// How many there are in the file.
    neighbours: usize,
    stored: Stored,
}

impl FilesStore {
    pub(crate) fn new(name: &str, dir: PathBuf, replace: Replace) -> FilesStore {
        FilesStore { name: name.to_owned(), dir, replace }
    }

    fn path_of(&self, resource: &ResourceName) -> PathBuf {
        let ResourceName { kind, namespace, name } = resource;
        self.dir.join(format!("{}.{namespace}.{name}.yaml", kind.lower()))
    }

    /// In the order in which hosts read them. Of one that is there twice the first holds.
    fn look(&self) -> Result<Vec<Found>, StoreError> {
        let mut all: Vec<Found> = Vec::new();
        let names = files::list(&self.dir).map_err(|error| trouble("read directory", &self.dir, &error))?;
        for path in names.into_iter().map(|name| self.dir.join(name)) {
            // Else what it defines would be defined a second time.
            let unreadable = |reason| StoreError::Refused(format!("{} cannot be read: {reason}", path.display()));
            let text = files::read(&path).map_err(unreadable)?;
            let version = version(&path).map_err(|error| trouble("read", &path, &error))?;
            let documents: Vec<(u64, Result<Value, String>)> = documents::split(&text)
                .into_iter()
                .flat_map(|(line, chunk)| manifest::documents(chunk).into_iter().map(move |document| (line, document)))
                .collect();
            let neighbours = documents.len();
            for (line, document) in documents {
                let Some(resource) = document.as_ref().ok().and_then(manifest::name_of) else { continue };
                if all.iter().any(|earlier| earlier.stored.resource == resource) {
                    continue;
                }
                let by = manifest::signer(&text).filter(|_| neighbours == 1);
                let origin = format!("{}:{line}", path.display());
                let stored = Stored { resource, origin, version: version.clone(), by, document };
                all.push(Found { path: path.clone(), neighbours, stored });
            }
        }
        Ok(all)
    }

    fn find(&self, resource: &ResourceName) -> Result<Option<Found>, StoreError> {
        Ok(self.look()?.into_iter().find(|found| found.stored.resource == *resource))
    }

    /// The one that may be changed, while nobody else who does it this way changes anything.
    fn changeable(&self, resource: &ResourceName, over: &Over) -> Result<Option<Found>, StoreError> {
        let found = self.find(resource)?;
        let is_expected = match (over, &found) {
            (Over::Anything, _) | (Over::Nothing, None) => true,
            (Over::Version(version), Some(found)) => found.stored.version == *version,
            _ => false,
        };
        if !is_expected {
            return Err(StoreError::changed(resource, found.as_ref().map(|found| &found.stored)));
        }
        match found {
            Some(found) if found.neighbours > 1 => Err(StoreError::Refused(format!(
                "{resource} is at {}, in a file with {} documents that somebody wrote by hand; edit it there, or move \
                 the document into a file of its own",
                found.stored.origin, found.neighbours
            ))),
            found => Ok(found),
        }
    }

    fn lock(&self) -> Result<File, StoreError> {
        let locked = File::open(&self.dir).and_then(|directory| directory.lock().map(|()| directory));
        locked.map_err(|error| trouble("lock directory", &self.dir, &error))
    }

    fn write_now(&self, write: Write<'_>) -> Result<bool, StoreError> {
        let _lock = self.lock()?;
        let resource = &write.manifest.resource;
        let own = self.path_of(resource);
        let found = self.changeable(resource, write.over)?;
        let path = match found {
            Some(found) => found.path,
            None if own.exists() => {
                let reason = "has that name and holds something else; move it away";
                return Err(StoreError::Refused(format!("{} {reason}", own.display())));
            }
            None => own,
        };
        if !write.dry_run {
            (self.replace)(&path, &write.manifest.signed(write.by)).map_err(|error| trouble("write", &path, &error))?;
        }
        Ok(true)
    }

    fn remove_now(&self, resource: &ResourceName, version: Option<&str>) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        let over = version.map_or(Over::Anything, |version| Over::Version(version.to_owned()));
        let found = self.changeable(resource, &over)?.ok_or_else(|| StoreError::absent(resource, &self.name))?;
        fs::remove_file(&found.path).map_err(|error| trouble("remove", &found.path, &error))
    }
}

/// Another one for every replacement.
fn version(path: &Path) -> io::Result<String> {
    let metadata = fs::metadata(path)?;
    Ok(format!("{:x}-{:x}.{:x}", metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

fn trouble(verb: &str, path: &Path, error: &io::Error) -> StoreError {
    let path = path.display();
    match error.kind() {
        ErrorKind::PermissionDenied => StoreError::Denied(format!("cannot {verb} {path}: {error}; run this as root")),
        ErrorKind::NotFound => StoreError::Absent(format!("cannot {verb} {path}: {error}; create the directory")),
        _ => StoreError::Unreachable(format!("cannot {verb} {path}: {error}")),
    }
}

impl Store for FilesStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn list<'a>(&'a self, kind: Kind, namespace: Option<&'a str>) -> Answer<'a, Vec<Stored>> {
        let wanted = move |stored: &Stored| {
            stored.resource.kind == kind && namespace.is_none_or(|namespace| stored.resource.namespace == namespace)
        };
        let all = self.look();
        Box::pin(async move { Ok(all?.into_iter().map(|found| found.stored).filter(wanted).collect()) })
    }

    fn get<'a>(&'a self, resource: &'a ResourceName) -> Answer<'a, Option<Stored>> {
        Box::pin(async move { Ok(self.find(resource)?.map(|found| found.stored)) })
    }

    fn write<'a>(&'a self, write: Write<'a>) -> Answer<'a, bool> {
        Box::pin(async move { self.write_now(write) })
    }

    fn remove<'a>(&'a self, resource: &'a ResourceName, version: Option<&'a str>) -> Answer<'a, ()> {
        Box::pin(async move { self.remove_now(resource, version) })
    }
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
