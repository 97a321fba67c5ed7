//! The SPIFFE Workload API.

use std::sync::Arc;

use meshd_identity::SpiffeId;
use meshd_identity::jwt::audience_problem;
use meshd_workload_api::spiffe::spiffe_workload_api_server::SpiffeWorkloadApi;
use meshd_workload_api::spiffe::{
    JwtBundlesRequest, JwtBundlesResponse, Jwtsvid, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
    ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse, X509svidRequest, X509svidResponse,
};
use tonic::{Request, Response, Status, async_trait};

use super::jwt::{self, IssueError, JwtSource};
use super::refused::Refused;
use super::session::{Answers, Session};
use super::x509;

/// The API as one connection sees it.
pub(super) struct Spiffe(pub(super) Arc<Session>);

#[async_trait]
impl SpiffeWorkloadApi for Spiffe {
    type FetchX509SVIDStream = Answers<X509svidResponse>;
    type FetchX509BundlesStream = Answers<X509BundlesResponse>;
    type FetchJWTBundlesStream = Answers<JwtBundlesResponse>;

    async fn fetch_x509svid(&self, _: Request<X509svidRequest>) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let answer = |session: &Session| {
            let holding = session.holding()?;
            Ok(x509::svids(&holding.svid, &holding.credentials))
        };
        Ok(Response::new(self.0.answers(answer).await?))
    }

    async fn fetch_x509_bundles(
        &self,
        _: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        let answer = |session: &Session| {
            let holding = session.holding()?;
            Ok(x509::bundles(&holding.svid.id, &holding.credentials))
        };
        Ok(Response::new(self.0.answers(answer).await?))
    }

    async fn fetch_jwtsvid(&self, request: Request<JwtsvidRequest>) -> Result<Response<JwtsvidResponse>, Status> {
        let JwtsvidRequest { audience, spiffe_id } = request.into_inner();
        check_audience(&audience)?;
        self.0.look().await;
        let identity = self.0.identity()?;
        if !spiffe_id.is_empty() && spiffe_id != identity.as_str() {
            return Err(Refused::NoIdentity.into());
        }
        let _slot = self.0.stream()?;
        let token = self.token(&identity, audience).await?;
        // Asking the PKI takes its time: only whoever asked gets the answer.
        self.0.look().await;
        if self.0.identity()? != identity {
            return Err(Refused::NoIdentity.into());
        }
        let hint = self.0.sources.credentials.borrow().hints.get(&identity).cloned().unwrap_or_default();
        let svid = Jwtsvid { spiffe_id: identity.to_string(), svid: token, hint };
        Ok(Response::new(JwtsvidResponse { svids: vec![svid] }))
    }

    async fn fetch_jwt_bundles(
        &self,
        _: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        let answer = |session: &Session| {
            let identity = session.identity()?;
            Ok(jwt::bundles(tokens(session)?.keys(&identity)))
        };
        Ok(Response::new(self.0.answers(answer).await?))
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        let ValidateJwtsvidRequest { audience, svid } = request.into_inner();
        check_audience(std::slice::from_ref(&audience))?;
        self.0.look().await;
        let identity = self.0.identity()?;
        let verified = tokens(&self.0)?.verify(&svid, &audience, &identity).map_err(Refused::Invalid)?;
        Ok(Response::new(jwt::validated(verified)))
    }
}

impl Spiffe {
    async fn token(&self, identity: &SpiffeId, audience: Vec<String>) -> Result<String, Refused> {
        let issued = tokens(&self.0)?.issue(identity.clone(), audience).await;
        issued.map_err(|why| match why {
            IssueError::Refused(words) => {
                self.0.refused_by_pki(identity, &words);
                Refused::NoIdentity
            }
            IssueError::Invalid(words) => Refused::Invalid(words),
            IssueError::Away(words) => Refused::NotYet(words),
        })
    }
}

fn tokens(session: &Session) -> Result<&dyn JwtSource, Refused> {
    let none = || Refused::NotYet("this host's PKI issues no tokens (JWT-SVIDs); use X.509-SVIDs".to_owned());
    session.sources.tokens.as_deref().ok_or_else(none)
}

fn check_audience(audience: &[String]) -> Result<(), Refused> {
    audience_problem(audience).map_or(Ok(()), |problem| Err(Refused::Invalid(problem)))
}
