//! Programs for labs: servers that name themselves, and clients that load, hold, stall and talk.
//! One thread, few allocations: in a benchmark they must cost little beside the proxies.

mod bulk;
mod client;
mod dns;
mod hold;
mod http2;
mod leave;
mod lines;
mod load;
mod pace;
mod peer;
mod serve;
mod talk;

use std::cell::Cell;
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::Result;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

#[derive(Parser)]
#[command(about)]
enum Verb {
    /// HTTP server, of 1.1 and of 2 by prior knowledge: `/bytes/N` answers N bytes, any other path its name
    EchoHttp(serve::Listen),
    /// Server that speaks first, echoes lines, and answers a half-close with a last line
    Greeter(serve::Listen),
    /// HTTP/1.1 server that answers with the caller's address; with what a PROXY header says, if told to expect one
    WhoCalls(peer::Args),
    /// Requests by HTTP/1.1, HTTP/2 or lines that are echoed: closed loop, one connection per request, or at a fixed rate;
    /// ends with one JSON line
    Load(load::Args),
    /// Downloads as fast as it goes; ends with one JSON line
    Bulk(bulk::Args),
    /// Connections with one exchanged byte each, held until SIGTERM
    Idle(hold::Args),
    /// Connections that ask for a large body and never read it, held until SIGTERM
    Stall(hold::Args),
    /// Connects, writes and closes at once, one connection after the other; ends with one JSON line
    Leave(leave::Args),
    /// Reads a greeting, says a line, half-closes, prints all it was told
    Talk(talk::Args),
    /// DNS server that knows the names it is given
    Dns(dns::Server),
    /// Asks a DNS server for an address, prints the response code and the address
    Lookup(dns::Lookup),
}

fn main() -> ExitCode {
    let verb = Verb::parse();
    match start(verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("testkit: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(verb: Verb) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, run(verb))
}

async fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::EchoHttp(listen) => serve::echo_http(listen).await,
        Verb::Greeter(listen) => serve::greeter(listen).await,
        Verb::WhoCalls(args) => peer::run(args).await,
        Verb::Load(args) => load::run(args, Stop::on_sigterm()?).await,
        Verb::Bulk(args) => bulk::run(args).await,
        Verb::Idle(args) => hold::idle(args, Stop::on_sigterm()?).await,
        Verb::Stall(args) => hold::stall(args, Stop::on_sigterm()?).await,
        Verb::Leave(args) => leave::run(args).await,
        Verb::Talk(args) => talk::run(args).await,
        Verb::Dns(args) => dns::serve(args).await,
        Verb::Lookup(args) => dns::lookup(&args),
    }
}

/// Raised once, by SIGTERM or by the program itself.
#[derive(Default)]
struct Stop {
    raised: Cell<bool>,
    notify: Notify,
}

impl Stop {
    fn on_sigterm() -> Result<Rc<Self>> {
        let stop = Rc::new(Self::default());
        let mut terminate = signal(SignalKind::terminate())?;
        let raised = stop.clone();
        tokio::task::spawn_local(async move {
            terminate.recv().await;
            raised.raise();
        });
        Ok(stop)
    }

    fn raise(&self) {
        self.raised.set(true);
        self.notify.notify_waiters();
    }

    fn is_raised(&self) -> bool {
        self.raised.get()
    }

    async fn raised(&self) {
        while !self.is_raised() {
            self.notify.notified().await;
        }
    }
}
