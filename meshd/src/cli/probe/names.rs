//! What a name stands for: asked of meshd's own DNS, as enrolled units are to ask, and of the host's resolver.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RData, RecordType};
use tokio::net::UdpSocket;

/// A datagram on loopback is lost only with whoever should answer it.
const PATIENCE: Duration = Duration::from_secs(2);
/// RFC 6891 6.2.5's suggestion; what we ask fits many times over.
const MAX_ANSWER: usize = 1232;

/// The address meshd's DNS gives, or None if it knows no such name.
pub(super) async fn ask_meshd(server: SocketAddr, name: &str) -> Result<Option<IpAddr>> {
    for kind in [RecordType::A, RecordType::AAAA] {
        if let Some(found) = ask(server, name, kind).await? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// What the host's own resolver says, which is what programs get that do not ask meshd.
pub(super) async fn ask_system(name: &str) -> Vec<IpAddr> {
    let found = tokio::net::lookup_host((name, 0)).await;
    found.map(|addresses| addresses.map(|address| address.ip()).collect()).unwrap_or_default()
}

async fn ask(server: SocketAddr, name: &str, kind: RecordType) -> Result<Option<IpAddr>> {
    let name = Name::from_ascii(format!("{}.", name.trim_end_matches('.')))
        .with_context(|| format!("`{name}` is no host name"))?;
    let id = fastrand::u16(..);
    let mut question = Message::new(id, MessageType::Query, OpCode::Query);
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(name, kind));
    let here: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((here, 0)).await?;
    // Connected: only its answers are received, and an error when nobody listens.
    socket.connect(server).await?;
    socket.send(&question.to_vec()?).await?;
    let mut answer = [0; MAX_ANSWER];
    let length = tokio::time::timeout(PATIENCE, socket.recv(&mut answer)).await.context("no answer")??;
    let answer = Message::from_vec(&answer[..length]).context("an answer that is no DNS")?;
    anyhow::ensure!(answer.metadata.id == id, "an answer to another question");
    Ok(answer.answers.iter().find_map(|record| match &record.data {
        RData::A(address) => Some(address.0.into()),
        RData::AAAA(address) => Some(address.0.into()),
        _ => None,
    }))
}
