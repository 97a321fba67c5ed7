//! JSON Web Tokens as others sign them: JWT-SVIDs by the rules of SPIFFE (JWT-SVID sections 2 to 4), and tokens of
//! Kubernetes. RFC 7515 (JWS), 7517 (JWK), 7518 (algorithms), 7519 (claims).

use std::time::{Duration, SystemTime};

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384,
    RSA_PSS_2048_8192_SHA512, RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm,
};
use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine};
use serde_json::{Map, Value};

use crate::spiffe_id::is_path;
use crate::{JwtKey, KeyParameters, TrustDomain};

/// Of one JWT-SVID, asked for on hosts and signed by the PKI: they are all in it.
pub const MOST_AUDIENCES: usize = 16;
/// In bytes, of one of them.
pub const LONGEST_AUDIENCE: usize = 512;
/// Tokens of real systems have 1 to 4 KiB.
const MAX_BYTES: usize = 16 * 1024;
/// Clocks of hosts that keep time differ by less; JWT-SVID 3.2 leaves room for it.
const LEEWAY: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    #[error("this is no signed token (three parts of base64url with dots between): {0}")]
    Form(&'static str),
    #[error("the token's algorithm is `{0}`; RS, ES and PS with 256, 384 or 512 are accepted")]
    Algorithm(String),
    #[error("the token's header has `{0}`; a JWT-SVID has `alg`, `kid` and `typ` (JWT or JOSE) only")]
    Header(String),
    #[error("the token's claim `{0}` is missing or of a wrong kind")]
    Claim(&'static str),
    #[error("`{0}` is not the SPIFFE ID of a workload")]
    Subject(String),
    #[error("there are no keys of the trust domain `{0}` here")]
    UnknownDomain(String),
    #[error("no key with the id `{0}` is trusted; it may have been replaced since, get another token")]
    UnknownKey(String),
    #[error("the token's signature does not verify")]
    Signature,
    #[error("the token is for `{found}`, not for `{wanted}`")]
    Audience { found: String, wanted: String },
    #[error("the token ended {0} s ago; get another")]
    Ended(u64),
    #[error("the token is valid from {0} s in the future; check the clocks")]
    Early(u64),
}

/// A token that was read, and not yet believed.
#[derive(Debug, Clone)]
pub struct Jwt {
    algorithm: Algorithm,
    key_id: Option<String>,
    /// A field of the header that JWT-SVIDs must not have.
    foreign: Option<String>,
    pub claims: Map<String, Value>,
    signed: String,
    signature: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
enum Algorithm {
    Ec(&'static str, &'static dyn VerificationAlgorithm),
    Rsa(&'static RsaParameters),
}

/// What a valid JWT-SVID says.
#[derive(Debug, Clone, PartialEq)]
pub struct JwtSvid {
    /// Of any shape: it may be of another trust domain.
    pub spiffe_id: String,
    pub claims: Map<String, Value>,
}

/// What is wrong with audiences to be put in a token.
pub fn audience_problem(audience: &[String]) -> Option<String> {
    let bad = |text: &String| text.is_empty() || text.len() > LONGEST_AUDIENCE || text.chars().any(char::is_control);
    (audience.is_empty() || audience.len() > MOST_AUDIENCES || audience.iter().any(bad)).then(|| {
        format!("a JWT-SVID needs 1 to {MOST_AUDIENCES} audiences of 1 to {LONGEST_AUDIENCE} bytes each, without control characters")
    })
}

impl Jwt {
    pub fn read(text: &str) -> Result<Jwt, JwtError> {
        if text.len() > MAX_BYTES {
            return Err(JwtError::Form("it is too long"));
        }
        let parts: Vec<&str> = text.split('.').collect();
        let [header, payload, signature] = parts[..] else {
            return Err(JwtError::Form("it has not three parts"));
        };
        let decode = |part| BASE64_URL_SAFE_NO_PAD.decode(part).map_err(|_| JwtError::Form("a part is not base64url"));
        let object = |bytes: Vec<u8>| {
            serde_json::from_slice::<Map<String, Value>>(&bytes).map_err(|_| JwtError::Form("a part is no JSON object"))
        };
        let header_fields = object(decode(header)?)?;
        let text_of = |name| header_fields.get(name).and_then(Value::as_str);
        let name = text_of("alg").ok_or(JwtError::Form("its header names no algorithm"))?;
        let algorithm = algorithm(name).ok_or_else(|| JwtError::Algorithm(printable(name)))?;
        if header_fields.contains_key("crit") {
            return Err(JwtError::Header("crit".to_owned()));
        }
        Ok(Jwt {
            algorithm,
            key_id: text_of("kid").map(str::to_owned),
            foreign: header_fields
                .iter()
                .find(|(name, value)| !is_of_svid(name, value))
                .map(|(name, _)| printable(name)),
            claims: object(decode(payload)?)?,
            signed: text[..header.len() + 1 + payload.len()].to_owned(),
            signature: decode(signature)?,
        })
    }

    /// Whether one of the keys signed it: the one it names, or any if it names none.
    pub fn verify(&self, keys: &[JwtKey]) -> Result<(), JwtError> {
        let named: Vec<&JwtKey> =
            keys.iter().filter(|key| self.key_id.as_ref().is_none_or(|id| *id == key.kid)).collect();
        if let (Some(id), []) = (&self.key_id, &named[..]) {
            return Err(JwtError::UnknownKey(printable(id)));
        }
        let signed_by = |key: &JwtKey| verifies(self.algorithm, key, self.signed.as_bytes(), &self.signature);
        if named.into_iter().any(|key| signed_by(key) == Some(true)) { Ok(()) } else { Err(JwtError::Signature) }
    }

    pub fn text(&self, claim: &'static str) -> Result<&str, JwtError> {
        self.claims.get(claim).and_then(Value::as_str).ok_or(JwtError::Claim(claim))
    }

    /// Whether it is meant for `wanted`, among others perhaps.
    pub fn is_for(&self, wanted: &str) -> Result<(), JwtError> {
        let all: Vec<&str> = match self.claims.get("aud") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(all)) => {
                all.iter().map(|one| one.as_str().ok_or(JwtError::Claim("aud"))).collect::<Result<_, _>>()?
            }
            _ => return Err(JwtError::Claim("aud")),
        };
        if all.contains(&wanted) {
            return Ok(());
        }
        Err(JwtError::Audience { found: printable(&all.join("`, `")), wanted: printable(wanted) })
    }

    /// Whether it is in force, by `exp`, which must be there, and `nbf`.
    pub fn is_valid_at(&self, now: SystemTime) -> Result<(), JwtError> {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let leeway = LEEWAY.as_secs();
        let end = self.seconds("exp")?.ok_or(JwtError::Claim("exp"))?;
        if now >= end.saturating_add(leeway) {
            return Err(JwtError::Ended(now - end));
        }
        match self.seconds("nbf")? {
            Some(start) if start > now.saturating_add(leeway) => Err(JwtError::Early(start - now)),
            _ => Ok(()),
        }
    }

    /// NumericDate: a number, with a fraction perhaps.
    fn seconds(&self, claim: &'static str) -> Result<Option<u64>, JwtError> {
        let Some(value) = self.claims.get(claim) else { return Ok(None) };
        let seconds = value.as_u64().or_else(|| value.as_f64().filter(|at| *at >= 0.0).map(|at| at as u64));
        seconds.map(Some).ok_or(JwtError::Claim(claim))
    }
}

/// Judges a JWT-SVID meant for `audience`. `keys_of` knows the keys of each trust domain; those of one never verify
/// what another says.
pub fn verify_svid<'a>(
    text: &str,
    audience: &str,
    keys_of: impl Fn(&TrustDomain) -> Option<&'a [JwtKey]>,
    now: SystemTime,
) -> Result<JwtSvid, JwtError> {
    let token = Jwt::read(text)?;
    if let Some(name) = token.foreign {
        return Err(JwtError::Header(name));
    }
    let subject = token.text("sub")?.to_owned();
    let domain = domain_of(&subject).ok_or_else(|| JwtError::Subject(printable(&subject)))?;
    let keys = keys_of(&domain).ok_or_else(|| JwtError::UnknownDomain(domain.to_string()))?;
    token.verify(keys)?;
    token.is_valid_at(now)?;
    token.is_for(audience)?;
    Ok(JwtSvid { spiffe_id: subject, claims: token.claims })
}

