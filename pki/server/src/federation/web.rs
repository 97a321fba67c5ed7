//! Our bundle for followers that know us by a name of the web (https_web), on a port of its own: its certificate is the
//! operator's, and it asks nobody for one.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{interval, timeout};
use tokio_rustls::TlsAcceptor;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::files::{Files, READ_EVERY};
use crate::pki::Pki;
use crate::store::servers::ServerCertificate;
use crate::times::{rfc3339, unix};

const DEADLINE: Duration = Duration::from_secs(5);
/// A follower makes one request and goes.
const LIFE: Duration = Duration::from_secs(30);
const MAX_CONNECTIONS: usize = 256;

/// The operator's certificate for this port, as it is now.
pub struct WebCertificate {
    files: Mutex<Files>,
    current: RwLock<(Arc<ServerConfig>, ServerCertificate)>,
}

impl WebCertificate {
    /// Fails when the files cannot be used: nothing would be served.
    pub fn load(chain: PathBuf, key: PathBuf) -> Result<WebCertificate, String> {
        let mut files = Files::new(&[&chain, &key]);
        let contents = files.changed()?.ok_or("the files were just read")?;
        let current = RwLock::new(usable(&contents)?);
        Ok(WebCertificate { files: Mutex::new(files), current })
    }

    /// Takes over what changed and can be used. True when it did.
    pub fn reload(&self, now: SystemTime) -> Result<bool, String> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(contents) = files.changed()? else { return Ok(false) };
        // What is refused is judged again and again, so that the refusal is told as long as it lasts.
        let new = usable(&contents).and_then(|new| valid(new, unix(now))).inspect_err(|_| files.forget())?;
        drop(files);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(true)
    }

    fn config(&self) -> Arc<ServerConfig> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    pub(crate) fn certificate(&self) -> ServerCertificate {
        self.current.read().unwrap_or_else(PoisonError::into_inner).1.clone()
    }
}

fn usable(contents: &[Vec<u8>]) -> Result<(Arc<ServerConfig>, ServerCertificate), String> {
    let [chain, key] = contents else { return Err("a chain and a key are needed".to_owned()) };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(chain)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("the certificate is not PEM: {error}"))?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| format!("the key is not PEM: {error}"))?;
    let leaf = chain.first().ok_or("there is no certificate in the file")?;
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|error| format!("unreadable certificate: {error}"))?;
    let shown = ServerCertificate {
        kind: "https_web".to_owned(),
        serial: data_encoding::HEXLOWER.encode(parsed.raw_serial()),
        not_after: parsed.validity().not_after.timestamp(),
    };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|error| format!("certificate and key do not go together: {error}"))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok((Arc::new(config), shown))
}

/// One that has ended does not take the place of one that may be good.
fn valid<T>(new: (T, ServerCertificate), now: i64) -> Result<(T, ServerCertificate), String> {
    let end = new.1.not_after;
    if end > now { Ok(new) } else { Err(format!("the certificate ended at {}", rfc3339(end))) }
}

/// Until it is dropped.
pub async fn serve_web(pki: Arc<Pki>, listener: TcpListener, certificate: Arc<WebCertificate>) {
    let router = crate::serve::bundle_router(pki.clone());
    pki.set_web_certificate(certificate.clone());
    let (mut connections, mut reading) = (JoinSet::new(), JoinSet::new());
    reading.spawn(follow_files(pki.clone()));
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((socket, _)) => {
                    let served = connection(socket, certificate.config(), router.clone());
                    connections.spawn(async move { timeout(LIFE, served).await });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
}

/// On threads where files may be slow.
async fn follow_files(pki: Arc<Pki>) {
    let mut ticks = interval(READ_EVERY);
    loop {
        ticks.tick().await;
        let pki = pki.clone();
        if let Err(error) = spawn_blocking(move || pki.reload_web_certificate()).await {
            tracing::error!(%error, "reading the certificate of the https_web endpoint panicked");
        }
    }
}

impl Pki {
    /// Reads the files of the https_web endpoint again, where this process serves one.
    pub fn reload_web_certificate(&self) {
        let Some(certificate) = self.web_certificate() else { return };
        let refused = &self.metrics.health.web_certificate_refused;
        match certificate.reload(self.now()) {
            Ok(changed) => {
                refused.set(0);
                if changed {
                    tracing::info!("the certificate of the https_web endpoint was replaced");
                }
            }
            Err(reason) => {
                refused.set(1);
                tracing::error!(
                    reason,
                    "the certificate of the https_web endpoint cannot be replaced; the last one stays"
                );
            }
        }
    }
}

async fn connection(socket: TcpStream, config: Arc<ServerConfig>, router: Router) {
    let Ok(Ok(tls)) = timeout(DEADLINE, TlsAcceptor::from(config).accept(socket)).await else { return };
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(DEADLINE);
    // A follower that breaks off is its own business.
    _ = builder.serve_connection(TokioIo::new(tls), TowerToHyperService::new(router)).await;
}
