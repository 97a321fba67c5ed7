//! Clients that write and close at once: nobody owns their sockets any more when meshd looks, which every backend makes
//! up for in its own way. Whatever backend the run is for, web uses the one of the test here.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd_tests::backend;
use meshd_tests::lab::Lab;
use meshd_tests::load::{LoadReport, report};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{self, Plan};
use meshd_tests::process::Program;
use meshd_tests::wait::{until, until_some};
use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

use crate::identify::connect_from;
use crate::raw::{STABLE, STABLE6, ask_for_raw};
use crate::tun::virtual_ips;
use crate::{DEADLINE, refused};

const PORT: u16 = 18888;

/// A mesh whose payments only listens.
struct Hasty {
    mesh: Mesh,
    payments: TcpListener,
    target: SocketAddr,
    /// Whether packets pass through meshd itself.
    through_meshd: bool,
}

impl Hasty {
    fn start(backend: &str) -> Result<Self> {
        Self::start_with(backend, |_| Ok(()))
    }

    fn start_with(backend: &str, prepare: impl FnOnce(&Mesh) -> Result<()>) -> Result<Self> {
        let mut plan = Plan::shop_with_one_server();
        for workload in plan.hosts.iter_mut().flat_map(|host| &mut host.workloads).filter(|it| it.name == "payments") {
            workload.app = None;
        }
        let lab = Arc::new(Lab::new(&plan.host_names())?);
        let mut mesh = Mesh::prepare(lab, plan)?;
        mesh.daemon("web").use_backend(backend)?;
        // A unit that runs already: rules of iptables know a new one half a second later.
        mesh.host("web").run(&mesh.in_unit("web", "checkout", Program::new("true")))?.expect_success("true")?;
        prepare(&mesh)?;
        if backend != "tun" {
            ask_for_raw(&mesh, &["api-1"])?;
        }
        mesh.start_pki()?;
        mesh.join_all()?;
        mesh.start_all()?;
        let payments = mesh.host("api-1").within(listen)??;
        payments.set_nonblocking(true)?;
        let target = (mesh.virtual_address("web", "payments.shop.mesh")?, 80).into();
        Ok(Self { mesh, payments, target, through_meshd: backend == "tun" })
    }

    /// Connects, writes and closes as checkout.
    fn leave(&self, more: &[&str]) -> Result<()> {
        let target = self.target.to_string();
        let leave = self.mesh.testkit("web", "checkout", &[&["leave", "--target", &target], more].concat());
        let left: LoadReport = report(&self.mesh.host("web").run(&leave)?)?;
        ensure!(left.failed == 0, "{left:?}");
        Ok(())
    }

    /// `work` while meshd stands still: whatever it does is over when meshd looks. With TUN nobody could connect then.
    fn unseen<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.through_meshd {
            return work();
        }
        let daemon = self.mesh.daemon("web");
        daemon.stand_still()?;
        let done = work();
        daemon.signal(Signal::SIGCONT)?;
        done
    }

    /// How many have arrived whole at payments since the last time.
    fn heard(&self) -> Result<u32> {
        let mut heard = 0;
        loop {
            let mut client = match self.payments.accept() {
                Ok((client, _)) => client,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(heard),
                Err(error) => return Err(error.into()),
            };
            client.set_nonblocking(false)?;
            client.set_read_timeout(Some(DEADLINE))?;
            let mut said = String::new();
            client.read_to_string(&mut said)?;
            ensure!(said == "bye\n", "not what the client wrote: {said:?}");
            heard += 1;
        }
    }

    fn ensure_heard(&self, goal: u32) -> Result<()> {
        let mut heard = 0;
        let arrived = || {
            heard += self.heard().unwrap_or(u32::MAX / 2);
            heard >= goal
        };
        let waited = until(DEADLINE, &format!("{goal} clients heard"), arrived);
        waited.with_context(|| format!("{heard} were"))?;
        ensure!(heard == goal, "{heard} instead of {goal}");
        Ok(())
    }

    /// In the `round`-th round.
    fn ensure_all_heard(&self, round: usize) -> Result<()> {
        const CALLS: u32 = 200;
        self.leave(&["--connections", &CALLS.to_string()])?;
        self.ensure_heard(CALLS)?;
        self.unseen(|| self.leave(&["--connections", &CALLS.to_string()]))?;
        self.ensure_heard(CALLS)?;
        let unknown = self.mesh.daemon("web").metrics()?.sum("meshd_identify_unknown_total", &[]);
        ensure!(unknown < 1.0 && self.all_refused()? < 1.0, "{unknown} unknown, {} refused", self.all_refused()?);
        let checkout = self.mesh.spiffe_id("checkout");
        let arrived = || self.mesh.daemon("api-1").access_log();
        let as_checkout = || arrived().iter().filter(|event| event.client_id.as_deref() == Some(&checkout)).count();
        until(DEADLINE, "every one of them in the access log, as checkout", || {
            as_checkout() == 2 * round * CALLS as usize
        })
    }

    fn all_refused(&self) -> Result<f64> {
        Ok(self.mesh.daemon("web").metrics()?.sum("meshd_refused_total", &[]))
    }
}

