//! A dead man's switch in the kernel: rules that match only as long as this process has said within the last two
//! seconds that it is alive. It says so by a datagram to itself, which a rule notes (xt_recent) and drops. A daemon
//! that was killed says nothing any more, and no program has to run for what follows.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use meshd_sys::sockets::{Mark, marked_datagrams};

use super::super::tool::CaptureError;
use super::super::wanted::Wanted;
use super::own_sockets;
use super::variant::Family;

/// What a restart by systemd takes, and eight turns of `EVERY`: a busy host must not let captured callers go direct.
const SECONDS: u32 = 2;
const EVERY: Duration = Duration::from_millis(250);

/// All packets are one entry of the list, whatever their addresses.
fn list(family: Family) -> &'static str {
    match family {
        Family::V4 => "-m recent --name MESHD_ALIVE4 --mask 0.0.0.0",
        Family::V6 => "-m recent --name MESHD_ALIVE6 --mask ::",
    }
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    }
}

/// Matches when the daemon is gone.
pub(super) fn unless_alive(family: Family) -> String {
    format!("{} ! --rcheck --seconds {SECONDS}", list(family))
}

/// For mangle's OUTPUT: notes what the daemon says.
pub(super) fn rule(family: Family, wanted: &Wanted) -> String {
    let (to, port) = (loopback(family), wanted.capture_port);
    format!("-o lo -d {to} -p udp --dport {port} {} {} --set -j DROP", own_sockets(wanted), list(family))
}

/// Says it, until dropped.
pub(super) struct Alive {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Alive {
    /// Says it once before it returns.
    pub(super) fn start(wanted: &Wanted) -> Result<Alive, CaptureError> {
        let failed = |source| CaptureError::State { what: "cannot tell the kernel that meshd is alive".into(), source };
        let mut sockets = Vec::new();
        for family in Family::present() {
            let to = SocketAddr::new(loopback(family), wanted.capture_port);
            match marked_datagrams(to, Mark(wanted.mark)) {
                Ok(socket) => sockets.push(socket),
                Err(error) if family == Family::V6 => {
                    tracing::warn!(%error, "raw IPv6 addresses are not captured: this host has no ::1");
                }
                Err(error) => return Err(failed(error)),
            }
        }
        let say = move || {
            // Refused (EPERM) is what the rule does with it; without the rule nobody listens there.
            sockets.iter().for_each(|socket| drop(socket.send(&[])));
        };
        say();
        let (stop, stopped) = channel::<()>();
        let thread = std::thread::Builder::new().name("alive".into()).spawn(move || {
            while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                say();
            }
        });
        Ok(Alive { stop: Some(stop), thread: Some(thread.map_err(failed)?) })
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It has nothing to say of a panic that the hook has not said.
            let _ = thread.join();
        }
    }
}
