//! Whom handshakes believe. An identity is verified under the bundle of the trust domain it claims and no other: an
//! authority of one domain never vouches for an identity of another (SPIFFE Federation section 3).

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use meshd_identity::denial::Marks;
use meshd_identity::{Bundle, SpiffeId, SvidInfo, TrustDomain, inspect_svid};
use meshd_pki_client::Credentials;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, Error, OtherError, RootCertStore};

use super::denied::Denied;
use super::tls::TlsError;

/// Why a peer of a foreign trust domain is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("trust domain `{theirs}` is not federated with `{own}` on this host")]
pub struct Unfederated {
    theirs: TrustDomain,
    own: TrustDomain,
}

/// Whom we believe.
#[derive(Debug)]
pub(super) struct Trust {
    own: TrustDomain,
    domains: HashMap<TrustDomain, Anchors>,
    pub(super) denied: Denied,
    provider: Arc<CryptoProvider>,
}

/// What identities of one trust domain are verified with.
#[derive(Debug)]
struct Anchors {
    store: Arc<RootCertStore>,
    /// The same as certificates.
    roots: Vec<Vec<u8>>,
    clients: Arc<dyn ClientCertVerifier>,
    /// Our identities that may have dealings with the domain; `None` for all.
    dealing: Option<BTreeSet<SpiffeId>>,
}

impl Trust {
    pub(super) fn new(
        credentials: &Credentials,
        denied: Denied,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Trust, TlsError> {
        let own = &credentials.trust_domain;
        let anchors = Anchors::new(&credentials.bundle, None, provider).map_err(TlsError::Roots)?;
        let mut domains = HashMap::from([(own.clone(), anchors)]);
        // Ours is never another's to say.
        for (domain, one) in credentials.federation.domains.iter().filter(|(domain, _)| *domain != own) {
            match Anchors::new(&one.bundle, Some(one.identities.clone()), provider) {
                Ok(anchors) => _ = domains.insert(domain.clone(), anchors),
                Err(error) => tracing::error!(%domain, error, "a federated bundle cannot be verified with"),
            }
        }
        Ok(Trust { own: own.clone(), domains, denied, provider: provider.clone() })
    }

    /// Whether our identity may have dealings with identities of the domain.
    pub(super) fn deals(&self, own: &SpiffeId, domain: &TrustDomain) -> bool {
        let anchors = self.domains.get(domain);
        anchors.is_some_and(|anchors| anchors.dealing.as_ref().is_none_or(|dealing| dealing.contains(own)))
    }

    pub(super) fn knows(&self, domain: &TrustDomain) -> bool {
        self.domains.contains_key(domain)
    }

    /// Who a server is, if it is anybody we believe.
    pub(super) fn verify_server(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<SvidInfo, Error> {
        let (claimed, anchors) = self.claimed(leaf)?;
        let certificate = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &anchors.store, rest, now, algorithms)?;
        self.refuse_denied(leaf, rest)?;
        Ok(claimed)
    }

    pub(super) fn verify_client(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.claimed(leaf)?.1.clients.verify_client_cert(leaf, rest, now)?;
        self.refuse_denied(leaf, rest)?;
        Ok(verified)
    }

    /// By what a chain that was verified can be denied.
    pub(super) fn marks(&self, chain: &[CertificateDer<'_>]) -> Option<Marks> {
        let (_, anchors) = self.claimed(chain.first()?).ok()?;
        let chain: Vec<&[u8]> = chain.iter().map(AsRef::as_ref).collect();
        Marks::read(&chain, anchors.roots.iter().map(Vec::as_slice))
    }

    /// Who the leaf says it is, and what alone can prove that.
    fn claimed(&self, leaf: &CertificateDer<'_>) -> Result<(SvidInfo, &Anchors), Error> {
        let info = inspect_svid(leaf).map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        let theirs = info.id.trust_domain();
        let anchors = self.domains.get(theirs).ok_or_else(|| {
            let unfederated = Unfederated { theirs: theirs.clone(), own: self.own.clone() };
            Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(unfederated))))
        })?;
        Ok((info, anchors))
    }

    /// Refuses a peer that is on the deny list, although its chain verifies.
    fn refuse_denied(&self, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Result<(), Error> {
        let chain: Vec<CertificateDer<'_>> = std::iter::once(leaf).chain(rest).cloned().collect();
        let marks = self.marks(&chain).ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
        match self.denied.denies(&marks) {
            true => Err(Error::InvalidCertificate(CertificateError::Revoked)),
            false => Ok(()),
        }
    }
}

