//! What a plan means for the connections a host has at the moment. Pure: sockets in, effects out.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use meshd_sys::sock_dump::{SocketState, TcpSocket};
use serde::Serialize;

use super::wanted::{Caller, Facts, Present, StrictPort, Wanted};

/// What must stay reachable whatever is planned: how the operator gets in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lifeline {
    /// Where sshd listens.
    pub ports: BTreeSet<u16>,
    /// The session the command was typed in.
    pub session: Option<Session>,
}

/// An SSH session, as `SSH_CONNECTION` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    pub client: SocketAddr,
    pub server: SocketAddr,
}

impl Session {
    /// `client-ip client-port server-ip server-port`
    pub fn parse(text: &str) -> Option<Session> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let [client, client_port, server, server_port] = words[..] else { return None };
        let address = |ip: &str, port: &str| {
            // A link-local client comes with its interface: `fe80::1%eth0`.
            let ip: IpAddr = ip.split('%').next()?.parse().ok()?;
            Some(SocketAddr::new(ip.to_canonical(), port.parse().ok()?))
        };
        Some(Session { client: address(client, client_port)?, server: address(server, server_port)? })
    }
}

/// A process of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Process {
    pub uid: u32,
    pub unit: Option<String>,
}

impl Process {
    fn is(&self, caller: &Caller, facts: &Facts) -> bool {
        facts.present(caller).into_iter().any(|present| match present {
            Present::Uid(uid) => self.uid == uid,
            Present::Cgroup(cgroup) => {
                self.unit.as_deref().is_some_and(|unit| cgroup.path.rsplit('/').next() == Some(unit))
            }
        })
    }
}

/// An open connection, one entry also if both its ends are on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LiveFlow {
    pub client: SocketAddr,
    pub server: SocketAddr,
    /// Who opened it, if that is somebody of this host.
    pub caller: Option<Process>,
    /// Whether its server is on this host.
    pub inbound: bool,
}

/// What becomes of a connection when a plan is in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "effect", content = "reason")]
pub enum Effect {
    /// Goes through the mesh.
    Captured,
    /// Would be touched by a rule, but is not.
    Excluded(String),
    /// Stays open, but the next one like it is refused.
    WouldBreak(String),
    /// Goes on, and its next one is counted as plaintext.
    Counted,
    /// No rule concerns it.
    Unaffected,
}

/// Each flow's effect is decided on its own.
pub fn classify(wanted: &Wanted, facts: &Facts, lifeline: &Lifeline, flow: &LiveFlow) -> Effect {
    if let Some(reason) = lifeline.carries(flow) {
        return Effect::Excluded(reason.to_owned());
    }
    if is_virtual(wanted, flow.server.ip()) {
        return Effect::Captured;
    }
    let port = flow.server.port();
    if flow.inbound
        && let Some(effect) = at_strict_port(wanted, facts, flow)
    {
        return effect;
    }
    if flow.inbound && wanted.permissive.contains(&port) && !is_meshd(wanted, flow) {
        return Effect::Counted;
    }
    let raw = facts.raw_addresses.contains(&flow.server);
    let caller = flow.caller.as_ref();
    if raw && caller.is_some_and(|process| wanted.raw_callers.iter().any(|caller| process.is(caller, facts))) {
        return Effect::Excluded("open already: stays direct to its end, the next one is captured".into());
    }
    Effect::Unaffected
}

impl Lifeline {
    fn carries(&self, flow: &LiveFlow) -> Option<&'static str> {
        let session = self.session;
        if session.is_some_and(|session| flow.client == session.client && flow.server == session.server) {
            return Some("your own session");
        }
        (flow.inbound && self.ports.contains(&flow.server.port())).then_some("ssh")
    }

    /// Why a plan would lock the operator out of this host: what it does, in words.
    pub fn endangered_by(&self, wanted: &Wanted, flows: &[LiveFlow]) -> Option<Danger> {
        let strict = wanted.strict.iter().find(|strict| self.is_way_in(strict.port));
        if let Some(strict) = strict {
            return Some(Danger::StrictPort(strict.port));
        }
        let session = self.session.map(|session| [session.client.ip(), session.server.ip()]);
        let ways = flows.iter().filter(|flow| self.carries(flow).is_some());
        let mut addresses =
            ways.flat_map(|flow| [flow.client.ip(), flow.server.ip()]).chain(session.into_iter().flatten());
        addresses.find(|ip| is_virtual(wanted, *ip)).map(Danger::VirtualIp)
    }

    fn is_way_in(&self, port: u16) -> bool {
        self.ports.contains(&port) || self.session.is_some_and(|session| session.server.port() == port)
    }
}

