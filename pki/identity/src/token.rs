use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64URL_NOPAD;

const VERSION: &str = "mjt1";
const PIN_VERSION: &str = "mpp1";
const MAX_LENGTH: usize = 4096;
const MAX_ADDRESSES: usize = 16;

/// What an operator carries from the PKI to a new host: where the PKI is, how to recognise it, and the right to
/// enrol once. Text form: `mjt1.<id>.<secret>.<pki addresses>.<bundle SHA-256>.<recovery key SHA-256>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    pub id: String,
    pub secret: Secret,
    /// `host:port` of each PKI server.
    pub pki: Vec<String>,
    /// SHA-256 of the bundle document the PKI served when the token was made.
    pub bundle_digest: [u8; 32],
    /// SHA-256 of the recovery key's SubjectPublicKeyInfo.
    pub recovery_key_id: [u8; 32],
}

/// 256 random bits that must not reach a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub [u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(redacted)")
    }
}

/// Errors never repeat the token: it is a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("this is not a join token (it must start with `mjt1.`); make one with `meshd-pki token create`")]
    NotAToken,
    #[error("this is not a pin of a PKI (`mpp1.` and three more parts); make one with `meshd-pki pin`")]
    NotAPin,
    #[error("the join token has {0} parts, 6 are expected; it was probably cut when copied, copy it again whole")]
    Parts(usize),
    #[error("the {0} in the join token is damaged; copy the token again whole, or make a new one")]
    Damaged(&'static str),
    #[error("`{0}` in the join token is not HOST:PORT; make a new token with `meshd-pki token create --pki HOST:PORT`")]
    Address(String),
    #[error("the join token names {0} PKI addresses; 1 to {MAX_ADDRESSES} are allowed")]
    AddressCount(usize),
}

/// Where the PKI is and how to recognise it, without any right: what a host needs that proves in another way who it is.
/// Not secret; whoever can change it decides which PKI the host believes. Text form: `mpp1.<pki addresses>.<bundle
/// SHA-256>.<recovery key SHA-256>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PkiPin {
    pub pki: Vec<String>,
    pub bundle_digest: [u8; 32],
    pub recovery_key_id: [u8; 32],
}

impl JoinToken {
    pub fn pin(&self) -> PkiPin {
        let JoinToken { pki, bundle_digest, recovery_key_id, .. } = self.clone();
        PkiPin { pki, bundle_digest, recovery_key_id }
    }

    /// Checks what a written token must satisfy, so that a bad address is found where the token is made.
    pub fn check(&self) -> Result<(), TokenError> {
        if self.id.is_empty() || !self.id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return Err(TokenError::Damaged("id"));
        }
        check_addresses(&self.pki)
    }
}

impl PkiPin {
    pub fn check(&self) -> Result<(), TokenError> {
        check_addresses(&self.pki)
    }
}

impl FromStr for PkiPin {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<PkiPin, TokenError> {
        let text = text.trim();
        let parts: Vec<&str> = text.split('.').collect();
        let [PIN_VERSION, addresses, digest, key_id] = parts[..] else {
            return Err(TokenError::NotAPin);
        };
        let pki = read_addresses(addresses)?;
        let (bundle_digest, recovery_key_id) =
            (decode_32(digest, "bundle digest")?, decode_32(key_id, "recovery key id")?);
        let pin = PkiPin { pki, bundle_digest, recovery_key_id };
        pin.check()?;
        Ok(pin)
    }
}

impl fmt::Display for PkiPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |bytes: &[u8]| BASE64URL_NOPAD.encode(bytes);
        let addresses = text(self.pki.join(",").as_bytes());
        write!(f, "{PIN_VERSION}.{addresses}.{}.{}", text(&self.bundle_digest), text(&self.recovery_key_id))
    }
}

fn check_addresses(pki: &[String]) -> Result<(), TokenError> {
    if pki.is_empty() || pki.len() > MAX_ADDRESSES {
        return Err(TokenError::AddressCount(pki.len()));
    }
    match pki.iter().find(|address| !is_address(address)) {
        Some(bad) => Err(TokenError::Address(bad.escape_debug().to_string())),
        None => Ok(()),
    }
}

