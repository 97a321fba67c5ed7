//! Asks a Workload API for identities: with the `spiffe` crate as programs do, and by hand as programs should not.

mod by_hand;
mod by_others;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Cli {
    #[arg(long)]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The default identity, its chain and its bundle, as JSON.
    Fetch,
    /// A line per X.509 context, then one with the error that ended it.
    Watch,
    /// A token for an audience, verified by the API itself.
    Token {
        #[arg(long)]
        audience: String,
    },
    /// What the API says of a token.
    Judge {
        #[arg(long)]
        audience: String,
        token: String,
    },
    /// The code and message of one call, and nothing of the answer.
    Call {
        method: by_hand::Method,
        #[arg(long)]
        no_header: bool,
    },
    /// Holds as many streams open as it is given; says how many, then waits.
    Hold {
        #[arg(long)]
        streams: usize,
    },
    /// Connects, then becomes another program with the connection as its standard input.
    Become { program: Vec<String> },
    /// Connects, starts another program with the connection as its standard input, and ends.
    Leave { program: Vec<String> },
    /// `call fetch-x509-svid` on the connection that is standard input, when the parent process has ended (0: at once).
    Resume {
        #[arg(long, default_value_t = 0)]
        parent: u32,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let Cli { socket, command } = Cli::parse();
    match command {
        Command::Fetch => by_others::fetch(&socket).await,
        Command::Watch => by_others::watch(&socket).await,
        Command::Token { audience } => by_others::token(&socket, &audience).await,
        Command::Judge { audience, token } => by_others::judge(&socket, &audience, &token).await,
        Command::Call { method, no_header } => by_hand::call(&socket, method, !no_header).await,
        Command::Hold { streams } => by_hand::hold(&socket, streams).await,
        Command::Become { program } => by_hand::become_program(&socket, &program),
        Command::Leave { program } => by_hand::leave(&socket, &program),
        Command::Resume { parent } => by_hand::resume(parent).await,
    }
}
