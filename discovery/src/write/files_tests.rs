//! With the verbs above the store, as it is the simplest one.

use std::path::Path;

use tempfile::TempDir;

use super::super::{Applying, By, Manifest, Outcome, apply, delete, read, versioned, yaml};
use super::*;
use crate::fake::trust_domain;

fn replace(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, text)?;
    fs::rename(new, path)
}

struct Bed {
    directory: TempDir,
    store: FilesStore,
}

fn document(name: &str, port: u16) -> String {
    format!(
        "apiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata: {{ name: {name}, namespace: shop }}\nspec: {{ ports: \
         [ {{ port: {port} }} ] }}\n"
    )
}

fn manifest(text: &str) -> Manifest {
    read("x.yaml", text, &trust_domain()).unwrap().pop().unwrap()
}

fn how() -> Applying {
    Applying { by: By::new("root@web now"), force: false, dry_run: false }
}

impl Bed {
    fn new() -> Bed {
        let directory = tempfile::tempdir().unwrap();
        let store = FilesStore::new("files", directory.path().to_owned(), replace);
        Bed { directory, store }
    }

    fn put(&self, name: &str, text: &str) {
        fs::write(self.directory.path().join(name), text).unwrap();
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<String> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    async fn apply(&self, text: &str) -> Result<Outcome, StoreError> {
        apply(&self.store, &manifest(text), &how()).await
    }

    async fn get(&self) -> Option<Stored> {
        self.store.get(&manifest(&document("payments", 80)).resource).await.unwrap()
    }
}

#[tokio::test]
async fn a_document_is_created_changed_left_alone_and_deleted() {
    let bed = Bed::new();
    assert_eq!(bed.apply(&document("payments", 80)).await, Ok(Outcome::Created));
    assert_eq!(bed.names(), ["meshservice.shop.payments.yaml"]);
    let stored = bed.get().await.unwrap();
    assert_eq!(stored.by.as_deref(), Some("root@web now"));
    assert_eq!(bed.apply(&document("payments", 80)).await, Ok(Outcome::Unchanged));
    assert_eq!(bed.get().await.unwrap().version, stored.version);
    let replaced = Some("root@web now".to_owned());
    assert_eq!(bed.apply(&document("payments", 81)).await, Ok(Outcome::Changed { replaced }));
    let kind = Kind::MeshService;
    assert_eq!(bed.store.list(kind, Some("shop")).await.unwrap().len(), 1);
    assert_eq!(bed.store.list(kind, Some("bank")).await.unwrap(), []);
    let was = delete(&bed.store, &stored.resource, None, &how()).await.unwrap();
    assert_eq!(was.document.unwrap()["spec"]["ports"][0]["port"], 81);
    assert!(bed.names().is_empty());
    let gone = delete(&bed.store, &stored.resource, None, &how()).await;
    assert!(matches!(gone, Err(StoreError::Absent(_))), "{gone:?}");
}

#[tokio::test]
async fn a_dry_run_says_what_would_be_and_changes_nothing() {
    let bed = Bed::new();
    let dry = Applying { dry_run: true, ..how() };
    assert_eq!(apply(&bed.store, &manifest(&document("payments", 80)), &dry).await, Ok(Outcome::Created));
    assert!(bed.names().is_empty());
    bed.apply(&document("payments", 80)).await.unwrap();
    let resource = manifest(&document("payments", 80)).resource;
    assert!(delete(&bed.store, &resource, None, &dry).await.is_ok() && bed.get().await.is_some());
}

#[tokio::test]
async fn who_changed_what_somebody_else_changed_meanwhile_is_told_by_whom() {
    let bed = Bed::new();
    bed.apply(&document("payments", 80)).await.unwrap();
    let read = bed.get().await.unwrap();
    let mut edited = versioned(read.document.as_ref().unwrap(), &read.version);
    edited["spec"]["ports"][0]["port"] = 82.into();
    bed.apply(&document("payments", 81)).await.unwrap();
    let refused = bed.apply(&yaml(&edited)).await.unwrap_err();
    assert!(matches!(&refused, StoreError::Conflict(text) if text.contains("by root@web now")), "{refused}");
    let forced = Applying { force: true, ..how() };
    assert!(apply(&bed.store, &manifest(&yaml(&edited)), &forced).await.is_ok());
    let late = delete(&bed.store, &read.resource, Some(&read.version), &how()).await;
    assert!(matches!(late, Err(StoreError::Conflict(_))), "{late:?}");
    // Between reading and writing, too.
    let over = Over::Version(read.version);
    let manifest = manifest(&document("payments", 83));
    let write = Write { manifest: &manifest, by: &By::new("x"), over: &over, dry_run: false };
    assert!(matches!(bed.store.write(write).await, Err(StoreError::Conflict(_))));
}

#[tokio::test]
async fn a_hand_written_file_is_kept_if_it_has_others_and_written_over_if_it_has_none() {
    let bed = Bed::new();
    bed.put("shop.yaml", &format!("{}---\n{}", document("ledger", 1), document("payments", 80)));
    let refused = bed.apply(&document("payments", 81)).await.unwrap_err().to_string();
    assert!(refused.contains("shop.yaml:5, in a file with 2 documents"), "{refused}");
    let resource = manifest(&document("payments", 80)).resource;
    assert!(matches!(delete(&bed.store, &resource, None, &how()).await, Err(StoreError::Refused(_))));
    assert!(bed.get().await.is_some());
    bed.put("shop.yaml", &document("payments", 80));
    assert_eq!(bed.apply(&document("payments", 81)).await, Ok(Outcome::Changed { replaced: None }));
    assert_eq!(bed.names(), ["shop.yaml"]);
}

#[tokio::test]
async fn a_missing_directory_is_named() {
    let store = FilesStore::new("files", "/no/such".into(), replace);
    let error = apply(&store, &manifest(&document("payments", 80)), &how()).await.unwrap_err();
    assert!(matches!(&error, StoreError::Absent(text) if text.contains("/no/such")), "{error}");
}
