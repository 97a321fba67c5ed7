//! Looks at what is so on this host now: its connections, its units, and how its operators get in.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;

use meshd_sys::sock_dump::{SocketState, TcpSocket, tcp_sockets};

use super::flows::{Danger, Lifeline, LiveFlow, Session, live_flows};
use super::tool::CaptureError;
use super::wanted::Wanted;
use crate::enrol::{CgroupUnits, Enrolment, Mode, UnitLookup};
use crate::{host, tool};

/// The port everybody tries first, and where sshd may be started tomorrow.
const SSH: u16 = 22;
/// Programs that let operators in; sshd's helpers begin with its name.
const SSH_PROGRAMS: [&str; 2] = ["sshd", "dropbear"];
const SSH_SOCKET_UNITS: [&str; 3] = ["ssh.socket", "sshd.socket", "dropbear.socket"];

/// Connections and ways in, at one moment.
pub struct Live {
    pub flows: Vec<LiveFlow>,
    pub lifeline: Lifeline,
}

/// `session`: the one the command was typed in, where there is one.
pub fn look(wanted: &Wanted, session: Option<Session>) -> Result<Live, CaptureError> {
    let sockets = sockets()?;
    let mut units = CgroupUnits::discover();
    let lifeline = lifeline_in(&sockets, &mut units, session);
    let flows = live_flows(&sockets, wanted, |cgroup| unit_of(&mut units, cgroup));
    Ok(Live { flows, lifeline })
}

/// How operators get into this host.
pub fn lifeline(session: Option<Session>) -> Result<Lifeline, CaptureError> {
    Ok(lifeline_in(&sockets()?, &mut CgroupUnits::discover(), session))
}

fn sockets() -> Result<Vec<TcpSocket>, CaptureError> {
    let failed = |source| CaptureError::State { what: "cannot list this host's connections".into(), source };
    tcp_sockets().map_err(failed)
}

fn unit_of(units: &mut CgroupUnits, cgroup: u64) -> Option<Arc<str>> {
    match units.unit_of(cgroup) {
        UnitLookup::Unit(unit) => Some(unit),
        UnitLookup::Unknown | UnitLookup::NotLookedFor => None,
    }
}

/// Refuses a plan that would lock this host's operators out, with the place to change.
pub fn refuse_lockout(enrolment: &Enrolment, wanted: &Wanted, live: &Live) -> Result<(), CaptureError> {
    match live.lifeline.endangered_by(wanted, &live.flows) {
        None => Ok(()),
        Some(Danger::StrictPort(port)) => {
            let is_it = |mode, at: u16| mode == Mode::Strict && at == port;
            let mut rows = enrolment.deliveries().iter();
            let row = rows.find(|row| is_it(row.mode, row.deliver.port()));
            let origin = row.map_or_else(|| "enrol.d".to_owned(), |row| row.origin.to_string());
            Err(CaptureError::Lockout(format!(
                "{origin}: workload.serve.mode: port {port} is how operators log in to this host (ssh), and strict \
                 would refuse everybody outside the mesh; set mode = \"permissive\", or remove this [[workload.serve]]"
            )))
        }
        Some(Danger::VirtualIp(ip)) => Err(CaptureError::Lockout(format!(
            "meshd.toml: capture.vip4/vip6: {ip} is an address of a login session, so it cannot be a virtual IP; \
             choose ranges nobody uses (default 240.240.0.0/16 and fd6d:6573:6864::/64)"
        ))),
    }
}

fn lifeline_in(sockets: &[TcpSocket], units: &mut CgroupUnits, session: Option<Session>) -> Lifeline {
    let is_ssh = |cgroup| unit_of(units, cgroup).is_some_and(|unit| is_ssh_unit(&unit));
    let listening = of_servers(sockets, is_ssh, &inodes_of(&SSH_PROGRAMS));
    let session_port = session.map(|session| session.server.port());
    let ports = listening.into_iter().chain(socket_units()).chain(session_port).chain([SSH]).collect();
    Lifeline { ports, session }
}

/// Ports of what a server of logins listens on, by its unit or by its process.
fn of_servers(sockets: &[TcpSocket], mut is_ssh: impl FnMut(u64) -> bool, inodes: &HashSet<u32>) -> BTreeSet<u16> {
    let found = |socket: &&TcpSocket| {
        // On loopback sshd's processes listen for what sessions forward, not for logins.
        let by_process = !socket.local.ip().is_loopback() && inodes.contains(&socket.inode);
        socket.state == SocketState::Listening && (by_process || socket.cgroup.is_some_and(&mut is_ssh))
    };
    sockets.iter().filter(found).map(|socket| socket.local.port()).collect()
}

fn is_ssh_unit(unit: &str) -> bool {
    matches!(unit, "ssh.service" | "ssh.socket")
        || ["sshd", "ssh@", "dropbear"].iter().any(|start| unit.starts_with(start))
}

