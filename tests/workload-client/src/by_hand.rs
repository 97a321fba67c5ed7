//! Calls that well-behaved clients do not make, and connections in the wrong hands.

use std::future::Future;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, Result};
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use meshd_workload_api::envoy::DiscoveryRequest;
use meshd_workload_api::envoy::secret_discovery_service_client::SecretDiscoveryServiceClient;
use meshd_workload_api::spiffe::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use meshd_workload_api::spiffe::{
    JwtBundlesRequest, JwtsvidRequest, ValidateJwtsvidRequest, X509BundlesRequest, X509svidRequest,
};
use socket2::SockRef;
use tokio::net::UnixStream;
use tonic::Status;
use tonic::body::Body;
use tonic::metadata::MetadataValue;

/// An idle service speaks at once.
const FIRST_WORD: Duration = Duration::from_secs(10);
/// Streams per connection: fewer than the API allows.
const PER_CONNECTION: usize = 100;

#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum Method {
    FetchX509Svid,
    FetchX509Bundles,
    FetchJwtSvid,
    FetchJwtBundles,
    ValidateJwtSvid,
    /// Of the standard, but not of ours.
    FetchWitSvid,
    FetchSecrets,
}

pub(crate) async fn call(socket: &Path, method: Method, with_header: bool) -> Result<()> {
    let channel = channel(UnixStream::connect(socket).await?).await?;
    tell(&ask(channel, method, with_header).await);
    Ok(())
}

fn tell(done: &Result<(), Status>) {
    match done {
        Ok(()) => println!("Ok"),
        Err(status) => println!("{:?}: {}", status.code(), status.message()),
    }
}

async fn ask(channel: Channel, method: Method, with_header: bool) -> Result<(), Status> {
    let mut spiffe = SpiffeWorkloadApiClient::with_origin(channel.clone(), Uri::from_static("http://localhost"));
    let (audience, svid) = ("test".to_owned(), "x.y.z".to_owned());
    match method {
        Method::FetchX509Svid => {
            let mut answers = spiffe.fetch_x509svid(prepared(X509svidRequest {}, with_header)).await?.into_inner();
            answers.message().await.map(drop)
        }
        Method::FetchX509Bundles => {
            let request = prepared(X509BundlesRequest {}, with_header);
            spiffe.fetch_x509_bundles(request).await?.into_inner().message().await.map(drop)
        }
        Method::FetchJwtSvid => {
            let request = JwtsvidRequest { audience: vec![audience], spiffe_id: String::new() };
            spiffe.fetch_jwtsvid(prepared(request, with_header)).await.map(drop)
        }
        Method::FetchJwtBundles => {
            let request = prepared(JwtBundlesRequest {}, with_header);
            spiffe.fetch_jwt_bundles(request).await?.into_inner().message().await.map(drop)
        }
        Method::ValidateJwtSvid => {
            spiffe.validate_jwtsvid(prepared(ValidateJwtsvidRequest { audience, svid }, with_header)).await.map(drop)
        }
        Method::FetchWitSvid => unknown_method(channel, with_header).await,
        Method::FetchSecrets => {
            let mut sds = SecretDiscoveryServiceClient::with_origin(channel, Uri::from_static("http://localhost"));
            sds.fetch_secrets(DiscoveryRequest::default()).await.map(drop)
        }
    }
}

async fn unknown_method(mut channel: Channel, with_header: bool) -> Result<(), Status> {
    let mut request = Request::post("http://localhost/SpiffeWorkloadAPI/FetchWITSVID");
    if with_header {
        request = request.header("workload.spiffe.io", "true");
    }
    let request = request.header("content-type", "application/grpc").body(Body::empty());
    let request = request.map_err(|error| Status::internal(error.to_string()))?;
    let response = tower_service::Service::call(&mut channel, request).await;
    let response = response.map_err(|error| Status::internal(error.to_string()))?;
    Status::from_header_map(response.headers()).map_or(Ok(()), Err)
}

fn prepared<T>(message: T, with_header: bool) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    if with_header {
        request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
    }
    request
}

pub(crate) async fn hold(socket: &Path, streams: usize) -> Result<()> {
    let (mut held, mut refused) = (Vec::new(), 0);
    let mut connection = None;
    for number in 0..streams {
        if number % PER_CONNECTION == 0 {
            // Whoever asks too much is not even let in.
            connection = channel(UnixStream::connect(socket).await?).await.ok();
        }
        let Some(channel) = connection.clone() else {
            refused += 1;
            continue;
        };
        let mut spiffe = SpiffeWorkloadApiClient::with_origin(channel, Uri::from_static("http://localhost"));
        match spiffe.fetch_x509svid(prepared(X509svidRequest {}, true)).await {
            Ok(answers) => held.push(answers),
            Err(_) => refused += 1,
        }
    }
    println!("{} open, {refused} refused", held.len());
    std::future::pending().await
}

pub(crate) fn become_program(socket: &Path, program: &[String]) -> Result<()> {
    let error = command(socket, program)?.exec();
    Err(error).context("cannot become the program")
}

pub(crate) fn leave(socket: &Path, program: &[String]) -> Result<()> {
    command(socket, program)?.arg("--parent").arg(std::process::id().to_string()).spawn()?;
    Ok(())
}

fn command(socket: &Path, program: &[String]) -> Result<Command> {
    let (name, args) = program.split_first().context("no program")?;
    let connection = StdStream::connect(socket)?;
    // Who connects is looked at when the connection is accepted, which is when the service speaks: not before that may
    // it change hands.
    connection.set_read_timeout(Some(FIRST_WORD))?;
    SockRef::from(&connection).peek(&mut [MaybeUninit::uninit()]).context("the service says nothing")?;
    connection.set_read_timeout(None)?;
    let connection = OwnedFd::from(connection);
    let mut command = Command::new(name);
    command.args(args).stdin(Stdio::from(connection));
    Ok(command)
}

pub(crate) async fn resume(parent: u32) -> Result<()> {
    let parent = Path::new("/proc").join(parent.to_string());
    while parent.exists() {
        tokio::task::yield_now().await;
    }
    let connection = StdStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    connection.set_nonblocking(true)?;
    let channel = channel(UnixStream::from_std(connection)?).await?;
    tell(&ask(channel, Method::FetchX509Svid, true).await);
    Ok(())
}

/// One HTTP/2 connection as the service tonic's client wants.
#[derive(Clone)]
struct Channel(http2::SendRequest<Body>);

async fn channel(socket: UnixStream) -> Result<Channel> {
    let (sender, connection) = http2::Builder::new(TokioExecutor::new()).handshake(TokioIo::new(socket)).await?;
    tokio::spawn(connection);
    Ok(Channel(sender))
}

impl tower_service::Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Incoming>, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