/// How a plan would lock the operator out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Danger {
    /// sshd's port would refuse everybody who is not in the mesh.
    StrictPort(u16),
    /// An address somebody is logged in from or at would be a virtual IP.
    VirtualIp(IpAddr),
}

fn is_virtual(wanted: &Wanted, ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => wanted.vip4.contains(&v4),
        IpAddr::V6(v6) => wanted.vip6.contains(&v6),
    }
}

fn is_meshd(wanted: &Wanted, flow: &LiveFlow) -> bool {
    flow.caller.as_ref().is_some_and(|process| process.uid == wanted.daemon_uid)
}

/// None where the port is not strict. Who may call it for one delivery may call it.
fn at_strict_port(wanted: &Wanted, facts: &Facts, flow: &LiveFlow) -> Option<Effect> {
    let of_port = wanted.strict.iter().filter(|strict| strict.port == flow.server.port());
    let mut effects = of_port.map(|strict| at_strict_delivery(wanted, facts, strict, flow));
    let first = effects.next()?;
    let lets_in = |effect: &Effect| matches!(effect, Effect::Excluded(_));
    if lets_in(&first) { Some(first) } else { Some(effects.find(lets_in).unwrap_or(first)) }
}

fn at_strict_delivery(wanted: &Wanted, facts: &Facts, strict: &StrictPort, flow: &LiveFlow) -> Effect {
    let port = strict.port;
    if is_meshd(wanted, flow) {
        return Effect::Excluded("comes through the mesh".into());
    }
    match &flow.caller {
        Some(process) if strict.local.iter().any(|caller| process.is(caller, facts)) => {
            Effect::Excluded(format!("may call strict port {port} on this host"))
        }
        Some(process) => {
            let unit = process.unit.as_deref().unwrap_or("no unit");
            Effect::WouldBreak(format!(
                "port {port} is strict, and the caller ({unit}, uid {}) is neither its owner nor in `local_ok`",
                process.uid
            ))
        }
        None if strict.plaintext_from.iter().any(|net| net.contains(&flow.client.ip())) => {
            Effect::Excluded(format!("strict port {port} has its network in `plaintext_from`"))
        }
        None => Effect::WouldBreak(format!(
            "port {port} is strict, and {} calls it in clear from outside `plaintext_from`",
            flow.client.ip()
        )),
    }
}

/// Connections out of sockets. What meshd's own transparent sockets carry is not told twice: the application's
/// end of a captured connection tells it.
pub fn live_flows(
    sockets: &[TcpSocket],
    wanted: &Wanted,
    mut unit_of: impl FnMut(u64) -> Option<Arc<str>>,
) -> Vec<LiveFlow> {
    let listening = |state| sockets.iter().filter(move |socket| socket.state == state);
    let served: HashSet<u16> = listening(SocketState::Listening).map(|socket| socket.local.port()).collect();
    let open: HashMap<(SocketAddr, SocketAddr), &TcpSocket> =
        listening(SocketState::Open).map(|socket| ((socket.local, socket.remote), socket)).collect();
    let mut process = |socket: &TcpSocket| Process {
        uid: socket.uid,
        unit: socket.cgroup.and_then(&mut unit_of).map(|unit| unit.to_string()),
    };
    let mut flows = Vec::new();
    for socket in listening(SocketState::Open) {
        let (here, there) = (socket.local, socket.remote);
        let other_end = open.get(&(there, here));
        // A port somebody listens on is a server's, unless the other end is one, too, and looks more like it.
        let is_server = served.contains(&here.port())
            && !(other_end.is_some() && served.contains(&there.port()) && there.port() < here.port());
        if is_server && is_virtual(wanted, here.ip()) {
            continue;
        }
        if is_server {
            let caller = other_end.map(|socket| process(socket));
            flows.push(LiveFlow { client: there, server: here, caller, inbound: true });
        } else if other_end.is_none() || is_virtual(wanted, there.ip()) {
            flows.push(LiveFlow { client: here, server: there, caller: Some(process(socket)), inbound: false });
        }
    }
    flows
}

