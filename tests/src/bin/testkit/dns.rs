//! A DNS server that knows a few names, and a client of any.

use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;

use anyhow::{Context, Result, anyhow};
use meshd_tests::dns::{self, framed};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::spawn_local;

#[derive(clap::Args)]
pub(crate) struct Server {
    #[arg(long)]
    listen: SocketAddr,
    /// A name and its address; any other name does not exist
    #[arg(long = "name", value_name = "NAME=ADDRESS", value_parser = name)]
    names: Vec<(String, Ipv4Addr)>,
}

#[derive(clap::Args)]
pub(crate) struct Lookup {
    #[arg(long)]
    server: SocketAddr,
    #[arg(long)]
    tcp: bool,
    name: String,
}

fn name(text: &str) -> Result<(String, Ipv4Addr)> {
    let (name, address) = text.split_once('=').context("not of the form NAME=ADDRESS")?;
    Ok((name.to_owned(), address.parse()?))
}

/// Prints who asked for what.
pub(crate) async fn serve(Server { listen, names }: Server) -> Result<()> {
    let bound = |error| anyhow!("cannot listen on {listen}: {error}");
    let (udp, tcp) = (UdpSocket::bind(listen).await.map_err(bound)?, TcpListener::bind(listen).await.map_err(bound)?);
    let names = Rc::new(names);
    println!("ready");
    spawn_local(serve_tcp(tcp, names.clone()));
    let mut packet = [0; 4096];
    loop {
        let (length, peer) = udp.recv_from(&mut packet).await?;
        if let Some((name, answer)) = dns::serve(&packet[..length], &names) {
            println!("udp {} {name}", peer.ip());
            udp.send_to(&answer, peer).await?;
        }
    }
}

async fn serve_tcp(listener: TcpListener, names: Rc<Vec<(String, Ipv4Addr)>>) -> Result<()> {
    loop {
        let (stream, peer) = listener.accept().await?;
        spawn_local(serve_connection(stream, peer, names.clone()));
    }
}

async fn serve_connection(mut stream: TcpStream, peer: SocketAddr, names: Rc<Vec<(String, Ipv4Addr)>>) -> Result<()> {
    loop {
        let mut packet = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut packet).await?;
        let (name, answer) = dns::serve(&packet, &names).context("not a question")?;
        println!("tcp {} {name}", peer.ip());
        stream.write_all(&framed(&answer)).await?;
    }
}

/// Prints the response code, and the address if there is one.
pub(crate) fn lookup(Lookup { server, tcp, name }: &Lookup) -> Result<()> {
    let answer = if *tcp { dns::ask_tcp(*server, name)? } else { dns::ask_udp(*server, name)? };
    let address = answer.address.map(|address| format!(" {address}")).unwrap_or_default();
    println!("{}{address}", answer.code);
    Ok(())
}
