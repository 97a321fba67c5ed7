//! A way to a member of etcd on which answers get lost.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::thread::spawn;

/// Larger than any question, smaller than any change.
const CHANGE: usize = 600;

#[derive(Default)]
struct State {
    /// The answer to the next change is to be lost.
    wanted: AtomicBool,
    /// That change has been sent.
    sent: AtomicBool,
    lost: AtomicU32,
}

pub(crate) struct Way {
    address: SocketAddr,
    state: Arc<State>,
}

impl Way {
    pub(crate) fn to(endpoint: &str) -> Way {
        let member = endpoint.strip_prefix("https://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, state) = (listener.local_addr().unwrap(), Arc::<State>::default());
        let way = Way { address, state: state.clone() };
        // Ends with the program: nobody dials it when the test is over.
        spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(&member) else { continue };
                let pipe = |from: &TcpStream, to: &TcpStream| (from.try_clone().unwrap(), to.try_clone().unwrap());
                let (asks, answers) = (pipe(&client, &server), pipe(&server, &client));
                let (asked, answered) = (state.clone(), state.clone());
                spawn(move || asked.ask(asks.0, asks.1));
                spawn(move || answered.answer(answers.0, answers.1));
            }
        });
        way
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("https://{}", self.address)
    }

    pub(crate) fn lose_the_next_answer(&self) {
        self.state.wanted.store(true, SeqCst);
    }

    pub(crate) fn lost(&self) -> u32 {
        self.state.lost.load(SeqCst)
    }
}

impl State {
    fn ask(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = [0; 65_536];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            if count > CHANGE && self.wanted.swap(false, SeqCst) {
                self.sent.store(true, SeqCst);
            }
            if to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        end(&from, &to);
    }

    fn answer(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = [0; 65_536];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            if self.sent.swap(false, SeqCst) {
                self.lost.fetch_add(1, SeqCst);
                break;
            }
            if to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        end(&from, &to);
    }
}

fn end(one: &TcpStream, other: &TcpStream) {
    // Whoever was faster has ended them.
    _ = one.shutdown(Shutdown::Both);
    _ = other.shutdown(Shutdown::Both);
}
