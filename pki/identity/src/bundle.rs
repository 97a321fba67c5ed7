use aws_lc_rs::digest;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD, Engine};
use serde::{Deserialize, Serialize};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::TrustDomain;

/// More than any sane bundle (120 roots are about 90 KiB); a peer that sends more is refused.
pub const MAX_BUNDLE_BYTES: usize = 256 * 1024;
/// SPIFFE Federation 4.1: what a client assumes when the document does not say.
const DEFAULT_REFRESH_HINT_S: u64 = 300;
const X509_USE: &str = "x509-svid";
const JWT_USE: &str = "jwt-svid";

/// What one trust domain trusts. Never without a root, and never merged with that of another trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Bundle {
    pub trust_domain: TrustDomain,
    /// Rises with every change of content; a holder refuses to go back.
    pub sequence: u64,
    /// Seconds after which a follower should ask again.
    pub refresh_hint_s: u64,
    /// Root certificates, DER.
    pub roots: Vec<Vec<u8>>,
    /// What JWT-SVIDs verify with.
    pub jwt_keys: Vec<JwtKey>,
}

/// A public key of JWT-SVIDs, as the bundle document has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtKey {
    pub kid: String,
    pub parameters: KeyParameters,
}

/// RFC 7518 section 6, in base64url.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyParameters {
    Ec { curve: String, x: String, y: String },
    Rsa { n: String, e: String },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    #[error("the bundle of `{0}` has no root; an empty bundle would distrust everybody, so it is refused")]
    Empty(TrustDomain),
    #[error("the bundle has {0} bytes; at most {MAX_BUNDLE_BYTES} are accepted")]
    TooLarge(usize),
    #[error("the bundle is not a JWKS document: {0}; fetch it again from the PKI")]
    Json(String),
    #[error("keys[{index}] of the bundle: {problem}")]
    Key { index: usize, problem: String },
}

#[derive(Serialize, Deserialize)]
struct Document {
    keys: Vec<Key>,
    #[serde(default)]
    spiffe_sequence: u64,
    #[serde(default = "default_refresh_hint")]
    spiffe_refresh_hint: u64,
}

/// One JWK. Field order is the canonical order: the digest in join tokens depends on it.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Key {
    kty: String,
    #[serde(rename = "use")]
    usage: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    kid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    crv: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    x: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    y: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    n: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    e: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    x5c: Vec<String>,
}

impl Bundle {
    pub fn new(
        trust_domain: TrustDomain,
        sequence: u64,
        refresh_hint_s: u64,
        roots: Vec<Vec<u8>>,
    ) -> Result<Bundle, BundleError> {
        if roots.is_empty() {
            return Err(BundleError::Empty(trust_domain));
        }
        for (index, root) in roots.iter().enumerate() {
            jwk_of_root(root).map_err(|problem| BundleError::Key { index, problem })?;
        }
        Ok(Bundle { trust_domain, sequence, refresh_hint_s, roots, jwt_keys: Vec::new() })
    }

    #[must_use]
    pub fn with_jwt_keys(self, jwt_keys: Vec<JwtKey>) -> Bundle {
        Bundle { jwt_keys, ..self }
    }

    /// Reads a SPIFFE bundle document. The document does not name its trust domain; whoever fetched it knows.
    pub fn from_jwks(trust_domain: TrustDomain, json: &[u8]) -> Result<Bundle, BundleError> {
        if json.len() > MAX_BUNDLE_BYTES {
            return Err(BundleError::TooLarge(json.len()));
        }
        let document: Document = serde_json::from_slice(json).map_err(|e| BundleError::Json(e.to_string()))?;
        let mut roots = Vec::new();
        let mut jwt_keys = Vec::new();
        for (index, key) in document.keys.iter().enumerate() {
            // Elements of unknown use, and keys nobody could select, are not ours to judge.
            match key.usage.as_str() {
                X509_USE => roots.push(root_of_jwk(key).map_err(|problem| BundleError::Key { index, problem })?),
                JWT_USE => jwt_keys.extend(jwt_key(key)),
                _ => {}
            }
        }
        let bundle = Bundle::new(trust_domain, document.spiffe_sequence, document.spiffe_refresh_hint, roots)?;
        Ok(bundle.with_jwt_keys(jwt_keys))
    }

