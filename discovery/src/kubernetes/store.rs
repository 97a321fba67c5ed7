//! Documents as objects of the cluster, each replaced whole and only over the version it was read at, as in all backends.
//! Server-side apply would leave what others set and a document does not name, and tell nobody.

use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};
use tokio::sync::Mutex;

use super::client::{Asked, Call, Client};
use super::error::Error;
use super::remote::encode;
use super::settings::Settings;
use crate::write::{Answer, Kind, Over, ResourceName, Store, StoreError, Stored, Write};

/// As `kubectl get --show-managed-fields` shows it.
const MANAGER: &str = "meshd";
const JSON: &str = "application/json";
/// Objects per page of a list.
const PAGE: usize = 500;
/// Whoever writes over anything meets changes that come between reading and writing.
const MOST_TRIES: usize = 5;

pub(crate) struct KubernetesStore {
    name: String,
    /// One request at a time: it is for an operator.
    client: Mutex<Client>,
}

/// What is asked of which object or list.
struct Request<'a> {
    verb: &'static str,
    method: Method,
    path: &'a str,
    content: &'static str,
    body: String,
    /// For messages.
    what: &'a str,
}

impl KubernetesStore {
    pub(super) fn new(name: &str, settings: Settings) -> KubernetesStore {
        KubernetesStore { name: name.to_owned(), client: Mutex::new(Client::new(settings)) }
    }

    async fn call(&self, request: Request<'_>) -> Result<Value, StoreError> {
        let Request { verb, method, path, content, body, what } = request;
        let asked = Asked { verb, resource: what.to_owned() };
        let call = Call { method, path, content, body: Bytes::from(body) };
        let answer = self.client.lock().await.call(call, &asked).await;
        let answer = answer.map_err(|error| self.trouble(verb, what, error))?;
        serde_json::from_slice(&answer).map_err(|error| {
            StoreError::Unreachable(format!("what the API server of source {} says cannot be read: {error}", self.name))
        })
    }

    fn trouble(&self, verb: &str, what: &str, error: Error) -> StoreError {
        let source = &self.name;
        match error {
            Error::Forbidden { reason, .. } => StoreError::Denied(format!(
                "the cluster of source {source} does not let this user {verb} {what}: {reason}; bind the ClusterRole \
                 `meshd-editor` of deploy/kubernetes/editor.yaml to it, or name another --kubeconfig"
            )),
            Error::Unauthorized { .. } => StoreError::Denied(format!("source {source}: {error}")),
            Error::Refused { status: 409, reason, .. } => StoreError::Conflict(format!(
                "the cluster of source {source} does not {verb} {what}: {reason}; `meshd get` it again and make your change \
                 there, or write over it with `--force`"
            )),
            Error::Refused { status: 404, reason, .. } if reason.contains("namespaces") => StoreError::Absent(format!(
                "the cluster of source {source} has no such namespace for {what}: {reason}; `kubectl create namespace` makes it"
            )),
            Error::Refused { status: 404, reason, .. } => StoreError::Absent(format!(
                "the cluster of source {source} does not know {what}: {reason}; `kubectl apply -f deploy/kubernetes/crds.yaml` \
                 teaches it our kinds"
            )),
            Error::Refused { .. } => StoreError::Refused(format!("source {source}: {what}: {error}")),
            error => {
                let unknown = if verb == "list" { "" } else { "; whether it was done is not known: do it again" };
                StoreError::Unreachable(format!("source {source}: {error}{unknown}"))
            }
        }
    }

    /// By the newest version that the cluster knows. `selector` is empty, or goes on after other options.
    async fn list_all(&self, kind: Kind, namespace: Option<&str>, selector: &str) -> Result<Vec<Stored>, StoreError> {
        let mut unknown = None;
        for version in kind.versions() {
            match self.pages(kind, version, namespace, selector).await {
                Err(error @ StoreError::Absent(_)) => unknown = Some(error),
                listed => return listed,
            }
        }
        unknown.map_or(Ok(Vec::new()), Err)
    }

    async fn pages(
        &self,
        kind: Kind,
        version: &str,
        namespace: Option<&str>,
        selector: &str,
    ) -> Result<Vec<Stored>, StoreError> {
        let (mut all, mut next) = (Vec::new(), String::new());
        let place = namespace.map_or("all namespaces".to_owned(), |namespace| format!("namespace {namespace}"));
        let what = format!("{} in {place}", kind.plural());
        loop {
            let path = format!("{}?limit={PAGE}{selector}{next}", collection(kind, version, namespace));
            let request = Request {
                verb: "list",
                method: Method::GET,
                path: &path,
                content: "",
                body: String::new(),
                what: &what,
            };
            let list = self.call(request).await?;
            let items = list["items"].as_array().into_iter().flatten();
            all.extend(items.filter_map(|object| read_object(kind, version, object)));
            match list["metadata"]["continue"].as_str().filter(|token| !token.is_empty()) {
                Some(token) => next = format!("&continue={}", encode(token)),
                None => return Ok(all),
            }
        }
    }

