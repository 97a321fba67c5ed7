//! Looks at what is so on this host now: its connections, its units, and how its operators get in.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use meshd_sys::sock_dump::{SocketState, TcpSocket, tcp_sockets};

use super::flows::{Danger, Lifeline, LiveFlow, Session, live_flows};
use super::tool::CaptureError;
use super::wanted::Wanted;
use crate::enrol::{CgroupUnits, Enrolment, Mode, UnitLookup};

/// The port everybody tries first, and where sshd may be started tomorrow.
const SSH: u16 = 22;

/// Connections and ways in, at one moment.
pub struct Live {
    pub flows: Vec<LiveFlow>,
    pub lifeline: Lifeline,
}

/// `session`: the value of SSH_CONNECTION, where there is one.
pub fn look(wanted: &Wanted, session: Option<&str>) -> Result<Live, CaptureError> {
    let failed = |source| CaptureError::State { what: "cannot list this host's connections".into(), source };
    let sockets = tcp_sockets().map_err(failed)?;
    let mut units = CgroupUnits::discover();
    let mut unit_of = |cgroup| match units.unit_of(cgroup) {
        UnitLookup::Unit(unit) => Some(unit),
        UnitLookup::Unknown | UnitLookup::NotLookedFor => None,
    };
    let ports = ssh_ports(&sockets, &mut unit_of);
    let lifeline = Lifeline { ports, session: session.and_then(Session::parse) };
    Ok(Live { flows: live_flows(&sockets, wanted, unit_of), lifeline })
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

fn ssh_ports(sockets: &[TcpSocket], unit_of: &mut impl FnMut(u64) -> Option<Arc<str>>) -> BTreeSet<u16> {
    let held_by_sshd = inodes_of("sshd");
    let listening = || sockets.iter().filter(|socket| socket.state == SocketState::Listening);
    let by_unit = listening()
        .filter(|socket| socket.cgroup.and_then(&mut *unit_of).is_some_and(|unit| is_ssh_unit(&unit)))
        .map(|socket| socket.local.port());
    let by_unit: Vec<u16> = by_unit.collect();
    // On loopback sshd listens for what its sessions forward, not for logins.
    let by_process = listening()
        .filter(|socket| !socket.local.ip().is_loopback() && held_by_sshd.contains(&socket.inode))
        .map(|socket| socket.local.port());
    by_process.chain(by_unit).chain(socket_units()).chain([SSH]).collect()
}

fn is_ssh_unit(unit: &str) -> bool {
    matches!(unit, "ssh.service" | "ssh.socket") || unit.starts_with("sshd") || unit.starts_with("ssh@")
}

/// Sockets of all processes of a name; empty for those we may not look into.
fn inodes_of(program: &str) -> HashSet<u32> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return HashSet::new() };
    let is_it = |process: &Path| std::fs::read_to_string(process.join("comm")).is_ok_and(|it| it.starts_with(program));
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
    if !Path::new("/run/systemd/system").is_dir() {
        return Vec::new();
    }
    let shown: io::Result<std::process::Output> =
        Command::new("systemctl").args(["show", "--property=Listen", "ssh.socket", "sshd.socket"]).output();
    shown.map(|output| listen_ports(&String::from_utf8_lossy(&output.stdout))).unwrap_or_default()
}

/// Lines like `Listen=[::]:22 (Stream)`.
fn listen_ports(shown: &str) -> Vec<u16> {
    let addresses = shown.lines().filter_map(|line| line.strip_prefix("Listen=")?.strip_suffix(" (Stream)"));
    addresses.filter_map(|address| address.rsplit(':').next()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ports_of_socket_units_are_read_from_what_systemd_shows() {
        let shown = "Listen=0.0.0.0:22 (Stream)\nListen=[::]:2222 (Stream)\n\nListen=/run/ssh (Stream)\n";
        assert_eq!(listen_ports(shown), [22, 2222]);
    }

    #[test]
    fn units_that_let_operators_in_are_known() {
        for unit in
            ["ssh.service", "ssh.socket", "sshd.service", "sshd@7-10.0.0.1:22-10.0.0.9:5.service", "ssh@3.service"]
        {
            assert!(is_ssh_unit(unit), "{unit}");
        }
        assert!(!is_ssh_unit("ssh-agent.service") && !is_ssh_unit("web.service"));
    }
}
