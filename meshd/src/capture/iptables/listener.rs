//! Listens to what rules tell (NFLOG). A thread of its own, since the kernel keeps only so many messages; whoever asks
//! what was heard first hears all that was told before.

use std::io::{self, PipeWriter, pipe};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use meshd_sys::nflog::NfLog;
use meshd_sys::sock_diag::{Lookup, SocketDiag};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::super::owner::RecordedOwner;
use super::super::tool::CaptureError;
use super::GROUP;
use super::heard::{Heard, Opening};

/// The longest IPv4 header and both ports.
const COPIED: u32 = 64;

/// What was heard, shared by those who ask.
pub struct Hearing {
    log: NfLog,
    state: Mutex<State>,
}

struct State {
    heard: Heard,
    diag: SocketDiag,
}

impl Hearing {
    fn open() -> io::Result<Hearing> {
        let state = State { heard: Heard::default(), diag: SocketDiag::open()? };
        Ok(Hearing { log: NfLog::bind(GROUP, COPIED)?, state: Mutex::new(state) })
    }

    /// All that was told before this call has been heard.
    fn caught_up(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { heard, diag } = &mut *state;
        let drained = self.log.drain(|logged| heard.hear(logged, Instant::now(), |opening| owner_now(diag, opening)));
        match drained {
            Ok(false) => {}
            Ok(true) => heard.missed(),
            Err(error) => {
                tracing::warn!(%error, "the kernel does not tell any more what rules log");
                heard.missed();
            }
        }
        state
    }

    /// Whose the connection was when it was opened.
    pub(in super::super) fn owner(&self, client: SocketAddr, original: SocketAddr) -> Option<RecordedOwner> {
        self.caught_up().heard.owner(Opening { client, original }, Instant::now())
    }

    pub(super) fn with<T>(&self, ask: impl FnOnce(&mut Heard) -> T) -> T {
        ask(&mut self.caught_up().heard)
    }
}

fn owner_now(diag: &mut SocketDiag, opening: Opening) -> Option<RecordedOwner> {
    match diag.owner(opening.client, opening.original) {
        Ok(Lookup::Owned(owner)) => Some(RecordedOwner { uid: owner.uid, cgroup: owner.cgroup }),
        // It has closed already, or the kernel does not answer: nobody is known.
        Ok(_) | Err(_) => None,
    }
}

impl std::fmt::Debug for Hearing {
    fn fmt(&self, text: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(text, "NFLOG group {GROUP}")
    }
}

/// Listens until dropped.
pub(super) struct Listener {
    pub hearing: Arc<Hearing>,
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    pub(super) fn start() -> Result<Listener, CaptureError> {
        let failed = |source| CaptureError::State {
            what: format!("cannot listen to what rules log (NFLOG group {GROUP}; another program may)"),
            source,
        };
        let hearing = Arc::new(Hearing::open().map_err(failed)?);
        let (stopped, stop) = pipe().map_err(failed)?;
        let shared = hearing.clone();
        let listen = move || {
            loop {
                let mut watched = [&shared.log.as_fd(), &stopped.as_fd()].map(|fd| PollFd::new(*fd, PollFlags::POLLIN));
                // Interrupted: looks again.
                let _ = poll(&mut watched, PollTimeout::NONE);
                if watched[1].any().unwrap_or(true) {
                    return;
                }
                drop(shared.caught_up());
            }
        };
        let thread = std::thread::Builder::new().name("nflog".into()).spawn(listen).map_err(failed)?;
        Ok(Listener { hearing, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It has nothing to say of a panic that the hook has not said.
            let _ = thread.join();
        }
    }
}