/// Sockets of all processes of such names; empty for those we may not look into.
fn inodes_of(programs: &[&str]) -> HashSet<u32> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return HashSet::new() };
    let is_it = |process: &Path| {
        std::fs::read_to_string(process.join("comm")).is_ok_and(|name| programs.iter().any(|it| name.starts_with(it)))
    };
    let processes = processes.flatten().map(|process| process.path()).filter(|process| is_it(process));
    let descriptors = processes.filter_map(|process| std::fs::read_dir(process.join("fd")).ok()).flatten().flatten();
    descriptors
        .filter_map(|descriptor| {
            let target = std::fs::read_link(descriptor.path()).ok()?;
            target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
        })
        .collect()
}

/// systemd itself holds a socket unit's listener, so only systemd knows that it is ssh's.
fn socket_units() -> Vec<u16> {
    if !host::systemd_runs() {
        return Vec::new();
    }
    let shown = tool::output("systemctl", &[&["show", "--property=Listen"][..], &SSH_SOCKET_UNITS].concat(), "");
    shown.map(|output| listen_ports(&String::from_utf8_lossy(&output.stdout))).unwrap_or_default()
}

/// `Listen=[::]:22 (Stream)`, several in a line or one; a port alone means every address.
fn listen_ports(shown: &str) -> Vec<u16> {
    let addresses = shown.lines().filter_map(|line| line.strip_prefix("Listen=")).flat_map(str::split_whitespace);
    addresses.filter_map(|word| word.rsplit_once(':').map_or(word, |(_, port)| port).parse().ok()).collect()
}

/// The SSH session this process was started in: its own or of the nearest process above it, since sudo forgets the
/// variable, and the shell it was called from has it.
pub fn own_session() -> Option<Session> {
    let above = std::iter::successors(Some(std::process::id()), |pid| parent(*pid));
    above.into_iter().find_map(|pid| session_in(&std::fs::read(format!("/proc/{pid}/environ")).ok()?))
}

fn parent(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
    (parent > 1).then_some(parent)
}

fn session_in(environment: &[u8]) -> Option<Session> {
    let mut variables = environment.split(|byte| *byte == 0);
    let value = variables.find_map(|variable| variable.strip_prefix(b"SSH_CONNECTION="))?;
    Session::parse(std::str::from_utf8(value).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ports_of_socket_units_are_read_from_what_systemd_shows() {
        let shown = "Listen=0.0.0.0:22 (Stream)\nListen=[::]:2222 (Stream)\n\nListen=/run/ssh (Stream)\nListen=\n";
        assert_eq!(listen_ports(shown), [22, 2222]);
        assert_eq!(listen_ports("Listen=23 (Stream) 0.0.0.0:24 (Stream)\n"), [23, 24]);
    }

    #[test]
    fn units_that_let_operators_in_are_known() {
        for unit in
            ["ssh.service", "ssh.socket", "sshd.service", "sshd@7-10.0.0.1:22-10.0.0.9:5.service", "ssh@3.service"]
        {
            assert!(is_ssh_unit(unit), "{unit}");
        }
        assert!(is_ssh_unit("dropbear.service") && is_ssh_unit("dropbear@1.service"));
        assert!(!is_ssh_unit("ssh-agent.service") && !is_ssh_unit("web.service"));
    }

    #[test]
    fn a_way_in_is_known_by_its_unit_or_its_process_but_not_what_a_session_forwards() {
        let listening = |local: &str, inode, cgroup| TcpSocket {
            state: SocketState::Listening,
            local: local.parse().unwrap(),
            remote: "0.0.0.0:0".parse().unwrap(),
            uid: 0,
            inode,
            cgroup: Some(cgroup),
        };
        let sockets = [
            listening("0.0.0.0:2222", 8, 1),
            listening("127.0.0.1:6010", 8, 1),
            listening("127.0.0.1:2022", 9, 7),
            listening("0.0.0.0:80", 10, 2),
            TcpSocket { state: SocketState::Open, ..listening("10.0.0.1:50000", 8, 7) },
        ];
        let found = of_servers(&sockets, |cgroup| cgroup == 7, &HashSet::from([8]));
        assert_eq!(found, [2022, 2222].into());
    }

    #[test]
    fn the_session_is_read_from_the_environment_of_a_shell() {
        let session = session_in(b"A=1\0SSH_CONNECTION=10.0.0.9 5000 10.0.0.1 2222\0B=2\0").unwrap();
        assert_eq!(session.server, "10.0.0.1:2222".parse().unwrap());
        assert_eq!(session_in(b"A=1\0"), None);
    }

    #[test]
    fn port_22_is_kept_and_the_port_of_the_session_is_added() {
        let lifeline = lifeline_in(&[], &mut CgroupUnits::discover(), Session::parse("10.0.0.9 5 10.0.0.1 2200"));
        assert!(lifeline.ports.is_superset(&[22, 2200].into()), "{lifeline:?}");
    }
}
