//! What a workload is given of the credentials this host holds. Pure.

use std::sync::Arc;
use std::time::SystemTime;

use meshd_identity::{Bundle, SpiffeId};
use meshd_pki_client::{Credentials, Svid};
use meshd_workload_api::spiffe::{X509BundlesResponse, X509svid, X509svidResponse};

use super::refused::Refused;

/// The certificate of an enrolled identity, if it can be used now.
pub(super) fn svid<'a>(
    credentials: &'a Credentials,
    identity: &SpiffeId,
    now: SystemTime,
) -> Result<&'a Arc<Svid>, Refused> {
    match credentials.workloads.get(identity) {
        Some(svid) if now < svid.not_after => Ok(svid),
        Some(_) => Err(Refused::NotYet(format!("the certificate of {identity} has ended, and the PKI is away"))),
        None if credentials.refused.contains_key(identity) => Err(Refused::NoIdentity),
        None => Err(Refused::NotYet(format!("the PKI has not issued {identity} yet"))),
    }
}

/// Everything at once, every time: what is missing was taken away.
pub(super) fn svids(svid: &Svid, credentials: &Credentials) -> X509svidResponse {
    let only = X509svid {
        spiffe_id: svid.id.to_string(),
        x509_svid: svid.chain.iter().flat_map(|certificate| certificate.iter().copied()).collect(),
        x509_svid_key: svid.key.secret_der().to_vec(),
        bundle: credentials.bundle.roots.concat(),
        hint: credentials.hints.get(&svid.id).cloned().unwrap_or_default(),
    };
    let federated_bundles = credentials.federation.of(&svid.id).map(named).collect();
    X509svidResponse { svids: vec![only], crl: Vec::new(), federated_bundles }
}

/// Ours, and those of the trust domains that the identity has dealings with; each by itself.
pub(super) fn bundles(identity: &SpiffeId, credentials: &Credentials) -> X509BundlesResponse {
    let all = credentials.federation.of(identity).chain([&credentials.bundle]);
    X509BundlesResponse { crl: Vec::new(), bundles: all.map(named).collect() }
}

fn named(bundle: &Bundle) -> (String, Vec<u8>) {
    (format!("spiffe://{}", bundle.trust_domain), bundle.roots.concat())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::Duration;

    use meshd_identity::TrustDomain;
    use meshd_pki_client::fake::FakeCa;

    use super::*;

    #[test]
    fn an_identity_is_given_out_while_it_is_valid_and_permitted() {
        let domain: TrustDomain = "mesh.example".parse().unwrap();
        let [web, other, refused] =
            ["web", "other", "refused"].map(|name| SpiffeId::workload(&domain, "shop", name).unwrap());
        let mut credentials = FakeCa::new(&domain).credentials("host", std::slice::from_ref(&web));
        credentials.refused.insert(refused.clone(), "not permitted".to_owned());
        let now = SystemTime::now();
        assert_eq!(svid(&credentials, &web, now).unwrap().id, web);
        assert_eq!(svid(&credentials, &refused, now).unwrap_err(), Refused::NoIdentity);
        for (identity, now) in [(&other, now), (&web, now + Duration::from_secs(25 * 3600))] {
            assert!(svid(&credentials, identity, now).unwrap_err().may_pass());
        }
    }

    #[test]
    fn an_answer_holds_chain_key_and_roots_as_the_standard_says() {
        let domain: TrustDomain = "mesh.example".parse().unwrap();
        let ca = FakeCa::new(&domain);
        let id = SpiffeId::workload(&domain, "shop", "web").unwrap();
        let mut held = ca.credentials("host", std::slice::from_ref(&id));
        held.hints.insert(id.clone(), "internal".to_owned());
        let svid = &held.workloads[&id];
        let answer = svids(svid, &held);
        let [only] = &answer.svids[..] else { panic!("{} identities", answer.svids.len()) };
        assert_eq!((&*only.spiffe_id, &*only.hint), ("spiffe://mesh.example/ns/shop/sa/web", "internal"));
        assert_eq!(only.x509_svid, [svid.chain[0].as_ref(), svid.chain[1].as_ref()].concat());
        assert_eq!((&only.x509_svid_key[..], &only.bundle), (svid.key.secret_der(), &ca.bundle().roots[0]));
        assert_eq!(bundles(&id, &held).bundles["spiffe://mesh.example"], ca.bundle().roots[0]);
        assert!(answer.federated_bundles.is_empty() && bundles(&id, &held).bundles.len() == 1);
    }

    #[test]
    fn foreign_roots_go_to_those_who_have_dealings_with_them_and_stay_apart() {
        let (domain, other): (TrustDomain, TrustDomain) =
            ("mesh.example".parse().unwrap(), "other.example".parse().unwrap());
        let [web, billing] = ["web", "billing"].map(|name| SpiffeId::workload(&domain, "shop", name).unwrap());
        let foreign = FakeCa::new(&other);
        let mut held = FakeCa::new(&domain).credentials("host", &[web.clone(), billing.clone()]);
        held.federation = foreign.federated_for(std::slice::from_ref(&web));
        let answer = svids(&held.workloads[&web], &held);
        assert_eq!(answer.svids[0].bundle, held.bundle.roots[0]);
        let theirs = foreign.bundle().roots.concat();
        assert_eq!(answer.federated_bundles, HashMap::from([("spiffe://other.example".to_owned(), theirs.clone())]));
        let told = bundles(&web, &held).bundles;
        assert_eq!((told.len(), &told["spiffe://other.example"]), (2, &theirs));
        assert!(svids(&held.workloads[&billing], &held).federated_bundles.is_empty());
        assert_eq!(bundles(&billing, &held).bundles.len(), 1);
    }
}
