//! Documents as objects of the cluster, by server-side apply: fields that another manager owns are a conflict, not a loss.

use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};
use tokio::sync::Mutex;

use super::client::{Asked, Call, Client};
use super::error::Error;
use super::remote::encode;
use super::settings::Settings;
use crate::write::{Answer, Kind, Over, ResourceName, Store, StoreError, Stored, Write, versioned};

/// As `kubectl get --show-managed-fields` shows it.
const MANAGER: &str = "meshd";
const APPLY: &str = "application/apply-patch+yaml";
const JSON: &str = "application/json";
/// Objects per page of a list.
const PAGE: usize = 500;

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
            Error::Refused { status: 409, reason } => StoreError::Conflict(format!(
                "the cluster of source {source} does not {verb} {what}: {reason}; `meshd get` it again and make your change \
                 there, or write over it with `--force`"
            )),
            Error::Refused { status: 404, reason } if reason.contains("namespaces") => StoreError::Absent(format!(
                "the cluster of source {source} has no such namespace for {what}: {reason}; `kubectl create namespace` makes it"
            )),
            Error::Refused { status: 404, reason } => StoreError::Absent(format!(
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
        let resource = &write.manifest.resource;
        let document = wanted(&write.manifest.document);
        let document = match write.over {
            // The server compares it.
            Over::Version(version) => versioned(&document, version),
            Over::Nothing | Over::Anything => document,
        };
        let force = if *write.over == Over::Anything { "&force=true" } else { "" };
        let dry_run = if write.dry_run { "&dryRun=All" } else { "" };
        let api_version = document["apiVersion"].as_str().unwrap_or_default();
        let version = api_version.rsplit('/').next().unwrap_or_default();
        let path = path_of(resource, version);
        let path = format!("{path}?fieldManager={MANAGER}&fieldValidation=Strict{force}{dry_run}");
        let (body, what) = (document.to_string(), resource.to_string());
        let request = Request { verb: "patch", method: Method::PATCH, path: &path, content: APPLY, body, what: &what };
        let made = self.call(request).await?;
        let version = made["metadata"]["resourceVersion"].as_str().unwrap_or_default();
        Ok(write.dry_run || !matches!(write.over, Over::Version(before) if before == version))
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
}
