//! The thread that takes packets out of the device, has them rewritten, and puts them back.

use std::io::{self, ErrorKind, PipeReader, PipeWriter};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use meshd_sys::tun::{Tun, VNET_HEADER};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::flows::{Flows, count};
use super::nat::Seconds;
use super::openers::Openers;

/// The largest packet there is, behind its header.
const FRAME: usize = VNET_HEADER + 65535;
/// Packets handled before looking whether to stop.
const BATCH: usize = 256;
/// Mappings are let go of in lots: idle, the thread wakes up at most so often.
const EXPIRY_PAUSE: Duration = Duration::from_secs(5);

/// The running thread. Dropped, it passes on what is in the device already, and takes the device away.
pub(super) struct Pump {
    /// Only ever closed: that is the signal.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Pump {
    pub(super) fn start(tun: Tun, flows: Arc<Flows>) -> io::Result<Pump> {
        let (stopped, stop) = io::pipe()?;
        let mut openers = Openers::open()?;
        let thread = std::thread::Builder::new().name("tun".to_owned()).spawn(move || {
            // The device goes with the thread, however it ends: then virtual IPs are refused, never a black hole.
            if let Err(error) = run(&tun, &stopped, &flows, &mut openers) {
                tracing::error!(%error, "lost the capture device; connections to virtual IPs are cut");
            }
        })?;
        Ok(Pump { stop: Some(stop), thread: Some(thread) })
    }

    pub(super) fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // Its panic has been logged by the hook.
            let _ = thread.join();
        }
    }
}

fn run(tun: &Tun, stopped: &PipeReader, flows: &Flows, openers: &mut Openers) -> io::Result<()> {
    let mut frame = vec![0; FRAME];
    let mut stopping = false;
    let mut looked = None;
    loop {
        let drained = drain(tun, flows, openers, &mut frame)?;
        if stopping {
            return Ok(());
        }
        let timeout = match drained.then(|| flows.now()) {
            None => PollTimeout::ZERO,
            // Flows may have come since, so it cannot sleep for as long as it would have then.
            now if now == looked => PollTimeout::try_from(EXPIRY_PAUSE).unwrap_or(PollTimeout::MAX),
            Some(now) => {
                looked = Some(now);
                until_expiry(flows, now)
            }
        };
        let mut fds = [PollFd::new(tun.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        // One more look at the device: what our closing sockets have said must still get through.
        stopping = fds[1].any().unwrap_or(true);
    }
}

/// Passes on what is there, up to a batch; true when nothing was left.
fn drain(tun: &Tun, flows: &Flows, openers: &mut Openers, frame: &mut [u8]) -> io::Result<bool> {
    let now = flows.now();
    for _ in 0..BATCH {
        let length = match tun.receive(frame) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if let Some(length) = flows.pass(&mut frame[..length], openers, now)
            && tun.send(&frame[..length]).is_err()
        {
            // TCP repeats what got lost; a device that is gone shows in the next read.
            count(&flows.counters.unwritten, 1);
        }
    }
    Ok(false)
}

fn until_expiry(flows: &Flows, now: Seconds) -> PollTimeout {
    flows.tell_unanswered(now);
    let Some(seconds) = flows.expire(now) else { return PollTimeout::NONE };
    let pause = Duration::from_secs(seconds.into()).max(EXPIRY_PAUSE);
    PollTimeout::try_from(pause).unwrap_or(PollTimeout::MAX)
}