    /// The canonical document: same bundle, same bytes.
    pub fn to_jwks(&self) -> Vec<u8> {
        let keys = self.roots.iter().map(|root| jwk_of_root(root).expect("roots are checked when a bundle is made"));
        let keys = keys.chain(self.jwt_keys.iter().map(jwk_of_jwt_key));
        let document =
            Document { keys: keys.collect(), spiffe_sequence: self.sequence, spiffe_refresh_hint: self.refresh_hint_s };
        serde_json::to_vec(&document).expect("strings and numbers always serialise")
    }

    /// SHA-256 over the canonical document: what a join token pins.
    pub fn digest(&self) -> [u8; 32] {
        sha256(&self.to_jwks())
    }
}

/// SHA-256, for pins over bytes as they were received.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest::digest(&digest::SHA256, bytes).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn default_refresh_hint() -> u64 {
    DEFAULT_REFRESH_HINT_S
}

fn root_of_jwk(key: &Key) -> Result<Vec<u8>, String> {
    let [certificate] = &key.x5c[..] else {
        return Err(format!("x5c has {} certificates; an x509-svid key has exactly one", key.x5c.len()));
    };
    BASE64_STANDARD.decode(certificate).map_err(|e| format!("x5c is not base64: {e}"))
}

impl JwtKey {
    /// From the SubjectPublicKeyInfo of a P-256 key.
    pub fn from_spki(kid: &str, spki: &[u8]) -> Result<JwtKey, String> {
        let (_, key) = SubjectPublicKeyInfo::from_der(spki).map_err(|e| format!("not a public key: {e}"))?;
        match key.parsed().map_err(|e| format!("unreadable public key: {e}"))? {
            PublicKey::EC(point) => {
                let (curve, x, y) = coordinates(point.data())?;
                Ok(JwtKey { kid: kid.to_owned(), parameters: KeyParameters::Ec { curve, x, y } })
            }
            _ => Err("not an elliptic key".to_owned()),
        }
    }
}

/// A document with these JWT keys and nothing else, as the Workload API hands it out.
pub fn jwks_of_jwt_keys(keys: &[JwtKey]) -> Vec<u8> {
    let keys: Vec<Key> = keys.iter().map(jwk_of_jwt_key).collect();
    serde_json::to_vec(&serde_json::json!({ "keys": keys })).expect("strings always serialise")
}

/// What tokens verify with, of a JWK Set that is no SPIFFE bundle. Keys of other kinds, and keys without an id, are left
/// out.
pub fn keys_of_jwks(json: &[u8]) -> Result<Vec<JwtKey>, BundleError> {
    if json.len() > MAX_BUNDLE_BYTES {
        return Err(BundleError::TooLarge(json.len()));
    }
    let document: Document = serde_json::from_slice(json).map_err(|e| BundleError::Json(e.to_string()))?;
    Ok(document.keys.iter().filter_map(jwt_key).collect())
}

fn jwt_key(key: &Key) -> Option<JwtKey> {
    let parameters = match (key.kty.as_str(), &key.crv, &key.x, &key.y, &key.n, &key.e) {
        ("EC", Some(curve), Some(x), Some(y), _, _) => {
            KeyParameters::Ec { curve: curve.clone(), x: x.clone(), y: y.clone() }
        }
        ("RSA", _, _, _, Some(n), Some(e)) => KeyParameters::Rsa { n: n.clone(), e: e.clone() },
        _ => return None,
    };
    Some(JwtKey { kid: key.kid.clone()?, parameters })
}

fn jwk_of_jwt_key(key: &JwtKey) -> Key {
    let jwk = Key { usage: JWT_USE.to_owned(), kid: Some(key.kid.clone()), ..Key::default() };
    match key.parameters.clone() {
        KeyParameters::Ec { curve, x, y } => {
            Key { kty: "EC".to_owned(), crv: Some(curve), x: Some(x), y: Some(y), ..jwk }
        }
        KeyParameters::Rsa { n, e } => Key { kty: "RSA".to_owned(), n: Some(n), e: Some(e), ..jwk },
    }
}

