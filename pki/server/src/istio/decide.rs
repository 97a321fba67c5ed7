//! Which identity a caller gets. Pure.

use std::fmt;

use meshd_identity::{SpiffeId, TrustDomain};

use super::grants::Grants;
use crate::attestors::Pod;
use crate::enrol::excerpt;
use crate::refused::Refused;

/// Who proved to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Caller {
    Pod(Pod),
    /// Of no node and no cluster: it may have the same again, nothing for others.
    Certificate(SpiffeId),
}

impl Caller {
    /// Its own, by which it is denied, too.
    pub(super) fn identity(&self, domain: &TrustDomain) -> Result<SpiffeId, Refused> {
        match self {
            Caller::Certificate(id) => Ok(id.clone()),
            Caller::Pod(pod) => SpiffeId::workload(domain, &pod.namespace, &pod.account)
                .map_err(|error| Refused::Unauthenticated(format!("the Kubernetes token: {error}"))),
        }
    }

    /// By whom what it was given is on record: few, however many pods there are.
    pub(super) fn holder(&self) -> String {
        match self {
            Caller::Certificate(id) => format!("{}.{}", id.namespace(), id.name()),
            Caller::Pod(pod) => {
                let place = pod.node.as_ref().or(pod.pod.as_ref()).map_or("-", String::as_str);
                format!("{}:{}", pod.cluster, excerpt(place))
            }
        }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Caller::Certificate(id) => write!(f, "its certificate ({})", id.short()),
            Caller::Pod(Pod { cluster, namespace, account, pod, node }) => {
                write!(f, "kubernetes:{cluster} {}/{}", excerpt(namespace), excerpt(account))?;
                pod.iter().try_for_each(|pod| write!(f, ", pod {}", excerpt(pod)))?;
                node.iter().try_for_each(|node| write!(f, ", node {}", excerpt(node)))
            }
        }
    }
}

/// The caller's own identity, or that of a pod it asks for. Whatever the certificate request says is of no meaning.
pub(super) fn identity(
    grants: &Grants,
    domain: &TrustDomain,
    caller: &Caller,
    impersonated: &str,
) -> Result<SpiffeId, Refused> {
    let own = caller.identity(domain)?;
    let wanted = match impersonated {
        "" => own,
        text => for_another(grants, domain, caller, text)?,
    };
    if wanted.trust_domain() != domain {
        let its = wanted.trust_domain();
        return Err(Refused::Forbidden(format!(
            "{wanted} is of `{its}`, this PKI serves `{domain}`; set the trust domain of Istio (meshConfig.trustDomain)"
        )));
    }
    if !grants.has_namespace(wanted.namespace()) {
        let namespace = wanted.namespace();
        return Err(Refused::Forbidden(format!(
            "{wanted}: no identity of namespace `{namespace}` is given this way; see `namespaces` of [istio] in --attestors"
        )));
    }
    Ok(wanted)
}

fn for_another(grants: &Grants, domain: &TrustDomain, caller: &Caller, text: &str) -> Result<SpiffeId, Refused> {
    let wanted: SpiffeId = text
        .parse()
        .map_err(|error: meshd_identity::IdError| Refused::Forbidden(format!("ImpersonatedIdentity: {error}")))?;
    let may = match caller {
        Caller::Pod(pod) => grants.trusts_node(&pod.namespace, &pod.account),
        Caller::Certificate(_) => false,
    };
    if may || caller.identity(domain)? == wanted {
        return Ok(wanted);
    }
    Err(Refused::Forbidden(format!(
        "{caller} asks for {wanted}, and may ask for itself only; see `trusted_node_accounts` of [istio] in --attestors"
    )))
}
