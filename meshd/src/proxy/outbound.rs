//! Local application to mesh: the whole story of a connection, one step per line.

use std::net::{SocketAddr, TcpStream as StdStream};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use meshd_discovery::{Directory, ServiceName};
use socket2::SockRef;
use tokio::net::TcpStream;

use super::balance::Failed;
use super::connect::{Connected, Connector, Upstream};
use super::detect::Served;
use super::env::Env;
use super::identify::{Identified, Unidentified};
use super::prove::{self, Unguarded};
use super::report::Report;
use super::resolve::Place;
use super::serve::Watch;
use super::{connect, detect, probe, resolve, serve};
use crate::capture::Flow;
use crate::enrol::{Owner, Workload};
use crate::fault::Fault;
use crate::telemetry::{Direction, Tls};

/// A connection known to be allowed out, on its way to the worker that will carry it.
pub(super) struct Admitted {
    /// Some until it is registered with the worker that carries it.
    socket: Option<StdStream>,
    pub(super) who: Arc<Workload>,
    pub(super) place: Place,
    pub(super) report: Report,
    unguarded: Option<Box<Unguarded>>,
}

/// What becomes of a connection right after accept.
pub(super) enum Accepted {
    Admitted(Box<Admitted>),
    /// Discovery is asked for its service first.
    Awaits(Box<Awaiting>),
}

/// A connection to a service that has a virtual IP from earlier, and is not known now.
pub(super) struct Awaiting {
    socket: StdStream,
    identified: Identified,
    service: ServiceName,
    original: SocketAddr,
    report: Report,
}

/// The steps that need no waiting, right after accept: identify, resolve.
pub(super) fn admit(env: &Env, socket: StdStream, client: SocketAddr) -> Option<Accepted> {
    let mut report = Report::opened(&env.shared.telemetry, env.worker, Direction::Outbound, client);
    match identify(env, &socket, client, &mut report) {
        Ok((identified, original)) => match unknown_service(env, original) {
            Some(service) => {
                Some(Accepted::Awaits(Box::new(Awaiting { socket, identified, service, original, report })))
            }
            None => {
                let directory = env.shared.directory.load();
                resolve(env, &directory, socket, identified, original, report).map(Accepted::Admitted)
            }
        },
        Err(fault) => {
            refuse(&socket);
            report.finish(Err(fault));
            None
        }
    }
}

/// Waits for what discovery says of the service; a second at most.
pub(super) async fn look_up(env: &Env, awaiting: Awaiting) -> Option<Box<Admitted>> {
    let Awaiting { socket, identified, service, original, report } = awaiting;
    env.shared.lookups.look_up(&service).await;
    let directory = env.shared.lookups.directory().unwrap_or_else(|| env.shared.directory.load_full());
    resolve(env, &directory, socket, identified, original, report)
}

fn identify(
    env: &Env,
    socket: &StdStream,
    client: SocketAddr,
    report: &mut Report,
) -> Result<(Identified, SocketAddr), Fault> {
    // Nothing recovered: somebody dialled the capture port itself.
    let Flow { client, original } = env.flow(socket, client).map_err(|_| Fault::AppReset)?.ok_or(Fault::Loop)?;
    report.client(client);
    let identified = env
        .identifier
        .local(&env.shared.enrolment.load(), &env.shared.ports, &env.shared.telemetry.unknown, client, original)
        .map_err(|unidentified| explain(env, &unidentified, original, report))?;
    report.unit(&identified.who.unit);
    report.own_identity(&identified.who.identity);
    Ok((identified, original))
}

/// One that may be known when discovery is asked for it.
fn unknown_service(env: &Env, original: SocketAddr) -> Option<ServiceName> {
    let shared = &env.shared;
    let service = shared.lookups.are_on().then(|| shared.vips.service_of(original.ip()))??;
    shared.directory.load().get(&service).is_none().then_some(service)
}

fn resolve(
    env: &Env,
    directory: &Directory,
    socket: StdStream,
    Identified { who, unguarded }: Identified,
    original: SocketAddr,
    mut report: Report,
) -> Option<Box<Admitted>> {
    match resolve::service(directory, &env.shared.vips, &env.shared.raw.load(), original) {
        Ok(place) => {
            report.target(&place.service.name, place.port);
            let unguarded = unguarded.map(Box::new);
            Some(Box::new(Admitted { socket: Some(socket), who, place, report, unguarded }))
        }
        Err(fault) => {
            if env.may_log(&who.unit) {
                tracing::warn!(unit = %who.unit, %original, "no service at this address and port; see `meshd status`");
            }
            refuse(&socket);
            report.finish(Err(fault));
            None
        }
    }
}