fn read_addresses(text: &str) -> Result<Vec<String>, TokenError> {
    let addresses = String::from_utf8(decode(text, "address list")?);
    let addresses = addresses.map_err(|_| TokenError::Damaged("address list"))?;
    Ok(addresses.split(',').map(str::to_owned).collect())
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<JoinToken, TokenError> {
        let text = text.trim();
        if text.len() > MAX_LENGTH || !text.starts_with("mjt1.") {
            return Err(TokenError::NotAToken);
        }
        let parts: Vec<&str> = text.split('.').collect();
        let [_, id, secret, addresses, digest, key_id] = parts[..] else {
            return Err(TokenError::Parts(parts.len()));
        };
        let token = JoinToken {
            id: id.to_owned(),
            secret: Secret(decode_32(secret, "secret")?),
            pki: read_addresses(addresses)?,
            bundle_digest: decode_32(digest, "bundle digest")?,
            recovery_key_id: decode_32(key_id, "recovery key id")?,
        };
        token.check()?;
        Ok(token)
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |bytes: &[u8]| BASE64URL_NOPAD.encode(bytes);
        let addresses = self.pki.join(",");
        let (secret, addresses) = (text(&self.secret.0), text(addresses.as_bytes()));
        let (digest, key_id) = (text(&self.bundle_digest), text(&self.recovery_key_id));
        write!(f, "{VERSION}.{}.{secret}.{addresses}.{digest}.{key_id}", self.id)
    }
}

fn decode(text: &str, part: &'static str) -> Result<Vec<u8>, TokenError> {
    BASE64URL_NOPAD.decode(text.as_bytes()).map_err(|_| TokenError::Damaged(part))
}

fn decode_32(text: &str, part: &'static str) -> Result<[u8; 32], TokenError> {
    decode(text, part)?.try_into().map_err(|_| TokenError::Damaged(part))
}

fn is_address(address: &str) -> bool {
    let Some((host, port)) = address.rsplit_once(':') else {
        return false;
    };
    let port_is_good = port.parse::<u16>().is_ok_and(|port| port != 0);
    let host_is_good = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')),
    };
    port_is_good && host_is_good
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            id: "7f3a".to_owned(),
            secret: Secret([0x5a; 32]),
            pki: vec!["10.0.0.1:15012".to_owned(), "[fd00::1]:15012".to_owned(), "pki-1.example:443".to_owned()],
            bundle_digest: [1; 32],
            recovery_key_id: [2; 32],
        }
    }

    #[test]
    fn a_file_with_a_newline_is_read() {
        assert_eq!(format!("  {}\n", token()).parse::<JoinToken>().unwrap(), token());
    }

    #[test]
    fn the_pin_of_a_token_has_nothing_secret_and_is_read_again() {
        let pin = token().pin();
        let text = format!("{pin}\n");
        assert_eq!(text.parse::<PkiPin>().unwrap(), pin);
        assert!(!text.contains(&BASE64URL_NOPAD.encode(&token().secret.0)));
        for bad in ["", "mpp1", &token().to_string(), &text.replace("mpp1", "mpp2"), &text[..text.len() - 9]] {
            assert!(bad.parse::<PkiPin>().is_err(), "{bad}");
        }
    }

    #[test]
    fn debug_hides_the_secret() {
        let shown = format!("{:?}", token());
        assert!(shown.contains("redacted") && !shown.contains("90"), "{shown}");
    }

    #[test]
    fn damaged_tokens_are_refused_without_repeating_them() {
        let good = token().to_string();
        let parts: Vec<&str> = good.split('.').collect();
        let with = |index: usize, value: &str| {
            let mut changed = parts.clone();
            changed[index] = value;
            changed.join(".")
        };
        let cases = [
            (String::new(), "not a join token"),
            ("hello".to_owned(), "not a join token"),
            (good.replace("mjt1", "mjt9"), "not a join token"),
            (good[..good.len() - 50].to_owned(), "parts"),
            (good[..good.len() - 5].to_owned(), "recovery key id"),
            (with(1, ""), "id"),
            (with(2, "AAAA"), "secret"),
            (with(2, "!!"), "secret"),
            (with(3, "_w"), "address list"),
            (with(3, &BASE64URL_NOPAD.encode(b"10.0.0.1")), "HOST:PORT"),
            (with(3, &BASE64URL_NOPAD.encode(b"10.0.0.1:0")), "HOST:PORT"),
            (with(3, &BASE64URL_NOPAD.encode(b"[::zz]:1")), "HOST:PORT"),
            (with(4, "x"), "bundle digest"),
        ];
        for (text, expected) in cases {
            let error = text.parse::<JoinToken>().unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
            assert!(!error.contains(parts[2]), "the error repeats the secret");
        }
    }

    proptest! {
        #[test]
        fn text_form_round_trips(
            id in "[a-z0-9]{1,24}",
            secret in any::<[u8; 32]>(),
            bundle_digest in any::<[u8; 32]>(),
            recovery_key_id in any::<[u8; 32]>(),
            pki in prop::collection::vec("[a-z0-9.-]{1,30}:[1-9][0-9]{0,3}", 1..5),
        ) {
            let token = JoinToken { id, secret: Secret(secret), pki, bundle_digest, recovery_key_id };
            prop_assert_eq!(token.to_string().parse::<JoinToken>().unwrap(), token);
        }

        #[test]
        fn arbitrary_text_never_panics(text in "(mjt1\\.)?[ -~é.]{0,200}") {
            let _ = text.parse::<JoinToken>();
        }
    }
}
