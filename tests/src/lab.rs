//! Hosts as network namespaces on one bridge.
//!
//! The bridge lives in a namespace of its own ("switch"), so the machine's interfaces, routes, firewall and addresses
//! are neither touched nor in the way. A lab belongs to one process: it is removed on drop, and the next lab of any
//! process sweeps what a killed one left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

use crate::command::{run, run_with_input, try_run};
use crate::host::Host;
use crate::{binaries, cgroup};

const PREFIX: &str = "ml";
/// Not TMPDIR: programs of several users must get there.
const DIRECTORY: &str = "/tmp";
const NETNS_DIRECTORY: &str = "/run/netns";
const SWITCH: &str = "switch";
const SUBNET: u8 = 87;

pub struct Lab {
    name: String,
    directory: PathBuf,
    slice: Option<PathBuf>,
    hosts: Vec<Host>,
}

impl Lab {
    /// A lab of this process, with one host per name, at 10.87.0.11 and up.
    pub fn new(hosts: &[&str]) -> Result<Self> {
        static SWEEP: Once = Once::new();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        SWEEP.call_once(sweep);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self::named(&format!("{PREFIX}{}x{count}", std::process::id()), hosts)
    }

    /// A lab under a name of the caller's choice, for one that outlives the process.
    pub fn named(name: &str, hosts: &[&str]) -> Result<Self> {
        let directory = directory_of(name);
        fs::create_dir(&directory)
            .with_context(|| format!("cannot create the lab directory {}", directory.display()))?;
        let mut lab = Self { name: name.to_owned(), directory, slice: cgroup::create_slice(name), hosts: Vec::new() };
        lab.write_enter_script()?;
        lab.make_switch()?;
        for (index, host) in hosts.iter().enumerate() {
            let host = lab.make_host(host, index)?;
            lab.hosts.push(host);
        }
        Ok(lab)
    }