/// The rest of the story, on the worker that owns the connections to this service.
///
/// Boxed and borrowed on purpose: what these futures hold by value is what an idle connection costs.
pub(super) async fn carry(env: Rc<Env>, mut admitted: Box<Admitted>) {
    let outcome = connect_and_serve(&env, &mut admitted).await;
    admitted.report.finish(outcome);
}

async fn connect_and_serve(env: &Rc<Env>, admitted: &mut Admitted) -> Result<(), Fault> {
    let Admitted { socket, who, place, report, unguarded } = admitted;
    let socket = socket.take().ok_or(Fault::Internal)?;
    if let Some(unguarded) = unguarded.take() {
        Box::pin(prove::process(env, who, *unguarded)).await.inspect_err(|_| refuse(&socket))?;
    }
    let mut app = TcpStream::from_std(socket).map_err(|_| Fault::Internal)?;
    let served = detect::protocol(place.protocol);
    match Box::pin(connect(env, who, place, &mut app)).await {
        Ok(mut connected) => {
            if connected.upstream.tls() == Tls::Mutual {
                report.peer_identity(&connected.candidate.endpoint().identity);
            }
            report.connected(connected.endpoint, connected.upstream.tls());
            serve(env, served, &mut app, &mut connected, report).await
        }
        Err(fault) => {
            serve::abort(&app);
            Err(fault)
        }
    }
}

async fn connect(env: &Rc<Env>, who: &Workload, place: &Place, app: &mut TcpStream) -> Result<Box<Connected>, Fault> {
    let balancer = env.balancer(&who.identity, place);
    let tls = env.shared.tls.load_full();
    if tls.identity(&who.identity).is_none() {
        // Claimed by this host, not (yet) permitted by the PKI: both are needed to be enrolled.
        if env.may_log(&who.unit) {
            let short = who.identity.short();
            tracing::warn!(unit = %who.unit, identity = %who.identity,
                "the PKI has issued no certificate; permit it there: meshd-pki entry add --host <this host> {short}");
        }
        return Err(Fault::Unenrolled);
    }
    let connector = Connector { pool: &env.pool, dialer: &env.dialer, tls: &tls };
    let probe = |failed: Failed| {
        if let Some(endpoint) = failed.endpoint() {
            env.shared.suspects.tell(&endpoint);
        }
        probe::start(env, &who.identity, failed);
    };
    connect::first(connector, who, balancer.candidates(), app, probe).await.map(Box::new)
}

async fn serve(
    env: &Env,
    served: Served,
    app: &mut TcpStream,
    connected: &mut Connected,
    report: &Report,
) -> Result<(), Fault> {
    let Served::Opaque = served;
    let watch = Watch {
        from_app: |bytes| report.count_up(bytes),
        to_app: |bytes| report.count_down(bytes),
        budget: &env.budget,
    };
    let already_read = std::mem::take(&mut connected.early);
    report.count_up(already_read.length);
    match &mut connected.upstream {
        Upstream::Mesh { send, receive, slot } => {
            let served = serve::opaque(app, send, receive, already_read.chunks, &watch).await;
            served.map_err(|fault| slot.cut().unwrap_or(fault))
        }
        Upstream::Plain(far) => Box::pin(serve::plain(app, far, already_read.chunks, &watch)).await,
    }
}

/// Tells the operator who was refused, and the lines that would enrol it.
fn explain(env: &Env, caller: &Unidentified, original: SocketAddr, report: &mut Report) -> Fault {
    let service = env.shared.vips.service_of(original.ip());
    let service = service.map_or_else(|| original.to_string(), |service| service.to_string());
    let owner = caller.owner.as_ref();
    report.stray_unit(owner.and_then(|owner| owner.unit.clone()));
    if caller.fault == Fault::Loop {
        if env.may_log("own connection") {
            tracing::warn!(%service, "meshd itself dialled a virtual IP: give its PKI and sources real addresses");
        }
        return caller.fault;
    }
    let Some(selector) = owner.map(Owner::selector) else {
        if env.may_log("unknown owner") {
            tracing::warn!(%service, "refused a connection whose owner the kernel no longer knows");
        }
        return caller.fault;
    };
    if let Some(unmet) = &caller.unmet {
        if env.may_log(&selector) {
            tracing::warn!(%service, caller = selector, "refused: it is not {unmet}, which the PKI's entry asks for");
        }
        return caller.fault;
    }
    if env.may_log(&selector) {
        tracing::warn!(
            %service,
            "refused an unenrolled caller; to enrol it: meshd enrol {selector} --as ns/<namespace>/sa/<name>"
        );
    }
    caller.fault
}

fn refuse(socket: &StdStream) {
    // Fails only for a socket that is gone already.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}
