//! Tokens of the PKI this host has joined.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use meshd_identity::jwt::verify_svid;
use meshd_identity::{SpiffeId, TrustDomain, jwks_of_jwt_keys};
use meshd_pki_client::{Credentials, Line, TokenIssueError, Tokens};
use tokio::sync::watch;

use super::jwt::{IssueError, Issued, JwtSource, Verified};

pub struct PkiTokens {
    credentials: watch::Receiver<Arc<Credentials>>,
    tokens: Arc<Tokens>,
}

impl PkiTokens {
    pub fn new(credentials: watch::Receiver<Arc<Credentials>>, line: Line) -> PkiTokens {
        let tokens = Arc::new(Tokens::new(credentials.clone(), line));
        PkiTokens { credentials, tokens }
    }
}

impl JwtSource for PkiTokens {
    fn issue(&self, identity: SpiffeId, audience: Vec<String>) -> Issued {
        let tokens = self.tokens.clone();
        Box::pin(async move {
            tokens.issue(&identity, &audience).await.map_err(|error| match error {
                TokenIssueError::Refused(words) => IssueError::Refused(words),
                TokenIssueError::Invalid(words) => IssueError::Invalid(words),
                away @ TokenIssueError::Away { .. } => IssueError::Away(away.to_string()),
            })
        })
    }

    fn keys(&self, identity: &SpiffeId) -> BTreeMap<TrustDomain, Vec<u8>> {
        let held = self.credentials.borrow();
        let all = held.federation.of(identity).chain([&held.bundle]);
        all.map(|bundle| (bundle.trust_domain.clone(), jwks_of_jwt_keys(&bundle.jwt_keys))).collect()
    }

    fn verify(&self, token: &str, audience: &str, identity: &SpiffeId) -> Result<Verified, String> {
        let held = self.credentials.borrow().clone();
        // The keys of the domain that the subject names, and of no other.
        let keys_of = |domain: &TrustDomain| match *domain == held.trust_domain {
            true => Some(&held.bundle.jwt_keys[..]),
            false => held.federation.of(identity).find(|one| one.trust_domain == *domain).map(|one| &one.jwt_keys[..]),
        };
        let svid = verify_svid(token, audience, keys_of, SystemTime::now()).map_err(|error| error.to_string())?;
        Ok(Verified { spiffe_id: svid.spiffe_id, claims: svid.claims })
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
    use data_encoding::BASE64URL_NOPAD;
    use meshd_identity::signed::sign_bytes;
    use meshd_identity::{JwtKey, KeyParameters};
    use meshd_pki_client::fake::FakeCa;
    use serde_json::{Value, json};

    use super::*;

    struct Signer {
        pkcs8: Vec<u8>,
        key: JwtKey,
    }

    impl Signer {
        fn new() -> Signer {
            let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).unwrap();
            let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref()).unwrap();
            let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
            let [x, y] = [x, y].map(|coordinate| BASE64URL_NOPAD.encode(coordinate));
            let parameters = KeyParameters::Ec { curve: "P-256".to_owned(), x, y };
            Signer { pkcs8: pkcs8.as_ref().to_vec(), key: JwtKey { kid: "k".to_owned(), parameters } }
        }

        fn token_of(&self, subject: &SpiffeId) -> String {
            let encoded = |value: Value| BASE64URL_NOPAD.encode(value.to_string().as_bytes());
            let header = encoded(json!({ "alg": "ES256", "kid": "k" }));
            let claims = encoded(json!({ "sub": subject.as_str(), "aud": ["api"], "exp": 4_000_000_000_u64 }));
            let signed = format!("{header}.{claims}");
            let signature = sign_bytes(&self.pkcs8, signed.as_bytes()).unwrap();
            format!("{signed}.{}", BASE64URL_NOPAD.encode(&signature))
        }
    }

    #[test]
    fn a_token_verifies_with_the_keys_of_its_own_domain_for_those_who_have_dealings_with_that() {
        let [ours, theirs] = ["mesh.example", "other.example"].map(|name| name.parse::<TrustDomain>().unwrap());
        let [web, billing] = ["web", "billing"].map(|name| SpiffeId::workload(&ours, "shop", name).unwrap());
        let foreign = SpiffeId::workload(&theirs, "shop", "web").unwrap();
        let (our_key, their_key) = (Signer::new(), Signer::new());
        let mut held = FakeCa::new(&ours).credentials("host", &[web.clone(), billing.clone()]);
        held.bundle = held.bundle.with_jwt_keys(vec![our_key.key.clone()]);
        held.federation = FakeCa::new(&theirs).federated_for(std::slice::from_ref(&web));
        let federated = held.federation.domains.get_mut(&theirs).unwrap();
        federated.bundle = federated.bundle.clone().with_jwt_keys(vec![their_key.key.clone()]);
        let tokens = PkiTokens::new(watch::channel(Arc::new(held)).1, Line::default());

        let verify = |signer: &Signer, subject: &SpiffeId, by: &SpiffeId| {
            tokens.verify(&signer.token_of(subject), "api", by).map(|verified| verified.spiffe_id)
        };
        assert_eq!(verify(&our_key, &billing, &web), Ok(billing.to_string()));
        assert_eq!(verify(&their_key, &foreign, &web), Ok(foreign.to_string()));
        assert!(verify(&our_key, &foreign, &web).is_err(), "our key does not vouch for theirs");
        assert!(verify(&their_key, &billing, &web).is_err(), "nor theirs for ours");
        assert!(verify(&their_key, &foreign, &billing).unwrap_err().contains("other.example"));
        assert_eq!(tokens.keys(&web).keys().collect::<Vec<_>>(), [&ours, &theirs]);
        assert_eq!(tokens.keys(&billing).keys().collect::<Vec<_>>(), [&ours]);
    }
}