    pub fn host(&self, name: &str) -> Host {
        let found = self.hosts.iter().find(|host| host.name() == name);
        found.unwrap_or_else(|| panic!("no host {name} in this lab")).clone()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// False on machines without a writable cgroup2: workloads are then told apart by uid only.
    pub fn has_units(&self) -> bool {
        self.slice.is_some()
    }

    /// Ends every process of a lab and removes all traces; fine to call when there is nothing left.
    pub fn remove(name: &str) {
        cgroup::remove_slice(name);
        for netns in namespaces().into_iter().filter(|netns| lab_of(netns) == name) {
            end_processes_in(&netns);
            try_run("ip", &["netns", "delete", &netns]);
        }
        unmount_below(&directory_of(name));
        let _ = fs::remove_dir_all(directory_of(name));
    }

    pub fn exists(name: &str) -> bool {
        directory_of(name).exists() || namespaces().iter().any(|netns| lab_of(netns) == name)
    }

    /// What programs of a test said stays in `target/<profile>/lab-logs/<test>`.
    fn save_logs(&self) {
        let thread = std::thread::current();
        let (Some(test), Ok(programs)) = (thread.name().filter(|name| name.contains("::")), binaries::directory())
        else {
            return;
        };
        let kept = programs.join("lab-logs").join(test);
        let _ = fs::remove_dir_all(&kept);
        for host in &self.hosts {
            let _ = fs::create_dir_all(kept.join(host.name()));
            for logs in ["log", "meshd/log"] {
                let files = fs::read_dir(host.directory().join(logs)).into_iter().flatten().filter_map(Result::ok);
                for file in files {
                    let _ = fs::copy(file.path(), kept.join(host.name()).join(file.file_name()));
                }
            }
        }
    }

    fn write_enter_script(&self) -> Result<()> {
        let text = include_str!("enter.sh")
            .replace("@SLICE@", &self.slice.as_ref().map(|slice| slice.display().to_string()).unwrap_or_default())
            .replace("@CGROUPS@", &cgroup::mount_point().map(|mount| mount.display().to_string()).unwrap_or_default())
            .replace("@LAB@", &self.name)
            .replace("@DIRECTORY@", &self.directory.display().to_string())
            .replace("@PROGRAMS@", &binaries::directory()?.display().to_string());
        fs::create_dir(self.directory.join("bin"))?;
        if Path::new("/dev/net/tun").exists() {
            // Open to everybody, as udev makes it on real hosts: a device takes CAP_NET_ADMIN anyway.
            let tun = self.directory.join("tun").display().to_string();
            run("mknod", &["--mode=0666", &tun, "c", "10", "200"])?;
        }
        let path = self.directory.join("enter");
        fs::write(&path, text)?;
        // Daemons run as their own users and must reach their files below.
        fs::set_permissions(&self.directory, fs::Permissions::from_mode(0o755))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    fn make_switch(&self) -> Result<()> {
        let switch = self.netns(SWITCH);
        run("ip", &["netns", "add", &switch])?;
        let commands = format!(
            "link add bridge type bridge\nlink set bridge up\nlink set lo up\n\
             address add 10.{SUBNET}.0.1/24 dev bridge\n"
        );
        run_with_input("ip", &["-n", &switch, "-batch", "-"], &commands)?;
        try_run("ip", &["-n", &switch, "address", "add", "fd00:87::1/64", "dev", "bridge", "nodad"]);
        Ok(())
    }

    fn make_host(&self, name: &str, index: usize) -> Result<Host> {
        let number = 11 + u8::try_from(index).context("too many hosts")?;
        ensure!(number < 255, "too many hosts for one lab");
        let (netns, switch) = (self.netns(name), self.netns(SWITCH));
        run("ip", &["netns", "add", &netns])?;
        let port = format!("port{number}");
        let plug = format!(
            "link add {port} type veth peer name eth0 netns {netns}\nlink set {port} master bridge\nlink set {port} up\n"
        );
        run_with_input("ip", &["-n", &switch, "-batch", "-"], &plug)?;
        // A default route, as real hosts have: virtual addresses must be routable to be caught.
        let address = format!(
            "link set lo up\nlink set eth0 up\naddress add 10.{SUBNET}.0.{number}/24 dev eth0\n\
             route add default via 10.{SUBNET}.0.1\n"
        );
        run_with_input("ip", &["-n", &netns, "-batch", "-"], &address)?;
        let address6 = format!("fd00:87::{number:x}");
        try_run("ip", &["-n", &netns, "address", "add", &format!("{address6}/64"), "dev", "eth0", "nodad"]);
        try_run("ip", &["-n", &netns, "route", "add", "default", "via", "fd00:87::1"]);
        Host::create(name, &netns, &self.directory, [10, SUBNET, 0, number].into(), address6.parse()?)
    }

    fn netns(&self, host: &str) -> String {
        format!("{}.{host}", self.name)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.save_logs();
        Self::remove(&self.name);
    }
}

fn directory_of(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

/// Disks of a test that was killed.
fn unmount_below(directory: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for place in places.filter(|place| Path::new(place).starts_with(directory)) {
        try_run("umount", &["--lazy", place]);
    }
}

fn namespaces() -> Vec<String> {
    let Ok(entries) = fs::read_dir(NETNS_DIRECTORY) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

fn lab_of(netns: &str) -> &str {
    netns.split('.').next().unwrap_or(netns)
}

fn end_processes_in(netns: &str) {
    let Ok(pids) = run("ip", &["netns", "pids", netns]) else { return };
    let own = std::process::id();
    for pid in pids.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()).filter(|pid| *pid != own) {
        let Ok(pid) = i32::try_from(pid) else { continue };
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
}

/// Removes the labs of processes that are gone.
fn sweep() {
    let directories = fs::read_dir(DIRECTORY).into_iter().flatten();
    let directories = directories.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let names = namespaces().into_iter().map(|netns| lab_of(&netns).to_owned());
    for name in names.chain(cgroup::labs()).chain(directories) {
        if owner(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            Lab::remove(&name);
        }
    }
}

/// The process a lab's name says it belongs to.
fn owner(name: &str) -> Option<u32> {
    let (pid, count) = name.strip_prefix(PREFIX)?.split_once('x')?;
    count.parse::<u32>().ok()?;
    pid.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_is_known_by_its_namespaces() {
        assert_eq!(lab_of("ml123x4.api-1"), "ml123x4");
        assert_eq!(lab_of("meshd-demo.api-1"), "meshd-demo");
        assert_eq!(lab_of("somebody"), "somebody");
    }

    #[test]
    fn only_names_of_our_shape_have_an_owner() {
        assert_eq!(owner("ml123x4"), Some(123));
        assert_eq!(owner("meshd-demo"), None);
        assert_eq!(owner("mlx"), None);
        assert_eq!(owner("ml12xyz"), None);
    }
}
