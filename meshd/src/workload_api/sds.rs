//! Envoy's secret discovery, in the form where each answer tells all secrets asked for.

use std::sync::Arc;

use meshd_workload_api::envoy::secret_discovery_service_server::SecretDiscoveryService;
use meshd_workload_api::envoy::{Any, DiscoveryRequest, DiscoveryResponse};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::limits::StreamSlot;
use super::refused::Refused;
use super::secrets::{SECRET, secrets};
use super::session::{ASK_AGAIN, Answers, Session};

/// Names in one request: a caller has one identity.
const NAMES: usize = 16;

/// The API as one connection sees it.
pub(super) struct Sds(pub(super) Arc<Session>);

#[async_trait]
impl SecretDiscoveryService for Sds {
    type StreamSecretsStream = Answers<DiscoveryResponse>;

    async fn stream_secrets(
        &self,
        requests: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        let slot = self.0.stream()?;
        // A caller that is nobody is told so at once.
        self.0.look().await;
        self.0.identity()?;
        let (out, answers) = mpsc::channel(1);
        tokio::spawn(stream(self.0.clone(), requests.into_inner(), out, slot));
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn fetch_secrets(&self, request: Request<DiscoveryRequest>) -> Result<Response<DiscoveryResponse>, Status> {
        let request = request.into_inner();
        check(&request)?;
        self.0.look().await;
        let resources = secrets(&request.resource_names, &self.0.holding()?)?;
        Ok(Response::new(answer(resources, 1)))
    }
}

async fn stream(
    session: Arc<Session>,
    mut requests: Streaming<DiscoveryRequest>,
    out: mpsc::Sender<Result<DiscoveryResponse, Status>>,
    _slot: StreamSlot,
) {
    let mut subscription = Subscription::default();
    let mut changes = session.changes();
    loop {
        let step = tokio::select! {
            request = requests.message() => match request {
                Ok(Some(request)) => subscription.take(request),
                // It is done, or gone.
                Ok(None) | Err(_) => return,
            },
            () = changes.next() => Ok(()),
            () = sleep(ASK_AGAIN), if subscription.is_owed => Ok(()),
            () = out.closed() => return,
        };
        session.look().await;
        let next = step.and_then(|()| subscription.next(|names| secrets(names, &session.holding()?)));
        let sent = match next {
            Ok(None) => continue,
            Ok(Some(answer)) => out.send(Ok(answer)).await.is_ok(),
            Err(refused) => {
                // If it fails, nobody is there to be refused.
                let _ = out.send(Err(refused.into())).await;
                return;
            }
        };
        if !sent {
            return;
        }
    }
}

/// What a stream was asked for and told. Pure.
#[derive(Default)]
struct Subscription {
    names: Option<Vec<String>>,
    /// What was told last, for which names, and under which number.
    told: Option<(Vec<String>, Vec<Any>)>,
    version: u64,
    /// The last answer could not be had yet.
    is_owed: bool,
}

impl Subscription {
    fn take(&mut self, request: DiscoveryRequest) -> Result<(), Refused> {
        check(&request)?;
        // An answer to what is no longer the last word.
        if self.version > 0 && request.response_nonce != self.version.to_string() {
            return Ok(());
        }
        if let Some(error) = &request.error_detail {
            let reason: String = error.message.chars().take(500).flat_map(char::escape_debug).collect();
            tracing::warn!(reason, "an Envoy refuses the secrets it was given");
        }
        self.names = Some(request.resource_names);
        Ok(())
    }