/// With room for all who come while a test looks elsewhere.
fn listen() -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 8080)).into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// At virtual IPs and, where they are captured, raw addresses; over both address families.
fn are_heard(backend: &str) -> Result<()> {
    all_are_heard(Hasty::start(backend)?)
}

fn all_are_heard(mut hasty: Hasty) -> Result<()> {
    let mut targets = virtual_ips(&hasty.mesh)?.to_vec();
    if !hasty.through_meshd {
        targets.extend([(STABLE.parse::<IpAddr>()?, 80).into(), SocketAddr::from((STABLE6.parse::<IpAddr>()?, 80))]);
    }
    for (round, target) in targets.into_iter().enumerate() {
        hasty.target = target;
        hasty.ensure_all_heard(round + 1).with_context(|| format!("to {target}"))?;
    }
    Ok(())
}

#[test]
fn a_client_that_writes_and_closes_at_once_is_heard_by_nft_tproxy() -> Result<()> {
    are_heard("nft-tproxy")
}

#[test]
fn a_client_that_writes_and_closes_at_once_is_heard_by_nft_redirect() -> Result<()> {
    are_heard("nft-redirect")
}

#[test]
fn a_client_that_writes_and_closes_at_once_is_heard_by_iptables_nft() -> Result<()> {
    are_heard("iptables-nft")
}

#[test]
fn a_client_known_by_its_user_that_writes_and_closes_at_once_is_heard_by_iptables() -> Result<()> {
    let by_user = |mesh: &Mesh| {
        let web = Plan::shop_with_one_server().hosts.into_iter().find(|host| host.name == "web").context("no web")?;
        mesh.daemon("web").enrol(&plan::enrolment(&web.workloads, false))
    };
    all_are_heard(Hasty::start_with(&backend::some_iptables(), by_user)?)
}

#[test]
fn a_client_that_writes_and_closes_at_once_is_heard_by_tun() -> Result<()> {
    are_heard("tun")
}

/// The second caller is in a cgroup above those meshd knows, with another user: it must not pass for the first.
fn is_not_taken_for_the_one_before(backend: &str) -> Result<()> {
    let hasty = Hasty::start(backend)?;
    let from = SocketAddr::from(([0, 0, 0, 0], PORT));
    hasty.leave(&["--from", &from.to_string()])?;
    hasty.ensure_heard(1)?;
    let web = hasty.mesh.host("web");
    hasty.unseen(|| {
        // The kernel gives the tuple away again when a second has passed.
        let again = || match connect_from(from, hasty.target) {
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable => None,
            tried => Some(tried),
        };
        let second = || until_some(Duration::from_secs(5), "a second connection of the same tuple", again);
        let bye = || match second()?.and_then(|mut second| second.write_all(b"bye\n")) {
            // Where meshd does not stand still it may have refused already.
            Err(error) if hasty.through_meshd && error.kind() == ErrorKind::ConnectionReset => Ok(()),
            said => said.context("saying bye"),
        };
        web.within(bye)?
    })?;
    until(DEADLINE, "it refused", || hasty.all_refused().is_ok_and(|count| count >= 1.0))?;
    ensure!(refused(&hasty.mesh, "web", "identify_unknown")? + refused(&hasty.mesh, "web", "unenrolled")? == 1.0);
    // What comes after it is served: it was not merely late.
    hasty.leave(&[])?;
    hasty.ensure_heard(1)
}

#[test]
fn who_uses_a_tuple_again_is_not_taken_for_the_one_before_by_nft_tproxy() -> Result<()> {
    is_not_taken_for_the_one_before("nft-tproxy")
}

#[test]
fn who_uses_a_tuple_again_is_not_taken_for_the_one_before_by_nft_redirect() -> Result<()> {
    is_not_taken_for_the_one_before("nft-redirect")
}

#[test]
fn who_uses_a_tuple_again_is_not_taken_for_the_one_before_by_iptables_nft() -> Result<()> {
    is_not_taken_for_the_one_before("iptables-nft")
}

#[test]
fn who_uses_a_tuple_again_is_not_taken_for_the_one_before_by_tun() -> Result<()> {
    is_not_taken_for_the_one_before("tun")
}
