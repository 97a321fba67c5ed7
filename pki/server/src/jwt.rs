//! JWT-SVIDs (SPIFFE JWT-SVID sections 2 and 3): ES256, `sub`, `aud`, `exp`, `iat`, and no header beyond `alg`, `kid`, `typ`.

use std::time::Duration;

use meshd_identity::jwt::audience_problem;
use meshd_identity::{SpiffeId, signed};
use meshd_pki_api::v1;
use serde::Serialize;

use crate::audit::Event;
use crate::issue::{entry_ended, not_permitted, parse_id};
use crate::pki::Pki;
use crate::refused::Refused;
use crate::store::{grants, trust};
use crate::times::{rfc3339, seconds, unix};

/// Long enough for a call chain, short enough to be no credential worth stealing.
const DEFAULT_LIFE: Duration = Duration::from_secs(15 * 60);

#[derive(Serialize)]
struct Header<'a> {
    alg: &'static str,
    kid: &'a str,
    typ: &'static str,
}

#[derive(Serialize)]
struct Claims<'a> {
    sub: &'a str,
    aud: &'a [String],
    exp: i64,
    iat: i64,
}

impl Pki {
    pub fn issue_jwt(
        &self,
        certificate: Option<&[u8]>,
        request: &v1::IssueJwtRequest,
        remote: &str,
    ) -> Result<v1::IssueJwtReply, Refused> {
        let result = self.issue_jwt_for_caller(certificate, request, remote);
        self.record_outcome("issue_jwt", certificate, &result, remote);
        result
    }

    fn issue_jwt_for_caller(
        &self,
        certificate: Option<&[u8]>,
        request: &v1::IssueJwtRequest,
        remote: &str,
    ) -> Result<v1::IssueJwtReply, Refused> {
        self.refuse_while_frozen()?;
        check_audience(&request.audience)?;
        let now = unix(self.now());
        let (caller, granted, trust) = self.state.database.read_latest(|view| -> Result<_, Refused> {
            let caller = self.caller(view, certificate)?;
            let granted = grants::granted(view, &caller.host.id)?;
            Ok((caller, granted, trust::trust(view)?))
        })?;
        let id: SpiffeId = parse_id(&request.spiffe_id).map_err(Refused::Invalid)?;
        let terms = match granted.get(id.as_str()) {
            None => {
                let permitted: Vec<String> = granted.into_keys().collect();
                return Err(Refused::Forbidden(not_permitted(&caller, &id, &permitted)));
            }
            Some(terms) if terms.has_ended(now) => return Err(Refused::Forbidden(entry_ended(&caller, &id, terms))),
            Some(terms) => terms,
        };
        if let Some(message) = self.denied(id.as_str()) {
            return Err(Refused::Forbidden(message));
        }
        let asked = Duration::from_secs(request.ttl_s.into());
        let life = match terms.jwt_ttl_s.map(Duration::from_secs) {
            Some(most) if asked.is_zero() || asked > most => most,
            None if asked.is_zero() => DEFAULT_LIFE,
            _ => asked,
        };
        let life = life.min(self.lifetimes.jwt);
        let unavailable = || Refused::Unavailable("the PKI has no key for JWTs now; see its log".to_owned());
        let key = trust.jwt_signer(now).ok_or_else(unavailable)?;
        let exp = (now + seconds(life)).min(key.not_after).min(terms.expires_at.unwrap_or(i64::MAX));
        let claims = Claims { sub: id.as_str(), aud: &request.audience, exp, iat: now };
        let pkcs8 = self.kek.unwrap(&key.kid, &key.wrapped_key).map_err(|error| {
            tracing::error!(%error, "the key of JWTs");
            unavailable()
        })?;
        let header = Header { alg: signed::ALGORITHM, kid: &key.kid, typ: "JWT" };
        let token = signed::compact(&pkcs8, &header, &claims).map_err(|error| {
            tracing::error!(%error, "a JWT cannot be signed");
            unavailable()
        })?;
        _ = self.record(&[Event {
            event: "issue_jwt",
            result: "ok",
            host: Some(caller.host.id),
            identity: Some(id.to_string()),
            authority: Some(key.kid.clone()),
            not_after: Some(rfc3339(exp)),
            remote: Some(remote.to_owned()),
            detail: Some(format!("audience: {}", request.audience.join(" "))),
            ..Event::default()
        }]);
        Ok(v1::IssueJwtReply { token, not_after_unix: exp })
    }
}

fn check_audience(audience: &[String]) -> Result<(), Refused> {
    audience_problem(audience).map_or(Ok(()), |problem| Err(Refused::Invalid(problem)))
}