/// The trust domain of the SPIFFE ID of a workload, of whatever shape.
fn domain_of(spiffe_id: &str) -> Option<TrustDomain> {
    let (domain, path) = spiffe_id.strip_prefix("spiffe://")?.split_once('/')?;
    if is_path(path) { domain.parse().ok() } else { None }
}

fn is_of_svid(name: &str, value: &Value) -> bool {
    match name {
        "alg" | "kid" => value.is_string(),
        "typ" => matches!(value.as_str(), Some("JWT" | "JOSE")),
        _ => false,
    }
}

fn algorithm(name: &str) -> Option<Algorithm> {
    Some(match name {
        "ES256" => Algorithm::Ec("P-256", &ECDSA_P256_SHA256_FIXED),
        "ES384" => Algorithm::Ec("P-384", &ECDSA_P384_SHA384_FIXED),
        "ES512" => Algorithm::Ec("P-521", &ECDSA_P521_SHA512_FIXED),
        "RS256" => Algorithm::Rsa(&RSA_PKCS1_2048_8192_SHA256),
        "RS384" => Algorithm::Rsa(&RSA_PKCS1_2048_8192_SHA384),
        "RS512" => Algorithm::Rsa(&RSA_PKCS1_2048_8192_SHA512),
        "PS256" => Algorithm::Rsa(&RSA_PSS_2048_8192_SHA256),
        "PS384" => Algorithm::Rsa(&RSA_PSS_2048_8192_SHA384),
        "PS512" => Algorithm::Rsa(&RSA_PSS_2048_8192_SHA512),
        _ => return None,
    })
}

