//! Local application to mesh: the whole story of a connection, one step per line.

use std::net::{SocketAddr, TcpStream as StdStream};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;

use super::connect::{Connected, Connector, Upstream};
use super::detect::Served;
use super::identify::Unidentified;
use super::report::Report;
use super::resolve::Place;
use super::serve::Watch;
use super::worker::Env;
use super::{connect, detect, probe, resolve, serve};
use crate::enrol::Workload;
use crate::fault::Fault;
use crate::telemetry::Direction;

/// A connection known to be allowed out, on its way to the worker that will carry it.
pub(super) struct Admitted {
    socket: StdStream,
    pub(super) who: Arc<Workload>,
    pub(super) place: Place,
    pub(super) report: Report,
}

/// The steps that need no waiting, right after accept: identify, resolve.
pub(super) fn admit(env: &Env, socket: StdStream, client: SocketAddr) -> Option<Admitted> {
    let mut report = Report::opened(&env.shared.telemetry, env.worker, Direction::Outbound, client);
    match identify_and_resolve(env, &socket, client, &mut report) {
        Ok((who, place)) => Some(Admitted { socket, who, place, report }),
        Err(fault) => {
            refuse(&socket);
            report.finish(Err(fault));
            None
        }
    }
}

fn identify_and_resolve(
    env: &Env,
    socket: &StdStream,
    client: SocketAddr,
    report: &mut Report,
) -> Result<(Arc<Workload>, Place), Fault> {
    let original = socket.local_addr().map_err(|_| Fault::AppReset)?;
    // TPROXY keeps the dialled address; our own address means somebody dialled the capture port itself.
    if env.is_capture_listener(original) {
        return Err(Fault::Loop);
    }
    let who = env
        .identifier
        .local(&env.shared.enrolment.load(), client, original)
        .map_err(|unidentified| explain(env, &unidentified, original, report))?;
    report.unit(Some(who.unit.clone()));
    report.own_identity(&who.identity);
    let place = resolve::service(&env.shared.directory.load(), &env.shared.vips, original).inspect_err(|_| {
        tracing::warn!(unit = %who.unit, %original, "no service at this virtual IP and port");
    })?;
    report.target(&place.service.name, place.port);
    Ok((who, place))
}

/// The rest of the story, on the worker that owns the connections to this service.
pub(super) async fn carry(env: Rc<Env>, admitted: Admitted) {
    let Admitted { socket, who, place, mut report } = admitted;
    let outcome = connect_and_serve(&env, socket, &who, &place, &mut report).await;
    report.finish(outcome);
}

async fn connect_and_serve(
    env: &Rc<Env>,
    socket: StdStream,
    who: &Workload,
    place: &Place,
    report: &mut Report,
) -> Result<(), Fault> {
    let mut app = TcpStream::from_std(socket).map_err(|_| Fault::Internal)?;
    let served = detect::protocol(place.protocol);
    let balancer = env.balancer(&who.identity, place);
    let tls = env.shared.tls.load_full();
    let connector = Connector { pool: &env.pool, dialer: &env.dialer, tls: &tls };
    let probe = |failed| probe::start(env, &who.identity, failed);
    // Boxed: connecting takes ten times the memory of serving, and only for a moment.
    let connecting = Box::pin(connect::first(connector, who, balancer.candidates(), &mut app, probe));
    match connecting.await {
        Ok(connected) => {
            report.peer_identity(&connected.candidate.endpoint().identity);
            report.connected(connected.endpoint, connected.upstream.tls());
            serve(env, served, app, connected, report).await
        }
        Err(fault) => {
            serve::abort(&app);
            Err(fault)
        }
    }
}

async fn serve(env: &Env, served: Served, app: TcpStream, connected: Connected, report: &Report) -> Result<(), Fault> {
    let Served::Opaque = served;
    let Connected { upstream, early, candidate: _in_flight, .. } = connected;
    let watch = Watch {
        from_app: |bytes| report.count_up(bytes),
        to_app: |bytes| report.count_down(bytes),
        budget: &env.budget,
    };
    report.count_up(early.length);
    match upstream {
        Upstream::Mesh { send, receive, slot: _slot } => serve::opaque(app, send, receive, early.chunks, &watch).await,
        Upstream::Plain(far) => serve::plain(app, far, early.chunks, &watch).await,
    }
}

/// Tells the operator who was refused, and the lines that would enrol it.
fn explain(env: &Env, caller: &Unidentified, original: SocketAddr, report: &mut Report) -> Fault {
    let service = env.shared.vips.service_of(original.ip());
    let service = service.map_or_else(|| original.to_string(), |service| service.to_string());
    report.unit(caller.unit.clone());
    let selector = match (&caller.unit, caller.uid) {
        (Some(unit), _) => format!("unit = \"{unit}\""),
        (None, Some(uid)) => format!("uid = {uid}"),
        (None, None) => {
            tracing::warn!(%service, "refused a connection whose owner the kernel no longer knows");
            return caller.fault;
        }
    };
    if env.may_log(&selector) {
        tracing::warn!(
            %service,
            "refused an unenrolled caller; to enrol it, add to a file in enrol_dir: \
             [[workload]] {selector} namespace = \"...\" name = \"...\""
        );
    }
    caller.fault
}

fn refuse(socket: &StdStream) {
    // Fails only for a socket that is gone already.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}
