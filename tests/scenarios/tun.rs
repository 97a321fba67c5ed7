//! What only the TUN backend has to show; whatever backend the run is for, web uses TUN here.

use std::io::ErrorKind;
use std::net::{Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd_tests::lab::Lab;
use meshd_tests::load::{BulkReport, report};
use meshd_tests::mesh::{Mesh, STRAY_UID};
use meshd_tests::plan::Plan;
use meshd_tests::process::Program;
use meshd_tests::wait::until;
use nix::sys::signal::Signal;

use crate::{DEADLINE, PAYMENTS, ask, refused};

const DEVICE: &str = "meshd-vip";
const LISTENER: &str = "198.18.0.1:15001";
/// Far longer than a refusal takes: what runs into it was swallowed.
const SWALLOWED: Duration = Duration::from_secs(5);

fn mesh() -> Result<Mesh> {
    let plan = Plan::shop_with_one_server();
    let lab = Arc::new(Lab::new(&plan.host_names())?);
    let mut mesh = Mesh::prepare(lab, plan)?;
    mesh.daemon("web").use_backend("tun")?;
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.start_all()?;
    Ok(mesh)
}

/// The service's virtual IPs of both families.
pub(crate) fn virtual_ips(mesh: &Mesh) -> Result<[SocketAddr; 2]> {
    let lookup = Program::new("getent").args(["ahostsv6", "payments.shop.mesh"]).uid(STRAY_UID);
    let found = mesh.host("web").run(&lookup)?.expect_success("looking up an IPv6 address")?;
    let v6: Ipv6Addr = found.split_whitespace().next().unwrap_or_default().parse().context(found.clone())?;
    Ok([(mesh.virtual_address("web", "payments.shop.mesh")?, 80).into(), (v6, 80).into()])
}

fn ensure_unreachable(done: std::io::Result<()>, what: &str) -> Result<()> {
    let error = done.err().with_context(|| format!("{what}: went through"))?;
    let kinds = [ErrorKind::NetworkUnreachable, ErrorKind::HostUnreachable];
    ensure!(kinds.contains(&error.kind()), "{what}: not refused at once: {error}");
    Ok(())
}

fn send_datagram(target: SocketAddr) -> std::io::Result<()> {
    let any: SocketAddr = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
    UdpSocket::bind(any)?.send_to(b"anybody there?", target).map(drop)
}

#[test]
fn datagrams_to_virtual_ips_are_refused_and_after_a_kill_so_is_everything() -> Result<()> {
    let mesh = mesh()?;
    let (host, targets) = (mesh.host("web"), virtual_ips(&mesh)?);
    ask(&mesh)?;
    for target in targets {
        ensure_unreachable(host.within(|| send_datagram(target))?, &format!("a datagram to {target}"))?;
    }
    mesh.daemon("web").kill()?;
    for target in targets {
        let connected = host.within(|| TcpStream::connect_timeout(&target, SWALLOWED).map(drop))?;
        ensure_unreachable(connected, &format!("connecting to {target}"))?;
    }
    mesh.daemon("web").start()?;
    ask(&mesh)?;
    Ok(())
}

#[test]
fn a_transfer_survives_the_deletion_of_the_device() -> Result<()> {
    let mesh = mesh()?;
    let args = ["bulk", "--target", "payments.shop.mesh:80", "--connections", "1", "--bytes", "400000000"];
    let transfer = mesh.host("web").spawn(&mesh.testkit("web", "checkout", &args))?;
    let passed = || mesh.daemon("web").metrics().is_ok_and(|metrics| metrics.sum("meshd_tun_bytes_total", &[]) > 1e7);
    until(DEADLINE, "the transfer to be under way", passed)?;
    mesh.host("web").command("ip", &["link", "delete", DEVICE])?;
    let bulk: BulkReport = report(&transfer.finish(Duration::from_secs(60))?)?;
    ensure!(bulk.bytes == 400_000_000 && bulk.failed == 0, "{bulk:?}");
    ask(&mesh)?;
    Ok(())
}

#[test]
fn a_device_taken_down_is_taken_up_again() -> Result<()> {
    let mesh = mesh()?;
    mesh.host("web").command("ip", &["link", "set", DEVICE, "down"])?;
    for family in ["--ipv4", "--ipv6"] {
        let args = ["--max-time", "1", family, "--fail", PAYMENTS];
        let answers = || mesh.curl("web", "checkout", &args).is_ok_and(|answer| answer.success());
        until(DEADLINE, &format!("{family} to work again"), answers)?;
    }
    Ok(())
}

#[test]
fn a_host_that_keeps_new_devices_off_ipv6_is_captured_by_ipv4() -> Result<()> {
    let mesh = mesh()?;
    let host = mesh.host("web");
    let [_, v6] = virtual_ips(&mesh)?;
    mesh.daemon("web").stop()?;
    host.command("sysctl", &["-q", "-w", "net.ipv6.conf.default.disable_ipv6=1"])?;
    mesh.daemon("web").start()?;
    ask(&mesh)?;
    let connected = host.within(|| TcpStream::connect_timeout(&v6, SWALLOWED).map(drop))?;
    ensure_unreachable(connected, "connecting by IPv6")
}

/// As many hosts have it: nothing comes in but what was asked for.
const FIREWALL: &str = "table inet filter {
    chain input {
        type filter hook input priority 0; policy drop;
        iif lo accept
        ct state established accept
        meta l4proto ipv6-icmp accept
        tcp dport 15008 accept
    }
}
";

