//! One document from one endpoint.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode, Uri, header};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use meshd_identity::MAX_BUNDLE_BYTES;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// For all of it, redirects included.
const DEADLINE: Duration = Duration::from_secs(10);
const REDIRECTS: usize = 3;

#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("no answer within 10 s")]
    Deadline,
    #[error("{0}")]
    Url(String),
    #[error("cannot reach {address}: {source}")]
    Tcp { address: String, source: std::io::Error },
    #[error("TLS with {address}: {source}")]
    Tls { address: String, source: std::io::Error },
    #[error("HTTP: {0}")]
    Http(String),
    #[error("it answers {0}")]
    Status(StatusCode),
    #[error(
        "it redirects for good ({0}); only whoever runs this PKI changes the URL: `meshd-pki federation add` again"
    )]
    Permanent(StatusCode),
    #[error("it redirects more than {REDIRECTS} times")]
    Loop,
}

/// Redirects are followed when they are temporary. With https_spiffe the next server has to prove the same identity as the
/// first, with https_web its own name.
pub(super) async fn fetch(url: &str, tls: Arc<ClientConfig>) -> Result<Vec<u8>, FetchError> {
    let following = async {
        let mut place = check_url(url).map_err(FetchError::Url)?;
        for _ in 0..=REDIRECTS {
            match get(&place, tls.clone()).await? {
                Answer::Document(bytes) => return Ok(bytes),
                Answer::Elsewhere(location) => place = check_url(&location).map_err(FetchError::Url)?,
            }
        }
        Err(FetchError::Loop)
    };
    timeout(DEADLINE, following).await.map_err(|_| FetchError::Deadline)?
}

enum Answer {
    Document(Vec<u8>),
    Elsewhere(String),
}

/// Absolute, HTTPS, without user information.
pub(super) fn check_url(text: &str) -> Result<Uri, String> {
    let shown: String = text.chars().take(200).flat_map(char::escape_debug).collect();
    let uri: Uri = text.parse().map_err(|_| format!("`{shown}` is not a URL; write https://HOST[:PORT]/PATH"))?;
    let has_user = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
    if uri.scheme_str() != Some("https") || uri.host().is_none_or(str::is_empty) || has_user {
        return Err(format!("`{shown}` is not an https URL; write https://HOST[:PORT]/PATH"));
    }
    Ok(uri)
}

async fn get(place: &Uri, tls: Arc<ClientConfig>) -> Result<Answer, FetchError> {
    let http = |error: &dyn std::fmt::Display| FetchError::Http(error.to_string());
    let host = place.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let port = place.port_u16().unwrap_or(443);
    let address = format!("{host}:{port}");
    let tcp = TcpStream::connect((host, port))
        .await
        .map_err(|source| FetchError::Tcp { address: address.clone(), source })?;
    let name = ServerName::try_from(host.to_owned()).map_err(|error| FetchError::Url(error.to_string()))?;
    let tls = TlsConnector::from(tls)
        .connect(name, tcp)
        .await
        .map_err(|source| FetchError::Tls { address: address.clone(), source })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(tls)).await.map_err(|error| http(&error))?;
    let path = place.path_and_query().map_or("/", |path| path.as_str());
    let authority = place.authority().map_or_else(String::new, ToString::to_string);
    let request = Request::get(path)
        .header(header::HOST, authority)
        .header(header::ACCEPT, "application/json")
        .body(Body::empty())
        .map_err(|error| http(&error))?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(|error| http(&error))?;
        let status = response.status();
        match status {
            StatusCode::OK => {
                let body = Body::new(response.into_body());
                let bytes = to_bytes(body, MAX_BUNDLE_BYTES).await.map_err(|error| http(&error))?;
                Ok(Answer::Document(bytes.to_vec()))
            }
            StatusCode::FOUND | StatusCode::SEE_OTHER | StatusCode::TEMPORARY_REDIRECT => {
                let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
                let location = location.ok_or_else(|| FetchError::Http("a redirect without a place".to_owned()))?;
                Ok(Answer::Elsewhere(location.to_owned()))
            }
            StatusCode::MOVED_PERMANENTLY | StatusCode::PERMANENT_REDIRECT => Err(FetchError::Permanent(status)),
            other => Err(FetchError::Status(other)),
        }
    };
    tokio::pin!(connection);
    tokio::pin!(exchange);
    // The connection is driven here: nothing of it is left behind when the deadline cuts us off.
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        ended = &mut connection => match ended {
            Ok(()) => exchange.await,
            Err(error) => Err(http(&error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_https_is_asked() {
        assert!(check_url("https://bundles.example:8443/x").is_ok());
        for bad in ["http://a/x", "https://", "https://u:p@a/", "/x", "spiffe://a"] {
            assert!(check_url(bad).is_err(), "{bad}");
        }
    }
}
