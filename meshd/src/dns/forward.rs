//! Questions that are not ours, passed on as the bytes they are (the id excepted) to the servers this host asks anyway.
//! Nothing is cached: that is the servers' business, and a cache that is not there cannot be poisoned.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout};

use super::upstream::Upstreams;
use super::{frame, read_message};

/// Questions waiting for servers, all together; further ones fail at once.
const MAX_WAITING: usize = 512;
/// Different packets with one question waiting at a time. A loop (a server of ours that asks us) is cut here.
const MAX_SAME_QUESTION: usize = 8;
const PER_SERVER: Duration = Duration::from_secs(2);
/// Less than the 5 s after which glibc gives up on us, so that it hears why.
const ALTOGETHER: Duration = Duration::from_millis(4500);
const MAX_MESSAGE: usize = u16::MAX as usize;
const HEADER: usize = 12;

/// How a question came, and how it is passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Over {
    Udp,
    Tcp,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// No server answered in time.
    Silent,
    /// Too many questions wait already.
    Limited,
}

pub(super) struct Forwarder {
    upstreams: Upstreams,
    waiting: Semaphore,
    flights: Flights,
    /// Which server answered last: it is asked first, so that a dead one costs time only once.
    preferred: AtomicUsize,
}

impl Forwarder {
    pub(super) fn new(upstreams: Upstreams) -> Forwarder {
        Forwarder {
            upstreams,
            waiting: Semaphore::new(MAX_WAITING),
            flights: Flights::default(),
            preferred: AtomicUsize::new(0),
        }
    }

    pub(super) fn has_servers(&self) -> bool {
        !self.servers().is_empty()
    }

    /// The answer to `packet`, whose question ends at `question_end`.
    pub(super) async fn forward(&self, packet: &[u8], question_end: usize, over: Over) -> Result<Vec<u8>, Failure> {
        let Ok(_slot) = self.waiting.try_acquire() else { return Err(Failure::Limited) };
        let answer = match self.flights.board(packet, question_end, over) {
            Boarding::First(flight) => {
                let answer = self.ask_each(packet, question_end, over).await.map(Arc::from);
                flight.land(answer.clone());
                answer
            }
            Boarding::Same(mut flight) => {
                // An error means that whoever asked first is gone, without an answer.
                flight.wait_for(Option::is_some).await.ok().and_then(|answer| answer.clone()).flatten()
            }
            Boarding::Full => return Err(Failure::Limited),
        };
        let mut answer = answer.ok_or(Failure::Silent)?.to_vec();
        answer[..2].copy_from_slice(&packet[..2]);
        Ok(answer)
    }

    fn servers(&self) -> Arc<[SocketAddr]> {
        self.upstreams.current(std::time::Instant::now())
    }

    /// The first good answer, or else the last bad one.
    async fn ask_each(&self, packet: &[u8], question_end: usize, over: Over) -> Option<Vec<u8>> {
        let servers = self.servers();
        let first = self.preferred.load(Ordering::Relaxed);
        let give_up = Instant::now() + ALTOGETHER;
        let mut excuse = None;
        for index in (0..servers.len()).map(|step| (first + step) % servers.len()) {
            let server = servers[index];
            let limit = PER_SERVER.min(give_up.saturating_duration_since(Instant::now()));
            match timeout(limit, ask(server, packet, question_end, over)).await {
                Ok(Ok(answer)) if is_useful(&answer) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Some(answer);
                }
                Ok(Ok(answer)) => excuse = Some(answer),
                Ok(Err(error)) => tracing::debug!(%server, %error, "DNS server not asked"),
                Err(_) => tracing::debug!(%server, "DNS server silent"),
            }
        }
        excuse
    }
}

/// With a random id from a port of its own (the kernel draws it), so that an answer is hard to forge.
async fn ask(server: SocketAddr, packet: &[u8], question_end: usize, over: Over) -> io::Result<Vec<u8>> {
    let mut query = packet.to_vec();
    aws_lc_rs::rand::fill(&mut query[..2]).map_err(|_| io::Error::other("no random numbers"))?;
    match over {
        Over::Udp => ask_udp(server, &query, question_end).await,
        Over::Tcp => ask_tcp(server, &query, question_end).await,
    }
}