/// Curve, x and y of an uncompressed point.
fn coordinates(point: &[u8]) -> Result<(String, String, String), String> {
    let (curve, size) = match point.len() {
        65 => ("P-256", 32),
        97 => ("P-384", 48),
        133 => ("P-521", 66),
        length => return Err(format!("elliptic key of {length} bytes; use P-256, P-384 or P-521")),
    };
    let (x, y) = point[1..].split_at(size);
    Ok((curve.to_owned(), BASE64_URL_SAFE_NO_PAD.encode(x), BASE64_URL_SAFE_NO_PAD.encode(y)))
}

fn jwk_of_root(root: &[u8]) -> Result<Key, String> {
    let (rest, certificate) = X509Certificate::from_der(root).map_err(|e| format!("not an X.509 certificate: {e}"))?;
    if !rest.is_empty() {
        return Err("bytes follow the certificate".to_owned());
    }
    if !certificate.is_ca() {
        return Err("the certificate is not an authority (CA:TRUE is missing); a bundle holds roots only".to_owned());
    }
    let text = |bytes: &[u8]| Some(BASE64_URL_SAFE_NO_PAD.encode(bytes));
    let key = Key { usage: X509_USE.to_owned(), x5c: vec![BASE64_STANDARD.encode(root)], ..Key::default() };
    match certificate.public_key().parsed().map_err(|e| format!("unreadable public key: {e}"))? {
        PublicKey::EC(point) => {
            let (curve, x, y) = coordinates(point.data())?;
            Ok(Key { kty: "EC".to_owned(), crv: Some(curve), x: Some(x), y: Some(y), ..key })
        }
        PublicKey::RSA(rsa) => {
            let modulus = rsa.modulus.strip_prefix(&[0]).unwrap_or(rsa.modulus);
            Ok(Key { kty: "RSA".to_owned(), n: text(modulus), e: text(rsa.exponent), ..key })
        }
        _ => Err("the root's key is neither elliptic (P-256, P-384, P-521) nor RSA".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, SigningKey};

    use super::*;

    fn domain() -> TrustDomain {
        "prod.example.org".parse().unwrap()
    }

    fn root_with(key: &impl SigningKey) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.self_signed(key).unwrap().der().to_vec()
    }

    fn root() -> Vec<u8> {
        root_with(&KeyPair::generate().unwrap())
    }

    #[test]
    fn an_empty_bundle_is_refused_however_it_comes() {
        assert_eq!(Bundle::new(domain(), 1, 300, vec![]), Err(BundleError::Empty(domain())));
        let empty = br#"{"keys":[],"spiffe_sequence":7}"#;
        assert_eq!(Bundle::from_jwks(domain(), empty), Err(BundleError::Empty(domain())));
        let only_jwt = br#"{"keys":[{"kty":"EC","use":"jwt-svid","kid":"a","crv":"P-256","x":"AA","y":"AA"}]}"#;
        assert_eq!(Bundle::from_jwks(domain(), only_jwt), Err(BundleError::Empty(domain())));
    }

    #[test]
    fn keys_of_unknown_use_are_skipped() {
        let bundle = Bundle::new(domain(), 3, 60, vec![root()]).unwrap();
        let mut json: serde_json::Value = serde_json::from_slice(&bundle.to_jwks()).unwrap();
        let keys = json["keys"].as_array_mut().unwrap();
        keys.push(serde_json::json!({"kty": "OKP", "use": "from-the-future", "crv": "Ed25519", "x": "AA"}));
        keys.push(serde_json::json!({"kty": "OKP"}));
        let read = Bundle::from_jwks(domain(), json.to_string().as_bytes()).unwrap();
        assert_eq!(read, bundle);
    }

    #[test]
    fn the_document_follows_the_spiffe_rules() {
        let bundle = Bundle::new(domain(), 5, 120, vec![root()]).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&bundle.to_jwks()).unwrap();
        assert_eq!((json["spiffe_sequence"].as_u64(), json["spiffe_refresh_hint"].as_u64()), (Some(5), Some(120)));
        let key = &json["keys"][0];
        assert_eq!((key["kty"].as_str(), key["crv"].as_str()), (Some("EC"), Some("P-256")));
        assert_eq!(key["use"], "x509-svid");
        assert_eq!(key["x5c"].as_array().unwrap().len(), 1);
        assert_eq!(key["x"].as_str().unwrap().len(), 43);
        assert!(key.get("kid").is_none(), "x509-svid keys carry no kid");
    }

    #[test]
    fn larger_curves_are_written_with_their_name() {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let bundle = Bundle::new(domain(), 1, 300, vec![root_with(&key)]).unwrap();
        assert!(String::from_utf8(bundle.to_jwks()).unwrap().contains("\"P-384\""));
    }

    #[test]
    fn jwt_keys_have_a_kid_and_come_back() {
        let key = KeyPair::generate().unwrap();
        let jwt = JwtKey::from_spki("k1", &rcgen::PublicKeyData::subject_public_key_info(&key)).unwrap();
        let bundle = Bundle::new(domain(), 5, 120, vec![root()]).unwrap().with_jwt_keys(vec![jwt.clone()]);
        assert_eq!(Bundle::from_jwks(domain(), &bundle.to_jwks()).unwrap(), bundle);
        let json: serde_json::Value = serde_json::from_slice(&bundle.to_jwks()).unwrap();
        assert_eq!((json["keys"][1]["use"].as_str(), json["keys"][1]["kid"].as_str()), (Some("jwt-svid"), Some("k1")));
        assert!(json["keys"][1].get("x5c").is_none());
        let only: serde_json::Value = serde_json::from_slice(&jwks_of_jwt_keys(&[jwt])).unwrap();
        assert_eq!(only["keys"], serde_json::json!([json["keys"][1]]));
    }

    #[test]
    fn bad_documents_name_the_key_at_fault() {
        let bundle = Bundle::new(domain(), 5, 120, vec![root(), root()]).unwrap();
        let mut json: serde_json::Value = serde_json::from_slice(&bundle.to_jwks()).unwrap();
        let leaf_key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::default().self_signed(&leaf_key).unwrap();
        json["keys"][1]["x5c"][0] = BASE64_STANDARD.encode(leaf.der()).into();
        let error = Bundle::from_jwks(domain(), json.to_string().as_bytes()).unwrap_err().to_string();
        assert!(error.contains("keys[1]") && error.contains("CA:TRUE"), "{error}");
        json["keys"][1]["x5c"] = serde_json::json!([]);
        let error = Bundle::from_jwks(domain(), json.to_string().as_bytes()).unwrap_err().to_string();
        assert!(error.contains("exactly one"), "{error}");
        assert!(matches!(Bundle::from_jwks(domain(), b"<html>"), Err(BundleError::Json(_))));
        let huge = vec![b' '; MAX_BUNDLE_BYTES + 1];
        assert_eq!(Bundle::from_jwks(domain(), &huge), Err(BundleError::TooLarge(huge.len())));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn documents_round_trip_and_the_digest_sees_every_change(
            sequence in 0_u64..u64::MAX,
            hint in 1_u64..86_400,
            count in 1_usize..4,
        ) {
            let roots: Vec<Vec<u8>> = (0..count).map(|_| root()).collect();
            let bundle = Bundle::new(domain(), sequence, hint, roots).unwrap();
            let read = Bundle::from_jwks(domain(), &bundle.to_jwks()).unwrap();
            prop_assert_eq!(read.to_jwks(), bundle.to_jwks());
            prop_assert_eq!(read.digest(), sha256(&bundle.to_jwks()));
            prop_assert_eq!(&read, &bundle);
            let next = Bundle { sequence: sequence + 1, ..bundle.clone() };
            prop_assert_ne!(next.digest(), bundle.digest());
        }

        #[test]
        fn arbitrary_bytes_never_panic(json in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Bundle::from_jwks(domain(), &json).is_err());
        }
    }
}