#[test]
fn a_firewall_in_the_way_is_named_in_the_log() -> Result<()> {
    let mesh = mesh()?;
    mesh.host("web").nft(FIREWALL)?;
    mesh.curl("web", "checkout", &["--max-time", "3", PAYMENTS])?;
    let named = || mesh.daemon("web").log().contains("iifname meshd-vip accept");
    until(DEADLINE, "the remedy in the log", named)?;
    mesh.host("web").nft("insert rule inet filter input iifname meshd-vip accept")?;
    ask(&mesh)?;
    Ok(())
}

#[test]
fn an_application_that_chose_its_address_is_captured_under_reverse_path_filtering() -> Result<()> {
    let mesh = mesh()?;
    let host = mesh.host("web");
    let (v4, v6) = (host.address().to_string(), host.address6().to_string());
    for (filter, value) in [("loose", 2), ("strict", 1)] {
        for scope in ["all", DEVICE] {
            host.command("sysctl", &["-q", "-w", &format!("net.ipv4.conf.{scope}.rp_filter={value}")])?;
        }
        ask(&mesh)?;
        for (family, address) in [("--ipv4", &v4), ("--ipv6", &v6)] {
            let args = ["--max-time", "5", family, "--interface", address, "--fail", PAYMENTS];
            let answer = mesh.curl("web", "checkout", &args)?;
            answer.expect_success(&format!("asking from {address} under {filter} filtering"))?;
        }
    }
    Ok(())
}

/// Says so when connected, waits for a word from the pipe, and speaks.
const PATIENT: &str = r#"
exec 3<>/dev/tcp/$1/25 && read -r greeting <&3 && echo "$greeting"
read -r word <"$2"
echo "$word" >&3 && cat <&3 && echo "no error"
"#;

#[test]
fn a_connection_from_before_a_kill_is_reset_when_it_speaks_to_the_next_daemon() -> Result<()> {
    let mesh = mesh()?;
    let smtp = mesh.virtual_address("web", "smtp.shop.mesh")?.to_string();
    let pipe = mesh.host("web").directory().join("word");
    mesh.host("web").command("mkfifo", &["--mode=644", &pipe.display().to_string()])?;
    let script = Program::new("bash").args(["-c", PATIENT, "patient", &smtp]).arg(&pipe);
    let patient = mesh.host("web").spawn(&mesh.in_unit("web", "checkout", script))?;
    until(DEADLINE, "the greeting", || patient.stdout().starts_with("220 "))?;
    mesh.daemon("web").kill()?;
    mesh.daemon("web").start()?;
    std::fs::write(&pipe, "hello\n")?;
    let ended = patient.finish(DEADLINE)?;
    ensure!(ended.stderr.contains("reset by peer"), "not reset: {ended:?}");
    let metrics = mesh.daemon("web").metrics()?;
    ensure!(metrics.sum("meshd_tun_refused_total", &[("reason", "unknown")]) >= 1.0, "the reset was not counted");
    Ok(())
}

#[test]
fn a_connection_cut_by_a_stop_is_told_before_the_device_goes() -> Result<()> {
    let mesh = mesh()?;
    let smtp = mesh.virtual_address("web", "smtp.shop.mesh")?.to_string();
    let script = Program::new("bash").args(["-c", "exec 3<>/dev/tcp/$0/25 && cat <&3", &smtp]);
    let listening = mesh.host("web").spawn(&mesh.in_unit("web", "checkout", script))?;
    until(DEADLINE, "the greeting", || listening.stdout().starts_with("220 "))?;
    let web = mesh.daemon("web");
    web.signal(Signal::SIGTERM)?;
    until(DEADLINE, "the drain", || web.log().contains("draining"))?;
    web.signal(Signal::SIGTERM)?;
    until(DEADLINE, "meshd's end", || !web.is_running())?;
    listening.finish(DEADLINE)?;
    Ok(())
}

#[test]
fn what_the_network_sends_to_a_virtual_ip_is_not_captured_even_by_a_router() -> Result<()> {
    let mesh = mesh()?;
    let (web, stranger, target) = (mesh.host("web"), mesh.host("pki"), virtual_ips(&mesh)?[0]);
    web.command("sysctl", &["-q", "-w", "net.ipv4.ip_forward=1"])?;
    stranger.command("ip", &["route", "add", &format!("{}/32", target.ip()), "via", &web.address().to_string()])?;
    let connected = stranger.within(|| TcpStream::connect_timeout(&target, SWALLOWED).map(drop))?;
    ensure_unreachable(connected, "a stranger connecting")?;
    let metrics = mesh.daemon("web").metrics()?;
    ensure!(metrics.sum("meshd_tun_connections", &[]) < 0.5, "it got into the table");
    Ok(())
}

#[test]
fn the_listener_of_the_device_dialled_directly_is_refused() -> Result<()> {
    let mesh = mesh()?;
    mesh.curl("web", "checkout", &["--max-time", "5", &format!("http://{LISTENER}/")])?;
    until(DEADLINE, "the loop counted", || refused(&mesh, "web", "loop").is_ok_and(|count| count >= 1.0))
}