/// `None` for a key of another kind than the algorithm's.
fn verifies(algorithm: Algorithm, key: &JwtKey, message: &[u8], signature: &[u8]) -> Option<bool> {
    let number = |text: &str| BASE64_URL_SAFE_NO_PAD.decode(text).ok();
    let verified = match (algorithm, &key.parameters) {
        (Algorithm::Ec(name, algorithm), KeyParameters::Ec { curve, x, y }) if name == curve => {
            let point = [vec![4], number(x)?, number(y)?].concat();
            UnparsedPublicKey::new(algorithm, point).verify(message, signature)
        }
        (Algorithm::Rsa(parameters), KeyParameters::Rsa { n, e }) => {
            RsaPublicKeyComponents { n: number(n)?, e: number(e)? }.verify(parameters, message, signature)
        }
        _ => return None,
    };
    Some(verified.is_ok())
}

/// Text from a stranger, made safe for a log line.
fn printable(text: &str) -> String {
    text.chars().take(300).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
    use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256, RSA_PSS_SHA512};
    use proptest::prelude::*;
    use rcgen::{KeyPair, PublicKeyData};
    use serde_json::json;

    use super::*;
    use crate::signed::sign_bytes;

    const NOW: u64 = 1_790_000_000;

    fn encoded(value: &Value) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(value.to_string())
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)
    }

    fn claims() -> Value {
        json!({ "sub": "spiffe://prod.example.org/any/shape", "aud": ["a", "b"], "exp": NOW + 100 })
    }

    /// A P-256 key with what signs by it.
    struct Signer {
        pair: KeyPair,
        key: JwtKey,
    }

    impl Signer {
        fn new(kid: &str) -> Signer {
            let pair = KeyPair::generate().unwrap();
            let key = JwtKey::from_spki(kid, &pair.subject_public_key_info()).unwrap();
            Signer { pair, key }
        }

        fn sign(&self, header: &Value, claims: &Value) -> String {
            let signed = format!("{}.{}", encoded(header), encoded(claims));
            let signature = sign_bytes(&self.pair.serialize_der(), signed.as_bytes()).unwrap();
            format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
        }

        fn svid(&self, claims: &Value) -> String {
            self.sign(&json!({ "alg": "ES256", "kid": self.key.kid, "typ": "JWT" }), claims)
        }

        fn judge(&self, token: &str, audience: &str) -> Result<JwtSvid, JwtError> {
            let known: TrustDomain = "prod.example.org".parse().unwrap();
            verify_svid(token, audience, |domain| (*domain == known).then_some(std::slice::from_ref(&self.key)), now())
        }
    }

    fn with(changes: Value) -> Value {
        let mut all = claims();
        for (name, value) in changes.as_object().unwrap() {
            all[name] = value.clone();
        }
        all
    }

    #[test]
    fn a_token_of_a_known_domain_is_good_for_its_audiences_while_it_lives() {
        let signer = Signer::new("k");
        let token = signer.svid(&claims());
        for audience in ["a", "b"] {
            assert_eq!(signer.judge(&token, audience).unwrap().spiffe_id, "spiffe://prod.example.org/any/shape");
        }
        assert!(matches!(signer.judge(&token, "c"), Err(JwtError::Audience { .. })));
        let one = signer.svid(&with(json!({ "aud": "c" })));
        assert!(signer.judge(&one, "c").is_ok() && signer.judge(&one, "a").is_err());
    }

    #[test]
    fn tokens_that_ended_are_early_or_lack_a_claim_are_refused() {
        let signer = Signer::new("k");
        let judged = |changes| signer.judge(&signer.svid(&with(changes)), "a").unwrap_err();
        assert_eq!(judged(json!({ "exp": NOW - 60 })), JwtError::Ended(60));
        assert_eq!(judged(json!({ "nbf": NOW + 61 })), JwtError::Early(61));
        for (claim, changes) in [
            ("exp", json!({ "exp": null })),
            ("exp", json!({ "exp": "tomorrow" })),
            ("exp", json!({ "exp": -1 })),
            ("aud", json!({ "aud": null })),
            ("aud", json!({ "aud": [1] })),
            ("sub", json!({ "sub": 7 })),
        ] {
            assert_eq!(judged(changes), JwtError::Claim(claim));
        }
        let none = json!({ "aud": [] });
        assert!(matches!(judged(none), JwtError::Audience { .. }));
        assert!(signer.judge(&signer.svid(&with(json!({ "exp": NOW - 59 }))), "a").is_ok(), "within the leeway");
    }

    #[test]
    fn only_keys_of_the_subjects_own_domain_count() {
        let (signer, other) = (Signer::new("k"), Signer::new("k"));
        assert_eq!(signer.judge(&other.svid(&claims()), "a").unwrap_err(), JwtError::Signature);
        let unknown = Signer::new("x");
        assert_eq!(signer.judge(&unknown.svid(&claims()), "a").unwrap_err(), JwtError::UnknownKey("x".to_owned()));
        let foreign = signer.svid(&with(json!({ "sub": "spiffe://other.example/x" })));
        assert_eq!(signer.judge(&foreign, "a").unwrap_err(), JwtError::UnknownDomain("other.example".to_owned()));
        for subject in [
            "spiffe://prod.example.org",
            "spiffe://prod.example.org/",
            "spiffe://prod.example.org/a//b",
            "https://prod.example.org/a",
            "spiffe://prod.example.org/%41",
            "spiffe://Prod.example.org/a",
        ] {
            let token = signer.svid(&with(json!({ "sub": subject })));
            assert!(matches!(signer.judge(&token, "a"), Err(JwtError::Subject(_))), "{subject}");
        }
    }

    #[test]
    fn headers_beyond_the_standard_are_refused() {
        let signer = Signer::new("k");
        for (header, is_good) in [
            (json!({ "alg": "ES256" }), true),
            (json!({ "alg": "ES256", "kid": "k", "typ": "JOSE" }), true),
            (json!({ "alg": "ES256", "typ": "at+jwt" }), false),
            (json!({ "alg": "ES256", "jku": "https://evil.example" }), false),
            (json!({ "alg": "ES256", "crit": [] }), false),
            (json!({ "alg": "none" }), false),
            (json!({ "alg": "HS256" }), false),
            (json!({ "alg": "EdDSA" }), false),
            // The curve belongs to the algorithm.
            (json!({ "alg": "ES384" }), false),
            (json!({ "alg": "RS256" }), false),
        ] {
            let token = signer.sign(&header, &claims());
            assert_eq!(signer.judge(&token, "a").is_ok(), is_good, "{header}");
        }
    }

    #[test]
    fn rsa_in_both_paddings_is_verified() {
        let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
        let public = pair.public_key();
        let text = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
        let n = text(public.modulus().big_endian_without_leading_zero());
        let e = text(public.exponent().big_endian_without_leading_zero());
        let jwks = json!({ "keys": [{ "use": "sig", "kty": "RSA", "kid": "r", "alg": "RS256", "n": n, "e": e }] });
        let keys = crate::keys_of_jwks(jwks.to_string().as_bytes()).unwrap();
        for (name, padding) in
            [("RS256", &RSA_PKCS1_SHA256 as &'static dyn aws_lc_rs::signature::RsaEncoding), ("PS512", &RSA_PSS_SHA512)]
        {
            let signed = format!("{}.{}", encoded(&json!({ "alg": name, "kid": "r" })), encoded(&claims()));
            let mut signature = vec![0; pair.public_modulus_len()];
            pair.sign(padding, &SystemRandom::new(), signed.as_bytes(), &mut signature).unwrap();
            Jwt::read(&format!("{signed}.{}", text(&signature))).unwrap().verify(&keys).unwrap();
            signature[0] ^= 1;
            let forged = Jwt::read(&format!("{signed}.{}", text(&signature))).unwrap();
            assert_eq!(forged.verify(&keys), Err(JwtError::Signature));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "[ -~]{0,80}(\\.[A-Za-z0-9_-]{0,40}){0,4}") {
            prop_assert!(Jwt::read(&text).is_err());
        }

        #[test]
        fn arbitrary_headers_and_claims_never_panic(
            header in "\\{(\"alg\":\"(ES|RS|PS)(256|384|512)\")?(,\"[a-z]{3}\":[0-9\"a-z\\[\\]]{1,5})?\\}",
            claims in "\\{(\"(exp|nbf|aud|sub)\":(-?[0-9.e]{1,8}|\"a\"|\\[\\]))?\\}",
        ) {
            let text = |part: &str| BASE64_URL_SAFE_NO_PAD.encode(part);
            let signer = Signer::new("k");
            let token = format!("{}.{}.AAAA", text(&header), text(&claims));
            prop_assert!(signer.judge(&token, "a").is_err());
        }
    }
}
