//! The part of a probe that runs within the unit: a child process, so that nothing of the operator's stays there.

use std::io::{BufRead, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpSocket, TcpStream};

use super::super::on_runtime;

/// For the whole of it; a mesh answers in milliseconds, an application should.
pub(super) const DEADLINE: Duration = Duration::from_secs(15);
/// A server that speaks first does it at once.
const GREETING: Duration = Duration::from_secs(1);
/// Of what the far side says, as much is shown.
const SHOWN: usize = 200;
/// Of an answer's body, as much is read.
const BODY: usize = 1 << 20;

/// The first line of the operator's side: we are in the unit now.
pub(super) const BIND: &str = "bind";
/// The second: meshd has been told our port.
pub(super) const GO: &str = "go";

#[derive(Args)]
pub(crate) struct ConnectArgs {
    #[arg(long)]
    address: SocketAddr,
    /// Ask for this path by HTTP/1.1.
    #[arg(long, requires = "host")]
    path: Option<String>,
    #[arg(long)]
    host: Option<String>,
}

/// What happened, in order; a line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub(super) enum Event {
    Bound { port: u16 },
    Connected { us: u64 },
    FirstByte { us: u64 },
    Status { line: String },
    Said { bytes: usize, text: String },
    Silent,
    Closed,
    Failed { step: String, error: String },
}

pub(crate) fn connect(args: &ConnectArgs) -> Result<ExitCode> {
    on_runtime(async {
        // Made only now: a socket belongs to the cgroup its process is in when it makes it.
        expect_line(BIND)?;
        let socket = if args.address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        let here: IpAddr = match args.address {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        socket.bind((here, 0).into())?;
        tell(&Event::Bound { port: socket.local_addr()?.port() })?;
        expect_line(GO)?;
        match tokio::time::timeout(DEADLINE, try_out(args, socket)).await {
            Ok(told) => told?,
            Err(_) => failed("wait", &format!("nothing more happened within {} s", DEADLINE.as_secs()))?,
        }
        Ok(ExitCode::SUCCESS)
    })
}

async fn try_out(args: &ConnectArgs, socket: TcpSocket) -> Result<()> {
    let start = Instant::now();
    let stream = match socket.connect(args.address).await {
        Ok(stream) => stream,
        Err(error) => return failed("connect", &error),
    };
    tell(&Event::Connected { us: micros(start) })?;
    match (&args.path, &args.host) {
        (Some(path), Some(host)) => get(stream, host, path).await,
        _ => listen(stream).await,
    }
}

async fn get(stream: TcpStream, host: &str, path: &str) -> Result<()> {
    let start = Instant::now();
    let (mut send, connection) = match hyper::client::conn::http1::handshake(TokioIo::new(stream)).await {
        Ok(ready) => ready,
        Err(error) => return failed("request", &chain(&error)),
    };
    tokio::spawn(connection);
    let request = hyper::Request::get(path)
        .header("host", host)
        .header("user-agent", concat!("meshd-probe/", env!("CARGO_PKG_VERSION")))
        .header("connection", "close")
        .body(Empty::<Bytes>::new())?;
    let response = match send.send_request(request).await {
        Ok(response) => response,
        Err(error) => return failed("answer", &chain(&error)),
    };
    tell(&Event::FirstByte { us: micros(start) })?;
    tell(&Event::Status { line: format!("{:?} {}", response.version(), response.status()) })?;
    let mut body = response.into_body();
    let (mut bytes, mut text) = (0, Vec::new());
    while let Some(frame) = body.frame().await {
        let data = match frame {
            Ok(frame) => frame.into_data().unwrap_or_default(),
            Err(error) => return failed("body", &chain(&error)),
        };
        bytes += data.len();
        text.extend(data.iter().take(SHOWN - text.len()));
        if bytes > BODY {
            break;
        }
    }
    tell(&Event::Said { bytes, text: printable(&text) })
}

async fn listen(mut stream: TcpStream) -> Result<()> {
    let start = Instant::now();
    let mut said = [0; SHOWN];
    match tokio::time::timeout(GREETING, stream.read(&mut said)).await {
        Err(_) => tell(&Event::Silent),
        Ok(Ok(0)) => tell(&Event::Closed),
        Ok(Ok(bytes)) => {
            tell(&Event::FirstByte { us: micros(start) })?;
            tell(&Event::Said { bytes, text: printable(&said[..bytes]) })
        }
        Ok(Err(error)) => failed("answer", &error),
    }
}

fn failed(step: &str, error: &dyn std::fmt::Display) -> Result<()> {
    tell(&Event::Failed { step: step.to_owned(), error: error.to_string() })
}

fn tell(event: &Event) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(event)?)?;
    Ok(out.flush()?)
}

fn expect_line(expected: &str) -> Result<()> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    ensure!(line.trim() == expected, "this is a part of `meshd probe`; run that");
    Ok(())
}

/// hyper says "connection error"; what lies below says why.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Whatever the far side says, it must not speak to the operator's terminal.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).escape_debug().to_string()
}

fn micros(since: Instant) -> u64 {
    since.elapsed().as_micros() as u64
}

pub(super) fn read_event(lines: &mut impl BufRead) -> Result<Option<Event>> {
    let mut line = String::new();
    if lines.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    serde_json::from_str(&line).map(Some).context("the probing process said something else")
}
