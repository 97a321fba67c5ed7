//! A cluster's keys from the cluster: one GET over TLS, no redirects.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use meshd_identity::MAX_BUNDLE_BYTES;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::config::Kubernetes;

const DEADLINE: Duration = Duration::from_secs(10);
const HTTPS: u16 = 443;

pub(super) async fn keys(cluster: &Kubernetes) -> Result<Vec<u8>, String> {
    let url = cluster.jwks_url.as_deref().unwrap_or_default();
    match timeout(DEADLINE, get(cluster, url)).await {
        Ok(answer) => answer.map_err(|error| format!("{url}: {error}")),
        Err(_) => Err(format!("{url}: no answer within {} s", DEADLINE.as_secs())),
    }
}

async fn get(cluster: &Kubernetes, url: &str) -> Result<Vec<u8>, String> {
    let uri: Uri = url.parse().map_err(|error| format!("not a URL: {error}"))?;
    let host = uri.host().filter(|_| uri.scheme_str() == Some("https")).ok_or("not an https URL")?;
    let ca_file = cluster.ca_file.as_deref().ok_or("give `ca_file`, the authority of that server")?;
    let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned()).map_err(|error| error.to_string())?;
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let address = (host.trim_matches(['[', ']']), uri.port_u16().unwrap_or(HTTPS));
    let tcp = TcpStream::connect(address).await.map_err(|error| text(&error))?;
    let tls = TlsConnector::from(Arc::new(tls(ca_file)?)).connect(name, tcp).await.map_err(|error| text(&error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(tls)).await.map_err(|error| text(&error))?;
    tokio::spawn(connection);
    let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
    let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let mut request = Request::get(path).header(header::HOST, authority);
    if let Some(file) = &cluster.bearer_file {
        let bearer = tokio::fs::read_to_string(file).await.map_err(|error| format!("{}: {error}", file.display()))?;
        request = request.header(header::AUTHORIZATION, format!("Bearer {}", bearer.trim()));
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| text(&error))?;
    let response = sender.send_request(request).await.map_err(|error| text(&error))?;
    if response.status() != StatusCode::OK {
        return Err(format!("answered {}; `bearer_file` names what to show it", response.status()));
    }
    let body = Limited::new(response.into_body(), MAX_BUNDLE_BYTES).collect().await.map_err(|error| text(&error))?;
    Ok(body.to_bytes().to_vec())
}

fn tls(ca_file: &Path) -> Result<ClientConfig, String> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", ca_file.display());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca_file).map_err(|error| named(&error))? {
        roots.add(certificate.map_err(|error| named(&error))?).map_err(|error| named(&error))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(builder.map_err(|error| named(&error))?.with_root_certificates(roots).with_no_client_auth())
}