    /// An answer, if there is anything new to tell.
    fn next(
        &mut self,
        secrets: impl FnOnce(&[String]) -> Result<Vec<Any>, Refused>,
    ) -> Result<Option<DiscoveryResponse>, Refused> {
        self.is_owed = false;
        let Some(names) = &self.names else { return Ok(None) };
        let found = match secrets(names) {
            // What it has is still the best there is.
            Err(refused) if refused.may_pass() && self.told.is_some() => {
                self.is_owed = true;
                return Ok(None);
            }
            found => (names.clone(), found?),
        };
        if self.told.as_ref() == Some(&found) {
            return Ok(None);
        }
        self.version += 1;
        let resources = found.1.clone();
        self.told = Some(found);
        Ok(Some(answer(resources, self.version)))
    }
}

fn check(request: &DiscoveryRequest) -> Result<(), Refused> {
    if !request.type_url.is_empty() && request.type_url != SECRET {
        return Err(Refused::Invalid(format!("only {SECRET} is to be had here")));
    }
    if request.resource_names.len() > NAMES {
        return Err(Refused::Invalid(format!("a stream has at most {NAMES} names")));
    }
    Ok(())
}

fn answer(resources: Vec<Any>, version: u64) -> DiscoveryResponse {
    let version = version.to_string();
    DiscoveryResponse { version_info: version.clone(), resources, type_url: SECRET.to_owned(), nonce: version }
}

#[cfg(test)]
mod tests {
    use meshd_workload_api::envoy::Status as Detail;

    use super::*;

    fn request(names: &[&str], nonce: &str) -> DiscoveryRequest {
        let resource_names = names.iter().map(|name| (*name).to_owned()).collect();
        DiscoveryRequest { resource_names, response_nonce: nonce.to_owned(), ..DiscoveryRequest::default() }
    }

    fn secret(content: &str) -> Result<Vec<Any>, Refused> {
        Ok(vec![Any { type_url: SECRET.to_owned(), value: content.into() }])
    }

    fn nonce(answer: Result<Option<DiscoveryResponse>, Refused>) -> Option<String> {
        answer.unwrap().map(|answer| answer.nonce)
    }

    #[test]
    fn an_answer_is_given_once_and_again_when_it_changes() {
        let mut subscription = Subscription::default();
        assert_eq!(nonce(subscription.next(|_| secret("a"))), None, "nothing was asked for");
        subscription.take(request(&["default"], "")).unwrap();
        assert_eq!(nonce(subscription.next(|_| secret("a"))).as_deref(), Some("1"));
        // The acknowledgement.
        subscription.take(request(&["default"], "1")).unwrap();
        assert_eq!(nonce(subscription.next(|_| secret("a"))), None);
        assert_eq!(nonce(subscription.next(|_| secret("b"))).as_deref(), Some("2"));
        // A refusal is not answered with the same again.
        let error_detail = Some(Detail { code: 3, message: "no".to_owned() });
        subscription.take(DiscoveryRequest { error_detail, ..request(&["default"], "2") }).unwrap();
        assert_eq!(nonce(subscription.next(|_| secret("b"))), None);
    }

    #[test]
    fn other_names_are_answered_unless_they_answer_an_older_answer() {
        let mut subscription = Subscription::default();
        subscription.take(request(&["default"], "")).unwrap();
        subscription.next(|_| secret("a")).unwrap();
        subscription.take(request(&["ROOTCA"], "0")).unwrap();
        assert_eq!(nonce(subscription.next(|_| secret("a"))), None);
        subscription.take(request(&["ROOTCA"], "1")).unwrap();
        assert_eq!(nonce(subscription.next(|_| secret("a"))).as_deref(), Some("2"));
    }

    #[test]
    fn what_may_pass_ends_only_a_stream_that_was_told_nothing_yet() {
        let mut subscription = Subscription::default();
        let away = |_: &[String]| Err(Refused::NotYet("away".to_owned()));
        subscription.take(request(&["default"], "")).unwrap();
        assert!(subscription.next(away).is_err());
        subscription.next(|_| secret("a")).unwrap();
        assert!(!subscription.is_owed);
        assert_eq!(nonce(subscription.next(away)), None);
        assert!(subscription.is_owed, "it is asked for again");
        assert_eq!(nonce(subscription.next(|_| secret("b"))).as_deref(), Some("2"));
        assert!(!subscription.is_owed);
        assert!(subscription.next(|_| Err(Refused::NoIdentity)).is_err());
    }

    #[test]
    fn only_secrets_are_served() {
        let mut subscription = Subscription::default();
        let clusters = "type.googleapis.com/envoy.config.cluster.v3.Cluster".to_owned();
        assert!(subscription.take(DiscoveryRequest { type_url: clusters, ..request(&[], "") }).is_err());
        assert!(subscription.take(request(&["x"; NAMES + 1], "")).is_err());
    }
}
