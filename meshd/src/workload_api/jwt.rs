//! Tokens: asked of the PKI, verified with the keys of the trust bundles. This is the seam to both.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::pin::Pin;

use meshd_identity::{SpiffeId, TrustDomain};
use meshd_workload_api::spiffe::{JwtBundlesResponse, ValidateJwtsvidResponse};
use meshd_workload_api::{Kind, ListValue, Struct, Value};
use serde_json::Map;

/// A token, or the reason why there is none now.
pub type Issued = Pin<Box<dyn Future<Output = Result<String, IssueError>> + Send>>;

#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The PKI does not permit this host the identity.
    #[error("{0}")]
    Refused(String),
    /// The audience.
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Away(String),
}

/// Where tokens and what verifies them come from.
pub trait JwtSource: Send + Sync {
    /// A token of `identity` for `audience` (never empty), in JWS compact serialisation.
    fn issue(&self, identity: SpiffeId, audience: Vec<String>) -> Issued;

    /// A JWK Set per trust domain that `identity` has dealings with, of keys that verify tokens and no others. Changes
    /// together with the credentials.
    fn keys(&self, identity: &SpiffeId) -> BTreeMap<TrustDomain, Vec<u8>>;

    /// What a token says, if it is one for `audience` and valid now, of a trust domain that `identity` has dealings with;
    /// else what is wrong with it.
    fn verify(&self, token: &str, audience: &str, identity: &SpiffeId) -> Result<Verified, String>;
}

/// What a valid token says.
#[derive(Debug)]
pub struct Verified {
    /// Of any trust domain we have keys of, so of any shape.
    pub spiffe_id: String,
    pub claims: Map<String, serde_json::Value>,
}

pub(super) fn validated(token: Verified) -> ValidateJwtsvidResponse {
    ValidateJwtsvidResponse { spiffe_id: token.spiffe_id, claims: Some(object(token.claims)) }
}

fn object(fields: Map<String, serde_json::Value>) -> Struct {
    Struct { fields: fields.into_iter().map(|(name, value)| (name, claim(value))).collect() }
}

fn claim(value: serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match value {
        Json::Null => Kind::NullValue(0),
        Json::Bool(value) => Kind::BoolValue(value),
        // Protobuf knows no other numbers; every number of JSON is one of these or near one.
        Json::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or(f64::NAN)),
        Json::String(value) => Kind::StringValue(value),
        Json::Array(values) => Kind::ListValue(ListValue { values: values.into_iter().map(claim).collect() }),
        Json::Object(fields) => Kind::StructValue(object(fields)),
    };
    Value { kind: Some(kind) }
}

pub(super) fn bundles(keys: BTreeMap<TrustDomain, Vec<u8>>) -> JwtBundlesResponse {
    let bundles: HashMap<_, _> = keys.into_iter().map(|(domain, keys)| (format!("spiffe://{domain}"), keys)).collect();
    JwtBundlesResponse { bundles }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn claims_of_every_kind_are_told() {
        let serde_json::Value::Object(claims) = json!({ "aud": ["a"], "exp": 7, "x": { "y": true }, "z": null }) else {
            panic!("not an object");
        };
        let told = validated(Verified { spiffe_id: "spiffe://mesh.example/a".to_owned(), claims });
        let fields = told.claims.unwrap().fields;
        let of = |name: &str| fields[name].kind.clone().unwrap();
        let Kind::ListValue(ListValue { values }) = of("aud") else { panic!("not a list") };
        assert_eq!(values[0].kind, Some(Kind::StringValue("a".to_owned())));
        assert_eq!((of("exp"), of("z")), (Kind::NumberValue(7.0), Kind::NullValue(0)));
        let Kind::StructValue(x) = of("x") else { panic!("not an object") };
        assert_eq!(x.fields["y"].kind, Some(Kind::BoolValue(true)));
    }
}