async fn ask_udp(server: SocketAddr, query: &[u8], question_end: usize) -> io::Result<Vec<u8>> {
    let any = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    // Connected, the socket hears nobody else.
    socket.connect(server).await?;
    socket.send(query).await?;
    loop {
        socket.readable().await?;
        // Only now, so that waiting costs no memory.
        let mut answer = vec![0; MAX_MESSAGE];
        match socket.try_recv(&mut answer) {
            Ok(length) => answer.truncate(length),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        // What does not match may be forged; the true answer may still come.
        if answers(query, question_end, &answer) {
            return Ok(answer);
        }
    }
}

async fn ask_tcp(server: SocketAddr, query: &[u8], question_end: usize) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&frame(query)?).await?;
    let mut answer = vec![0; MAX_MESSAGE];
    let length = read_message(&mut stream, &mut answer).await?;
    answer.truncate(length);
    if answers(query, question_end, &answer) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Whether `response` is one to `query`: id and question are the same. Servers keep the case, or do not.
fn answers(query: &[u8], question_end: usize, response: &[u8]) -> bool {
    let Some(question) = response.get(HEADER..question_end) else { return is_bare_failure(query, response) };
    let (name, kind) = query[HEADER..question_end].split_at(question_end - HEADER - 4);
    let same = question[..name.len()].eq_ignore_ascii_case(name) && question[name.len()..] == *kind;
    let one_question = response[4..6] == [0, 1];
    is_response_to(query, response) && one_question && same || is_bare_failure(query, response)
}

/// Some servers do not repeat the question when they cannot make sense of it.
fn is_bare_failure(query: &[u8], response: &[u8]) -> bool {
    response.len() == HEADER && is_response_to(query, response) && response[4..] == [0; 8] && code(response) != 0
}

fn is_response_to(query: &[u8], response: &[u8]) -> bool {
    response[..2] == query[..2] && response[2] & 0x80 != 0 && response[2] & 0x78 == query[2] & 0x78
}

fn code(response: &[u8]) -> u8 {
    response[3] & 0x0f
}

/// As glibc does: after SERVFAIL, NOTIMP and REFUSED the next server is asked.
fn is_useful(response: &[u8]) -> bool {
    !matches!(code(response), 2 | 4 | 5)
}

/// What an answer in flight turns into: None until it is there, Some(None) if there is none.
type Landing = Option<Option<Arc<[u8]>>>;

/// Questions waiting for an answer. The same packet is asked once, however many ask it: a loop then waits for itself
/// instead of multiplying, and many identical questions cannot be used to make forging one answer easier.
#[derive(Default)]
struct Flights(Mutex<HashMap<Box<[u8]>, Vec<Packet>>>);

struct Packet {
    key: Box<[u8]>,
    landing: watch::Receiver<Landing>,
}

enum Boarding<'a> {
    First(Flight<'a>),
    Same(watch::Receiver<Landing>),
    Full,
}

/// Ends when dropped, whatever happened.
struct Flight<'a> {
    flights: &'a Flights,
    question: Box<[u8]>,
    key: Box<[u8]>,
    landing: watch::Sender<Landing>,
}

impl Flights {
    fn board(&self, packet: &[u8], question_end: usize, over: Over) -> Boarding<'_> {
        let question: Box<[u8]> = packet[HEADER..question_end].to_ascii_lowercase().into();
        let key: Box<[u8]> = [&[over as u8], &packet[2..]].concat().into();
        let mut all = self.lock();
        let same = all.entry(question.clone()).or_default();
        if let Some(packet) = same.iter().find(|packet| packet.key == key) {
            return Boarding::Same(packet.landing.clone());
        }
        if same.len() >= MAX_SAME_QUESTION {
            return Boarding::Full;
        }
        let (landing, receiver) = watch::channel(None);
        same.push(Packet { key: key.clone(), landing: receiver });
        Boarding::First(Flight { flights: self, question, key, landing })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Box<[u8]>, Vec<Packet>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flight<'_> {
    fn land(self, answer: Option<Arc<[u8]>>) {
        self.landing.send_replace(Some(answer));
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if let Entry::Occupied(mut same) = self.flights.lock().entry(std::mem::take(&mut self.question)) {
            same.get_mut().retain(|packet| packet.key != self.key);
            if same.get().is_empty() {
                same.remove();
            }
        }
    }
}

#[cfg(test)]
#[path = "forward_tests.rs"]
mod tests;
