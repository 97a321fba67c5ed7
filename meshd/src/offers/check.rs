//! Asks applications whether they are well, as enrol.d says.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use meshd_sys::sockets::{self, Mark};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::exec;
use crate::enrol::{Ask, Check, Delivery, Enrolment};

/// Who answers slower does not serve well either.
const DEADLINE: Duration = Duration::from_secs(2);
/// One answer may get lost in a garbage collection; a second one tells.
const FAILURES: u32 = 2;

type Question = (SocketAddr, Check);

pub(super) struct Checks {
    mark: Mark,
    states: BTreeMap<Question, State>,
    asking: JoinSet<(Question, Result<(), String>)>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct State {
    /// None: it has not answered yet, so nobody should be sent there.
    is_well: Option<bool>,
    failures: u32,
    due: Option<Instant>,
    is_asked: bool,
    /// Of the last failure.
    why: String,
}

impl State {
    /// Whether that changed how it is.
    fn took(&mut self, answer: Result<(), String>) -> bool {
        let (before, passed) = (self.is_well, answer.is_ok());
        self.why = answer.err().unwrap_or_default();
        self.is_asked = false;
        self.failures = if passed { 0 } else { self.failures.saturating_add(1) };
        if passed || self.failures >= FAILURES {
            self.is_well = Some(passed);
        }
        self.is_well != before
    }

    fn is_due(&self, now: Instant) -> bool {
        !self.is_asked && self.due.is_none_or(|due| due <= now)
    }
}

fn question(delivery: &Delivery) -> Option<Question> {
    let check = delivery.published.as_ref()?.check.clone()?;
    Some((delivery.deliver, check))
}

impl Checks {
    pub(super) fn new(mark: Mark) -> Checks {
        Checks { mark, states: BTreeMap::new(), asking: JoinSet::new() }
    }

    /// Notes what was answered and asks what is due; waits for nobody.
    pub(super) fn turn(&mut self, enrolment: &Enrolment, now: Instant) {
        while let Some(answered) = self.asking.try_join_next() {
            let Ok((question, result)) = answered else { continue };
            let Some(state) = self.states.get_mut(&question) else { continue };
            if state.took(result) {
                let (address, why) = (question.0, &state.why);
                tracing::info!(%address, is_well = state.is_well == Some(true), why, "a check has another outcome");
            }
        }
        let wanted: Vec<Question> = enrolment.deliveries().iter().filter_map(|one| question(one)).collect();
        self.states.retain(|question, _| wanted.contains(question));
        for question in wanted {
            let state = self.states.entry(question.clone()).or_default();
            if state.is_due(now) {
                (state.is_asked, state.due) = (true, Some(now + question.1.every));
                let mark = self.mark;
                self.asking.spawn(async move {
                    let answer = ask(mark, &question).await;
                    (question, answer)
                });
            }
        }
    }

    /// Why not.
    pub(super) fn passes(&self, delivery: &Delivery) -> Result<(), String> {
        let Some(question) = question(delivery) else { return Ok(()) };
        match self.states.get(&question) {
            Some(state) if state.is_well == Some(true) => Ok(()),
            Some(state) if !state.why.is_empty() => Err(format!("its check fails: {}", state.why)),
            _ => Err("its check has not passed yet".to_owned()),
        }
    }
}

async fn ask(mark: Mark, question: &Question) -> Result<(), String> {
    let (address, check) = question;
    if let Ask::Exec(program) = &check.ask {
        let (program, address) = (program.clone(), *address);
        let variables = [("MESHD_ADDRESS", address.ip().to_string()), ("MESHD_PORT", address.port().to_string())];
        let run = tokio::task::spawn_blocking(move || exec::run(&program, &variables)).await;
        return run.unwrap_or_else(|error| Err(error.to_string()));
    }
    let late = |_| Err(format!("no answer within {} s", DEADLINE.as_secs()));
    timeout(DEADLINE, ask_there(mark, *address, &check.ask)).await.unwrap_or_else(late)
}

async fn ask_there(mark: Mark, address: SocketAddr, ask: &Ask) -> Result<(), String> {
    // Marked, or a strict port would take it for a caller in clear.
    let socket = sockets::marked(address, mark).map_err(|error| error.to_string())?;
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(address);
    let stream = connecting.await.map_err(|error| format!("no connection: {error}"))?;
    match ask {
        Ask::Http(path) => get(stream, address, path).await,
        Ask::Tcp | Ask::Exec(_) => Ok(()),
    }
}

async fn get(mut stream: TcpStream, address: SocketAddr, path: &str) -> Result<(), String> {
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: meshd-check\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
    // `HTTP/1.1 200`
    let mut line = [0; 12];
    stream.read_exact(&mut line).await.map_err(|error| format!("no HTTP answer: {error}"))?;
    judge(&line)
}

fn judge(line: &[u8; 12]) -> Result<(), String> {
    let line = String::from_utf8_lossy(line);
    match line.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..)) {
        Some(status) if status.starts_with(['2', '3']) => Ok(()),
        Some(status) => Err(format!("HTTP status {status}")),
        None => Err("no HTTP answer".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_application_is_well_once_it_said_so_and_ill_after_two_failures_in_a_row() {
        let mut state = State::default();
        let answer = |passes: bool| if passes { Ok(()) } else { Err("no".to_owned()) };
        assert!(!state.took(answer(false)) && state.is_well.is_none());
        assert!(state.took(answer(true)) && state.is_well == Some(true));
        assert!(!state.took(answer(false)) && state.is_well == Some(true));
        assert!(!state.took(answer(true)) && !state.took(answer(false)));
        assert!(state.took(answer(false)) && state.is_well == Some(false));
        assert!(state.took(answer(true)) && state.is_well == Some(true));
    }

    #[test]
    fn a_check_is_asked_once_at_a_time_and_then_when_it_is_due() {
        let now = Instant::now();
        let mut state = State::default();
        assert!(state.is_due(now));
        (state.is_asked, state.due) = (true, Some(now + Duration::from_secs(5)));
        assert!(!state.is_due(now + Duration::from_secs(9)));
        state.took(Ok(()));
        assert!(!state.is_due(now) && state.is_due(now + Duration::from_secs(5)));
    }

    #[test]
    fn statuses_of_success_and_redirection_pass() {
        assert!(judge(b"HTTP/1.1 200").is_ok() && judge(b"HTTP/1.0 302").is_ok());
        assert_eq!(judge(b"HTTP/1.1 503"), Err("HTTP status 503".to_owned()));
        assert!(judge(b"220 smtp.sho").is_err());
    }
}
