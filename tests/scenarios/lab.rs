//! The harness itself: what the other scenarios take for granted.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use meshd_tests::lab::Lab;
use meshd_tests::process::Program;
use meshd_tests::wait::until;

use crate::DEADLINE;

const PORT: u16 = 7000;

#[test]
fn a_program_runs_in_its_hosts_network_and_its_units_cgroup() -> Result<()> {
    let lab = Lab::new(&["one", "two"])?;
    let host = lab.host("two");
    let show = "ip -4 -o address show eth0; cat /proc/self/cgroup /etc/resolv.conf; id -u";
    let program = Program::new("sh").args(["-c", show]).unit("shown.service").uid(4711);
    let output = host.run(&program)?.expect_success("showing where it runs")?;
    ensure!(output.contains(&host.address().to_string()), "not the host's network: {output}");
    ensure!(output.contains("nameserver 127.0.0.1\n"), "not the host's resolv.conf: {output}");
    ensure!(output.ends_with("4711\n"), "not the user: {output}");
    ensure!(
        !lab.has_units() || output.lines().any(|line| line == "0::/shown.service"),
        "not the unit's cgroup: {output}"
    );
    Ok(())
}

#[test]
fn nothing_is_left_of_a_lab() -> Result<()> {
    let lab = Lab::new(&["one"])?;
    let (name, directory) = (lab.name().to_owned(), lab.directory().to_owned());
    let mut process = lab.host("one").spawn(&Program::new("sleep").arg("1000"))?;
    let program = format!("/proc/{}/comm", process.pid());
    until(DEADLINE, "sleep to run", || fs::read_to_string(&program).is_ok_and(|name| name == "sleep\n"))?;
    drop(lab);
    ensure!(!Lab::exists(&name), "namespaces are left");
    ensure!(!directory.exists(), "files are left");
    process.wait(DEADLINE)?;
    ensure!(!Path::new("/proc").join(process.pid().to_string()).join("exe").exists(), "the program is left");
    Ok(())
}

#[test]
fn a_black_hole_swallows_and_heals() -> Result<()> {
    let lab = Lab::new(&["one", "two"])?;
    let (one, two) = (lab.host("one"), lab.host("two"));
    let listen = format!("0.0.0.0:{PORT}");
    let _server = two.start_testkit(&two.testkit(&["greeter", "--listen", &listen, "--name", "two"]))?;
    let target = format!("{}:{PORT}", two.address());
    let talk = one.testkit(&["talk", "--target", &target]);
    let fault = two.black_hole(one.address())?;
    let mut silent = one.spawn(&talk)?;
    ensure!(silent.is_running(), "it ended at once: {}", silent.output());
    drop(fault);
    one.run(&talk)?.expect_success("talking once healed")?;
    silent.wait(DEADLINE)?;
    Ok(())
}

#[test]
fn a_capture_shows_what_was_not_encrypted() -> Result<()> {
    let lab = Lab::new(&["one", "two"])?;
    let (one, two) = (lab.host("one"), lab.host("two"));
    let listen = format!("0.0.0.0:{PORT}");
    let _server = two.start_testkit(&two.testkit(&["greeter", "--listen", &listen]))?;
    let capture = one.capture("plain.pcap")?;
    one.within(|| say((two.address(), PORT).into(), "a-secret"))??;
    let pcap = capture.finish()?;
    ensure!(pcap.contains(b"a-secret"), "the capture missed it");
    ensure!(pcap.outside(&[15008]).count() == 2, "both directions are outside the mesh: {:?}", pcap.streams);
    ensure!(!pcap.tls_on(PORT).foreign.is_empty(), "plaintext passed for TLS");
    Ok(())
}

fn say(server: std::net::SocketAddr, words: &str) -> Result<()> {
    let mut stream = TcpStream::connect(server).context("cannot connect")?;
    stream.write_all(format!("{words}\r\n").as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}