impl Anchors {
    fn new(
        bundle: &Bundle,
        dealing: Option<BTreeSet<SpiffeId>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Anchors, String> {
        let mut store = RootCertStore::empty();
        let domain = &bundle.trust_domain;
        for root in &bundle.roots {
            // The others are good all the same.
            if let Err(error) = store.add(CertificateDer::from(root.clone())) {
                tracing::error!(%domain, %error, "a root cannot be verified with and is left out");
            }
        }
        let store = Arc::new(store);
        let clients = WebPkiClientVerifier::builder_with_provider(store.clone(), provider.clone());
        let clients = clients.build().map_err(|error| error.to_string())?;
        Ok(Anchors { store, roots: bundle.roots.clone(), clients, dealing })
    }
}

/// The reason in a broken handshake, if it is this one.
pub fn unfederated(error: &CertificateError) -> Option<&Unfederated> {
    match error {
        CertificateError::Other(OtherError(error)) => error.downcast_ref(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use meshd_pki_client::fake::FakeCa;
    use meshd_pki_client::{Federation, Svid};

    use super::*;
    use crate::transport::self_check::shake;
    use crate::transport::tls::TlsState;

    struct Two {
        ours: FakeCa,
        theirs: FakeCa,
        /// What each side holds; each is federated with the other.
        web: Credentials,
        api: Credentials,
    }

    fn ours() -> TrustDomain {
        "a.example".parse().unwrap()
    }

    fn theirs() -> TrustDomain {
        "b.example".parse().unwrap()
    }

    fn web() -> SpiffeId {
        SpiffeId::workload(&ours(), "shop", "web").unwrap()
    }

    fn api() -> SpiffeId {
        SpiffeId::workload(&theirs(), "shop", "api").unwrap()
    }

    impl Two {
        fn new() -> Two {
            let (ours, theirs) = (FakeCa::new(ours()), FakeCa::new(theirs()));
            let mut web_side = ours.credentials("web-1", &[web()]);
            let mut api_side = theirs.credentials("api-1", &[api()]);
            web_side.federation = theirs.federated_for(&[web()]);
            api_side.federation = ours.federated_for(&[api()]);
            Two { ours, theirs, web: web_side, api: api_side }
        }
    }

    /// web calls api.
    fn handshake(web_side: &Credentials, api_side: &Credentials) -> Result<(), String> {
        let [web_side, api_side] = [web_side, api_side].map(|held| TlsState::build(held, None, 0).unwrap());
        shake(&web_side, &web(), &api_side, &api())
    }

    fn trust_of(held: &Credentials) -> Trust {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        Trust::new(held, Denied::nobody(), &provider).unwrap()
    }

    fn now() -> UnixTime {
        UnixTime::since_unix_epoch(SystemTime::UNIX_EPOCH.elapsed().unwrap())
    }

    /// As a server and as a client.
    fn verdicts(trust: &Trust, svid: &Svid) -> [Result<(), Error>; 2] {
        let (leaf, rest) = svid.chain.split_first().unwrap();
        [trust.verify_server(leaf, rest, now()).map(drop), trust.verify_client(leaf, rest, now()).map(drop)]
    }

    #[test]
    fn federated_sides_believe_each_other() {
        let two = Two::new();
        assert_eq!(handshake(&two.web, &two.api), Ok(()));
        let trust = trust_of(&two.web);
        let marks = trust.marks(&two.theirs.svid(&api()).chain).unwrap();
        assert_eq!((marks.id, marks.authorities.len()), (api(), 2), "deny sets know a foreign root, too");
    }

    #[test]
    fn an_authority_never_vouches_for_an_identity_of_the_other_domain() {
        let two = Two::new();
        for trust in [trust_of(&two.web), trust_of(&two.api)] {
            for (authority, id) in [(&two.ours, api()), (&two.theirs, web())] {
                for verdict in verdicts(&trust, &authority.svid(&id)) {
                    let unknown = Err(Error::InvalidCertificate(CertificateError::UnknownIssuer));
                    assert_eq!(verdict, unknown, "{id}");
                }
            }
            for (authority, id) in [(&two.ours, web()), (&two.theirs, api())] {
                assert_eq!(verdicts(&trust, &authority.svid(&id)), [Ok(()), Ok(())], "{id}");
            }
        }
    }

    #[test]
    fn without_a_bundle_the_trust_domain_is_named() {
        let two = Two::new();
        let trust = trust_of(&two.ours.credentials("web-1", &[web()]));
        for verdict in verdicts(&trust, &two.theirs.svid(&api())) {
            let Err(Error::InvalidCertificate(reason)) = verdict else { panic!("{verdict:?}") };
            let reason = unfederated(&reason).unwrap().to_string();
            assert!(reason.contains("`b.example` is not federated with `a.example`"), "{reason}");
        }
        assert!(!trust.knows(&theirs()) && !trust.deals(&web(), &theirs()));
    }

    #[test]
    fn a_bundle_that_claims_our_own_domain_changes_nothing() {
        let two = Two::new();
        let impostor = FakeCa::new(ours());
        let mut held = two.ours.credentials("web-1", &[web()]);
        held.federation = impostor.federated_for(&[web()]);
        let trust = trust_of(&held);
        assert!(verdicts(&trust, &impostor.svid(&web())).iter().all(Result::is_err));
        assert_eq!(verdicts(&trust, &two.ours.svid(&web())), [Ok(()), Ok(())]);
    }

    #[test]
    fn a_root_that_cannot_be_verified_with_takes_no_other_one_along() {
        let two = Two::new();
        let mut held = two.web.clone();
        let foreign = held.federation.domains.get_mut(&theirs()).unwrap();
        foreign.bundle.roots.push(b"no certificate".to_vec());
        held.bundle.roots.push(b"no certificate".to_vec());
        assert_eq!(handshake(&held, &two.api), Ok(()));
        foreign_only_bad(&mut held);
        assert!(!trust_of(&held).knows(&theirs()));
    }

    fn foreign_only_bad(held: &mut Credentials) {
        held.federation.domains.get_mut(&theirs()).unwrap().bundle.roots.remove(0);
    }

    #[test]
    fn only_identities_that_the_pki_names_have_dealings_with_a_foreign_domain() {
        let two = Two::new();
        let trust = trust_of(&two.web);
        let other = SpiffeId::workload(&ours(), "shop", "other").unwrap();
        assert!(trust.deals(&web(), &theirs()) && !trust.deals(&other, &theirs()));
        assert!(trust.deals(&other, &ours()));
    }

    #[test]
    fn one_side_alone_is_not_enough() {
        let two = Two::new();
        for end in [0, 1] {
            let mut held = [two.web.clone(), two.api.clone()];
            held[end].federation = Federation::default();
            let reason = handshake(&held[0], &held[1]).unwrap_err();
            assert!(reason.contains("Unfederated"), "{reason}");
        }
    }
}