#[cfg(test)]
mod tests {
    use super::super::wanted::tests::wanted;
    use super::*;
    use crate::enrol::Cgroup;

    fn plan() -> Wanted {
        let owner = Caller::Unit("payments.service".into());
        let strict = StrictPort {
            port: 8080,
            local: [owner.clone(), Caller::Uid(997)].into(),
            owner,
            plaintext_from: ["10.9.0.0/24".parse().unwrap()].into(),
        };
        Wanted { strict: [strict].into(), permissive: [2525].into(), ..wanted() }
    }

    fn inbound(client: &str, port: u16, caller: Option<(u32, &str)>) -> LiveFlow {
        let caller = caller.map(|(uid, unit)| Process { uid, unit: Some(unit.into()) });
        let server = SocketAddr::from(([10, 0, 0, 1], port));
        LiveFlow { client: client.parse().unwrap(), server, caller, inbound: true }
    }

    fn outbound(server: &str) -> LiveFlow {
        let caller = Some(Process { uid: 2003, unit: Some("checkout.service".into()) });
        let client = "10.0.0.1:40000".parse().unwrap();
        LiveFlow { client, server: server.parse().unwrap(), caller, inbound: false }
    }

    fn effect(flow: &LiveFlow) -> Effect {
        let lifeline = Lifeline { ports: [22].into(), session: None };
        let path = "system.slice/payments.service".to_owned();
        let cgroup = Cgroup { nft_path: path.clone(), path, level: 2, id: 7 };
        let cgroups = [("payments.service".to_owned(), cgroup)].into();
        classify(&plan(), &Facts { cgroups, ..Facts::default() }, &lifeline, flow)
    }

    #[test]
    fn virtual_ips_are_captured_and_everything_else_that_leaves_is_left_alone() {
        assert_eq!(effect(&outbound("240.240.7.7:80")), Effect::Captured);
        assert_eq!(effect(&outbound("[fd6d:6573:6864::7]:80")), Effect::Captured);
        assert_eq!(effect(&outbound("10.0.0.9:22")), Effect::Unaffected);
        assert_eq!(effect(&inbound("10.0.0.9:40000", 443, None)), Effect::Unaffected);
    }

    #[test]
    fn callers_of_a_strict_port_break_unless_they_are_let_in() {
        for (flow, breaks) in [
            (inbound("10.0.0.9:40000", 8080, None), true),
            (inbound("10.9.0.9:40000", 8080, None), false),
            (inbound("127.0.0.1:40000", 8080, Some((2005, "stray.service"))), true),
            (inbound("127.0.0.1:40000", 8080, Some((0, "cron.service"))), true),
            (inbound("127.0.0.1:40000", 8080, Some((997, "probe.service"))), false),
            (inbound("127.0.0.1:40000", 8080, Some((1, "payments.service"))), false),
            (inbound("127.0.0.1:40000", 8080, Some((998, "meshd.service"))), false),
        ] {
            let effect = effect(&flow);
            assert_eq!(matches!(effect, Effect::WouldBreak(_)), breaks, "{flow:?}: {effect:?}");
            assert!(matches!(effect, Effect::WouldBreak(_) | Effect::Excluded(_)), "{effect:?}");
        }
    }

    #[test]
    fn who_may_call_a_strict_port_for_one_of_its_deliveries_may_call_it() {
        let mut plan = plan();
        plan.strict.insert(StrictPort {
            port: 8080,
            owner: Caller::Uid(5),
            local: [Caller::Uid(5)].into(),
            plaintext_from: ["10.8.0.0/24".parse().unwrap()].into(),
        });
        let breaks = |flow: &LiveFlow| {
            matches!(classify(&plan, &Facts::default(), &Lifeline::default(), flow), Effect::WouldBreak(_))
        };
        for client in ["10.8.0.9:4", "10.9.0.9:4"] {
            assert!(!breaks(&inbound(client, 8080, None)), "{client}");
        }
        for uid in [5, 997] {
            assert!(!breaks(&inbound("127.0.0.1:4", 8080, Some((uid, "some.service")))), "{uid}");
        }
        assert!(breaks(&inbound("10.7.0.9:4", 8080, None)));
        assert!(breaks(&inbound("127.0.0.1:4", 8080, Some((6, "some.service")))));
    }

