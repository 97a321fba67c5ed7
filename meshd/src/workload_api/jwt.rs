//! Tokens: asked of the PKI, verified with the keys of the trust bundles.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::pin::Pin;

use meshd_identity::{SpiffeId, TrustDomain};
use meshd_workload_api::spiffe::JwtBundlesResponse;

/// A token, or the reason why there is none now.
pub type Issued = Pin<Box<dyn Future<Output = Result<String, IssueError>> + Send>>;

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct IssueError(pub String);

/// Where tokens and what verifies them come from.
pub trait JwtSource: Send + Sync {
    /// A token of `identity` for `audience` (never empty), in JWS compact serialisation.
    fn issue(&self, identity: SpiffeId, audience: Vec<String>) -> Issued;

    /// A JWK Set per trust domain, of keys that verify tokens and no others. Changes together with the credentials.
    fn keys(&self) -> BTreeMap<TrustDomain, Vec<u8>>;
}

pub(super) fn bundles(keys: BTreeMap<TrustDomain, Vec<u8>>) -> JwtBundlesResponse {
    let bundles: HashMap<_, _> = keys.into_iter().map(|(domain, keys)| (format!("spiffe://{domain}"), keys)).collect();
    JwtBundlesResponse { bundles }
}
