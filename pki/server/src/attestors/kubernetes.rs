//! Pods that show a projected service account token. It is verified here, by the cluster's keys: no call to its API, so
//! that nothing waits for it when many hosts come at once.

use std::sync::Arc;
use std::time::SystemTime;

use meshd_identity::jwt::Jwt;
use meshd_identity::{JwtKey, TrustDomain, keys_of_jwks};
use meshd_pki_api::v1;

use super::config::{Becomes, Kubernetes};
use super::{Attested, remote_is_allowed};
use crate::enrol::excerpt;
use crate::refused::Refused;

pub(super) const NAMES: [&str; 4] = ["namespace", "account", "pod", "node"];

pub(super) struct Cluster {
    name: String,
    issuer: String,
    audience: String,
    keys: Vec<JwtKey>,
    accounts: Vec<Account>,
}

/// A cluster that was not reached since the start.
#[derive(Debug, Clone)]
pub(super) struct Awaited {
    pub(super) name: String,
    pub(super) issuer: String,
}

/// Whose token it is, as the cluster says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) cluster: String,
    pub(crate) namespace: String,
    pub(crate) account: String,
    pub(crate) pod: Option<String>,
    /// In tokens of Kubernetes 1.32 and later.
    pub(crate) node: Option<String>,
}

struct Account {
    namespace: String,
    name: String,
    becomes: Becomes,
}

impl Cluster {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn read(config: &Kubernetes, jwks: &[u8], domain: &TrustDomain) -> Result<Cluster, String> {
        let keys = keys_of_jwks(jwks).map_err(|_| "what it has for keys is no JWK Set".to_owned())?;
        if keys.is_empty() {
            return Err("its JWK Set has no RSA or elliptic key with a `kid`".to_owned());
        }
        let accounts = config.service_account.iter().map(|one| {
            let becomes = one.becomes(domain, &NAMES)?;
            Ok(Account { namespace: one.namespace.clone(), name: one.name.clone(), becomes })
        });
        Ok(Cluster {
            name: config.name.clone(),
            issuer: config.issuer.clone(),
            audience: config.audience.clone(),
            keys,
            accounts: accounts.collect::<Result<_, String>>()?,
        })
    }
}

/// `audience`: who the token must be for, if not for whom the cluster's are.
pub(super) fn believe(
    clusters: &[Arc<Cluster>],
    awaited: &[Awaited],
    token: &str,
    audience: Option<&str>,
    now: SystemTime,
) -> Result<(Arc<Cluster>, Pod), Refused> {
    let bad = |error: meshd_identity::jwt::JwtError| Refused::Unauthenticated(format!("the Kubernetes token: {error}"));
    let token = Jwt::read(token).map_err(bad)?;
    let issuer = token.text("iss").map_err(bad)?;
    let cluster = clusters.iter().find(|cluster| cluster.issuer == issuer).ok_or_else(|| {
        if let Some(one) = awaited.iter().find(|one| one.issuer == issuer) {
            return Refused::Unavailable(format!("the keys of cluster `{}` are not here yet; try again", one.name));
        }
        let known: Vec<&str> = clusters.iter().map(|cluster| cluster.issuer.as_str()).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        Refused::Unauthenticated(format!(
            "the Kubernetes token is of `{}`; this PKI knows: {known} (--attestors)",
            excerpt(issuer)
        ))
    })?;
    token.verify(&cluster.keys).map_err(bad)?;
    token.is_valid_at(now).map_err(bad)?;
    token.is_for(audience.unwrap_or(&cluster.audience)).map_err(bad)?;
    let claim = |path: &str| Some(token.claims.get("kubernetes.io")?.pointer(path)?.as_str()?.to_owned());
    let whole = |what: Option<String>| {
        what.ok_or_else(|| Refused::Unauthenticated("the Kubernetes token is of no service account".to_owned()))
    };
    let pod = Pod {
        cluster: cluster.name.clone(),
        namespace: whole(claim("/namespace"))?,
        account: whole(claim("/serviceaccount/name"))?,
        pod: claim("/pod/name"),
        node: claim("/node/name"),
    };
    Ok((cluster.clone(), pod))
}

pub(super) fn attest(
    clusters: &[Arc<Cluster>],
    awaited: &[Awaited],
    proof: &v1::KubernetesTokenProof,
    remote: &str,
    now: SystemTime,
) -> Result<Attested, Refused> {
    let (cluster, pod) = believe(clusters, awaited, &proof.token, None, now)?;
    let is_it = |account: &&Account| account.namespace == pod.namespace && account.name == pod.account;
    let way = format!("kubernetes:{}", cluster.name);
    let Some(account) = cluster.accounts.iter().find(is_it) else {
        return Err(Refused::Forbidden(format!(
            "service account `{}/{}` is none of [[kubernetes]] `{}`; add it in --attestors",
            excerpt(&pod.namespace),
            excerpt(&pod.account),
            cluster.name
        )));
    };
    remote_is_allowed(&way, &account.becomes.from, remote)?;
    let host_id = account.becomes.host.fill(|name| match name {
        "namespace" => Some(pod.namespace.clone()),
        "account" => Some(pod.account.clone()),
        "pod" => pod.pod.clone(),
        _ => pod.node.clone(),
    });
    let host_id = host_id.map_err(|why| Refused::Forbidden(format!("the Kubernetes token cannot be a host: {why}")))?;
    Ok(Attested::new(way, host_id, &account.becomes))
}
