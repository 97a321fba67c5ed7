//! From a change in the backend to the first connection that uses it: a program in the mesh connects all the time, and
//! its service moves from one host to the other.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use meshd_discovery::ServiceName;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::write::{Backend, WriterConfig};
use crate::{quantile, round};

/// What a failing run is bounded by.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two changes, at least; the next one comes at any moment of as long again.
const REST: Duration = Duration::from_millis(50);

#[derive(Debug, clap::Args)]
pub(crate) struct First {
    #[arg(long)]
    service: ServiceName,
    /// The hosts that serve it in turn, each with an answer of its own
    #[arg(long, num_args = 2)]
    between: Vec<IpAddr>,
    #[arg(long, default_value_t = 20)]
    seconds: u64,
}

pub(crate) async fn measure(args: &First, writer: WriterConfig) -> Result<serde_json::Value> {
    let mut backend = Backend::open(writer)?;
    backend.create_namespace(args.service.namespace()).await?;
    backend.create(&args.service, &args.between[..1]).await?;
    let target = format!("{}.mesh:80", args.service);
    let (mut known, _) = first_answer_but("", &target).await?;
    let (mut delays, mut failed) = (Vec::new(), 0);
    let mut random = fastrand::Rng::with_seed(3);
    let began = Instant::now();
    for change in 1.. {
        if began.elapsed().as_secs() >= args.seconds {
            break;
        }
        sleep(REST + REST.mul_f64(random.f64())).await;
        let sent = Instant::now();
        let write = backend.replace(&args.service, 0, args.between[change % 2]);
        let seen = async {
            let answer = first_answer_but(&known, &target).await;
            (answer, sent.elapsed())
        };
        let (written, (answer, delay)) = tokio::join!(write, seen);
        written?;
        delays.push(delay);
        let failures;
        (known, failures) = answer?;
        failed += failures;
    }
    delays.sort_unstable();
    Ok(json!({
        "changes": delays.len(),
        "failed": failed,
        "first_connection_p50_ms": round(quantile(&delays, 0.50)),
        "first_connection_p99_ms": round(quantile(&delays, 0.99)),
        "first_connection_last_ms": round(quantile(&delays, 1.0)),
    }))
}

/// Connects again and again until somebody else answers; how often nobody did.
async fn first_answer_but(known: &str, target: &str) -> Result<(String, usize)> {
    let (began, mut failed) = (Instant::now(), 0);
    while began.elapsed() < PATIENCE {
        match timeout(PATIENCE, ask(target)).await {
            Ok(Ok(answer)) if answer != known => return Ok((answer, failed)),
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => failed += 1,
        }
    }
    bail!("{target} answers as {known:?} for {} s, {failed} failed", PATIENCE.as_secs())
}

async fn ask(target: &str) -> Result<String> {
    let mut connection = TcpStream::connect(target).await?;
    connection.write_all(b"GET / HTTP/1.1\r\nHost: first\r\nConnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Ok(answer.lines().last().unwrap_or_default().to_owned())
}
