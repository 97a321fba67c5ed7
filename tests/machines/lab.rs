//! The harness itself: what the other scenarios take for granted.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use meshd_tests::lab::Lab;
use meshd_tests::machine::Machine;

#[test]
fn what_is_written_on_a_machine_is_there_after_a_reboot_and_its_processes_are_others() -> Result<()> {
    let lab = Lab::new(&["one"])?;
    let mut machine = Machine::boot(&lab, "one", &[("/etc/seeded", "before it booted\n")])?;
    machine.write("/etc/written", "while it ran\n")?;
    let first = machine.command("cat", &["/proc/1/stat"])?;
    ensure!(first.starts_with("1 (systemd)"), "another PID 1: {first}");
    machine.reboot()?;
    ensure!(machine.command("cat", &["/proc/1/stat"])? != first, "the same systemd still runs");
    ensure!(machine.read("/etc/seeded")? == "before it booted\n" && machine.read("/etc/written")? == "while it ran\n");
    Ok(())
}

#[test]
fn a_machine_that_nobody_ended_goes_with_its_lab() -> Result<()> {
    let lab = Lab::new(&["one"])?;
    let (name, directory) = (lab.name().to_owned(), lab.directory().to_owned());
    let machine = Machine::boot(&lab, "one", &[])?;
    let outside = machine.path("/")?;
    ensure!(outside.join("etc/hostname").exists(), "{} is not the machine", outside.display());
    // As after SIGKILL to the process that booted it: what a sweep does is all that happens.
    std::mem::forget(machine);
    Lab::remove(&name);
    ensure!(!Lab::exists(&name) && !directory.exists(), "namespaces or files are left");
    ensure!(!outside.join("etc/hostname").exists(), "its processes are left");
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(&name), "mounts are left:\n{mounts}");
    for hierarchy in cgroup_mounts(&mounts) {
        ensure!(!Path::new(hierarchy).join(format!("{name}.slice")).exists(), "cgroups are left in {hierarchy}");
    }
    Ok(())
}

fn cgroup_mounts(mountinfo: &str) -> impl Iterator<Item = &str> {
    mountinfo.lines().filter(|line| line.contains(" - cgroup")).filter_map(|line| line.split(' ').nth(4))
}