    /// By a list, which hosts have the right to.
    async fn find(&self, resource: &ResourceName) -> Result<Option<Stored>, StoreError> {
        let selector = format!("&fieldSelector={}", encode(&format!("metadata.name={}", resource.name)));
        Ok(self.list_all(resource.kind, Some(&resource.namespace), &selector).await?.pop())
    }

    async fn send(&self, write: Write<'_>) -> Result<bool, StoreError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let sent = match write.over {
                Over::Nothing => self.create(write).await,
                Over::Version(version) => self.replace(write, Some(version.as_str())).await,
                Over::Anything => self.replace(write, None).await,
            };
            match sent {
                Err(StoreError::Conflict(_)) if *write.over == Over::Anything && tries < MOST_TRIES => {}
                sent => return sent,
            }
        }
    }

    async fn create(&self, write: Write<'_>) -> Result<bool, StoreError> {
        let resource = &write.manifest.resource;
        let document = &write.manifest.document;
        let path = collection(resource.kind, version_of(document), Some(&resource.namespace));
        let (path, body, what) = (path + &options(write), wanted(document).to_string(), resource.to_string());
        let request = Request { verb: "create", method: Method::POST, path: &path, content: JSON, body, what: &what };
        self.call(request).await.map(|_| true)
    }

    /// What is there in that version, or any.
    async fn replace(&self, write: Write<'_>, version: Option<&str>) -> Result<bool, StoreError> {
        let resource = &write.manifest.resource;
        let (path, what) = (path_of(resource, version_of(&write.manifest.document)), resource.to_string());
        let request =
            Request { verb: "get", method: Method::GET, path: &path, content: "", body: String::new(), what: &what };
        let there = match self.call(request).await {
            Err(StoreError::Absent(_)) if version.is_none() => return self.create(write).await,
            // Else the cluster does not know this version of the kind.
            Err(StoreError::Absent(_)) if self.find(resource).await?.is_none() => {
                return Err(StoreError::changed(resource, None));
            }
            answer => answer?,
        };
        let mut object = replaced(&there, &write.manifest.document);
        if let Some(version) = version {
            object["metadata"]["resourceVersion"] = json!(version);
        }
        let (path, body) = (path + &options(write), object.to_string());
        let request = Request { verb: "update", method: Method::PUT, path: &path, content: JSON, body, what: &what };
        let made = self.call(request).await?;
        Ok(write.dry_run || made["metadata"]["resourceVersion"] != object["metadata"]["resourceVersion"])
    }

    async fn delete(&self, resource: &ResourceName, version: Option<&str>) -> Result<(), StoreError> {
        let preconditions = version.map(|version| json!({ "resourceVersion": version }));
        let body = json!({ "kind": "DeleteOptions", "apiVersion": "v1", "preconditions": preconditions }).to_string();
        let what = resource.to_string();
        let mut unknown = Ok(());
        for version in resource.kind.versions() {
            let (path, body) = (path_of(resource, version), body.clone());
            let request =
                Request { verb: "delete", method: Method::DELETE, path: &path, content: JSON, body, what: &what };
            match self.call(request).await {
                Err(error @ StoreError::Absent(_)) => unknown = Err(error),
                done => return done.map(drop),
            }
        }
        unknown
    }
}

/// What an operator says; the rest the server writes itself.
fn wanted(document: &Value) -> Value {
    let metadata: serde_json::Map<String, Value> = ["name", "namespace", "labels", "annotations"]
        .iter()
        .filter_map(|field| Some(((*field).to_owned(), document["metadata"].get(field)?.clone())))
        .collect();
    json!({
        "apiVersion": document["apiVersion"], "kind": document["kind"], "metadata": metadata, "spec": document["spec"],
    })
}

/// An object with all that a document says and nothing else of its kind. What a cluster knows of every object stays:
/// finalizers, owners, status, and labels and annotations that the document does not name.
fn replaced(there: &Value, document: &Value) -> Value {
    let (mut object, wanted) = (there.clone(), wanted(document));
    object["spec"] = wanted["spec"].clone();
    for field in ["labels", "annotations"] {
        for (key, value) in wanted["metadata"][field].as_object().into_iter().flatten() {
            object["metadata"][field][key] = value.clone();
        }
    }
    object
}

/// `v1` of `gateway.networking.k8s.io/v1`.
fn version_of(document: &Value) -> &str {
    document["apiVersion"].as_str().unwrap_or_default().rsplit('/').next().unwrap_or_default()
}

fn options(write: Write<'_>) -> String {
    let dry_run = if write.dry_run { "&dryRun=All" } else { "" };
    format!("?fieldManager={MANAGER}&fieldValidation=Strict{dry_run}")
}