    #[test]
    fn permissive_ports_count_everybody_but_the_mesh() {
        assert_eq!(effect(&inbound("10.0.0.9:40000", 2525, None)), Effect::Counted);
        assert_eq!(effect(&inbound("127.0.0.1:40000", 2525, Some((998, "meshd.service")))), Effect::Unaffected);
    }

    #[test]
    fn ssh_is_excluded_whatever_the_plan_says() {
        assert_eq!(effect(&inbound("10.0.0.9:40000", 22, None)), Effect::Excluded("ssh".into()));
        let session = Session::parse("10.0.0.9 40000 10.0.0.1 8080");
        let lifeline = Lifeline { ports: BTreeSet::new(), session };
        let flow = inbound("10.0.0.9:40000", 8080, None);
        let effect = classify(&plan(), &Facts::default(), &lifeline, &flow);
        assert_eq!(effect, Effect::Excluded("your own session".into()));
    }

    #[test]
    fn a_plan_that_closes_the_way_in_is_recognised() {
        let lifeline = |ports: &[u16], session: &str| Lifeline {
            ports: ports.iter().copied().collect(),
            session: Session::parse(session),
        };
        let danger = |lifeline: Lifeline, flows: &[LiveFlow]| lifeline.endangered_by(&plan(), flows);
        assert_eq!(danger(lifeline(&[22], "10.0.0.9 4 10.0.0.1 22"), &[]), None);
        assert_eq!(danger(lifeline(&[22, 8080], ""), &[]), Some(Danger::StrictPort(8080)));
        assert_eq!(danger(lifeline(&[22], "10.0.0.9 4 10.0.0.1 8080"), &[]), Some(Danger::StrictPort(8080)));
        let far = inbound("240.240.0.9:4", 22, None);
        assert_eq!(danger(lifeline(&[22], ""), &[far]), Some(Danger::VirtualIp([240, 240, 0, 9].into())));
    }

    #[test]
    fn a_session_is_read_with_and_without_an_interface() {
        let session = Session::parse("fe80::1%eth0 50000 ::ffff:10.0.0.1 22").unwrap();
        assert_eq!((session.client.port(), session.server), (50000, "10.0.0.1:22".parse().unwrap()));
        assert_eq!(Session::parse("10.0.0.1 22"), None);
    }

    #[test]
    fn a_connection_within_the_host_is_told_once_with_its_caller() {
        let socket = |state, local: &str, remote: &str, uid| TcpSocket {
            state,
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
            uid,
            inode: 1,
            cgroup: Some(u64::from(uid)),
        };
        use SocketState::{Listening, Open};
        let sockets = [
            socket(Listening, "0.0.0.0:8080", "0.0.0.0:0", 2001),
            socket(Listening, "127.0.0.1:15001", "0.0.0.0:0", 998),
            socket(Open, "127.0.0.1:8080", "127.0.0.1:50000", 2001),
            socket(Open, "127.0.0.1:50000", "127.0.0.1:8080", 2005),
            socket(Open, "10.0.0.1:50001", "10.0.0.9:443", 2005),
            // Captured: the application's end, and meshd's.
            socket(Open, "127.0.0.1:50002", "240.240.7.7:80", 2003),
            socket(Open, "240.240.7.7:80", "127.0.0.1:50002", 998),
        ];
        let flows = live_flows(&sockets, &plan(), |cgroup| Some(format!("{cgroup}.service").into()));
        let told: Vec<(String, Option<&str>, bool)> = flows
            .iter()
            .map(|flow| {
                let unit = flow.caller.as_ref().and_then(|caller| caller.unit.as_deref());
                (flow.server.to_string(), unit, flow.inbound)
            })
            .collect();
        let expected = [
            ("127.0.0.1:8080", "2005.service", true),
            ("10.0.0.9:443", "2005.service", false),
            ("240.240.7.7:80", "2003.service", false),
        ];
        assert_eq!(told, expected.map(|(server, unit, inbound)| (server.to_owned(), Some(unit), inbound)));
    }
}
