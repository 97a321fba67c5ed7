//! One HTTP/1.1 connection over TLS, as a client of Consul and Kubernetes that writes.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{Method, Request, Uri};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

pub(crate) struct Access {
    pub(crate) url: String,
    pub(crate) ca: PathBuf,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
    pub(crate) token: Option<String>,
}

pub(crate) struct Client {
    access: Access,
    connection: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    pub(crate) fn new(access: Access) -> Self {
        Self { access, connection: None }
    }

    /// An answer other than 2xx is an error.
    pub(crate) async fn must(&mut self, method: Method, path: &str, content: &str, body: String) -> Result<()> {
        let uri: Uri = self.access.url.parse()?;
        let authority = uri.authority().context("a URL without a host")?.as_str();
        let mut request = Request::builder().method(&method).uri(path).header(HOST, authority);
        request = request.header(CONTENT_TYPE, content);
        if let Some(token) = &self.access.token {
            request = request.header("X-Consul-Token", token);
        }
        let request = request.body(Full::from(body))?;
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect(&uri).await?,
        };
        connection.ready().await?;
        let answer = connection.send_request(request).await?;
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        ensure!(status.is_success(), "{method} {path}: {status} {}", String::from_utf8_lossy(&body));
        self.connection = Some(connection);
        Ok(())
    }

    async fn connect(&self, uri: &Uri) -> Result<SendRequest<Full<Bytes>>> {
        let host = uri.host().context("a URL without a host")?;
        let port = uri.port_u16().context("a URL without a port")?;
        let tcp = TcpStream::connect((host, port)).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from(host.to_owned())?;
        let tls = TlsConnector::from(Arc::new(self.tls()?)).connect(name, tcp).await?;
        let (sender, connection) = handshake(TokioIo::new(tls)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }

    fn tls(&self) -> Result<ClientConfig> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(&self.access.ca)? {
            roots.add(certificate?)?;
        }
        let config = ClientConfig::builder().with_root_certificates(roots);
        let (Some(cert), Some(key)) = (&self.access.cert, &self.access.key) else {
            return Ok(config.with_no_client_auth());
        };
        let chain = CertificateDer::pem_file_iter(cert)?.collect::<Result<Vec<_>, _>>()?;
        Ok(config.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key)?)?)
    }
}