fn collection(kind: Kind, version: &str, namespace: Option<&str>) -> String {
    let namespace = namespace.map_or(String::new(), |namespace| format!("/namespaces/{namespace}"));
    format!("/apis/{}/{version}{namespace}/{}", kind.group(), kind.plural())
}

fn path_of(resource: &ResourceName, version: &str) -> String {
    format!("{}/{}", collection(resource.kind, version, Some(&resource.namespace)), resource.name)
}

fn read_object(kind: Kind, version: &str, object: &Value) -> Option<Stored> {
    let metadata = &object["metadata"];
    let text = |name: &str| metadata[name].as_str();
    let (name, namespace) = (text("name")?, text("namespace")?);
    let mut document = json!({
        "apiVersion": format!("{}/{version}", kind.group()), "kind": kind.name(), "metadata": { "name": name, "namespace": namespace },
    });
    if !object["spec"].is_null() {
        document["spec"] = object["spec"].clone();
    }
    Some(Stored {
        resource: ResourceName { kind, namespace: namespace.to_owned(), name: name.to_owned() },
        origin: format!("{kind} {namespace}/{name}"),
        version: text("resourceVersion").unwrap_or_default().to_owned(),
        by: last_writer(&metadata["managedFields"]),
        document: Ok(document),
    })
}

/// Who wrote last, and when.
fn last_writer(managed: &Value) -> Option<String> {
    let writers = managed.as_array()?.iter().filter(|entry| entry["subresource"].is_null());
    let last = writers.max_by_key(|entry| entry["time"].as_str().unwrap_or_default().to_owned())?;
    Some(crate::yaml::printable(&format!(
        "{} {}",
        last["manager"].as_str()?,
        last["time"].as_str().unwrap_or_default()
    )))
}

impl Store for KubernetesStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn list<'a>(&'a self, kind: Kind, namespace: Option<&'a str>) -> Answer<'a, Vec<Stored>> {
        Box::pin(self.list_all(kind, namespace, ""))
    }

    fn get<'a>(&'a self, resource: &'a ResourceName) -> Answer<'a, Option<Stored>> {
        Box::pin(self.find(resource))
    }

    fn write<'a>(&'a self, write: Write<'a>) -> Answer<'a, bool> {
        Box::pin(self.send(write))
    }

    fn remove<'a>(&'a self, resource: &'a ResourceName, version: Option<&'a str>) -> Answer<'a, ()> {
        Box::pin(self.delete(resource, version))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_adds_is_no_part_of_a_document_and_the_last_writer_is_named() {
        let kind = Kind::MeshService;
        let object = json!({
            "metadata": {
                "name": "payments", "namespace": "shop", "uid": "u", "generation": 3, "resourceVersion": "17",
                "managedFields": [
                    { "manager": "kubectl", "time": "2026-11-22T05:00:00Z" },
                    { "manager": "meshd", "time": "2026-11-22T06:00:00Z" },
                    { "manager": "status", "time": "2026-11-22T07:00:00Z", "subresource": "status" },
                ],
            },
            "spec": { "ports": [{ "port": 80 }] }, "status": {},
        });
        let stored = read_object(kind, "v1alpha1", &object).unwrap();
        assert_eq!((&*stored.version, stored.by.as_deref()), ("17", Some("meshd 2026-11-22T06:00:00Z")));
        let expected = json!({
            "apiVersion": "meshd.dev/v1alpha1", "kind": "MeshService",
            "metadata": { "name": "payments", "namespace": "shop" }, "spec": { "ports": [{ "port": 80 }] },
        });
        assert_eq!(stored.document, Ok(expected));
        assert_eq!(
            path_of(&stored.resource, "v1alpha1"),
            "/apis/meshd.dev/v1alpha1/namespaces/shop/meshservices/payments"
        );
    }

    #[test]
    fn what_a_document_leaves_out_is_gone_and_what_every_object_has_stays() {
        let metadata = json!({
            "name": "payments", "resourceVersion": "17", "finalizers": ["x"], "labels": { "a": "1", "b": "2" },
        });
        let there = json!({
            "metadata": metadata, "spec": { "ports": [{ "port": 80 }], "allowPlaintext": true }, "status": { "s": 1 },
        });
        let document = json!({
            "metadata": { "name": "payments", "labels": { "b": "3" }, "annotations": { "c": "4" } },
            "spec": { "ports": [{ "port": 81 }] },
        });
        let expected = json!({
            "metadata": {
                "name": "payments", "resourceVersion": "17", "finalizers": ["x"], "labels": { "a": "1", "b": "3" },
                "annotations": { "c": "4" },
            },
            "spec": { "ports": [{ "port": 81 }] }, "status": { "s": 1 },
        });
        assert_eq!(replaced(&there, &document), expected);
    }
}
