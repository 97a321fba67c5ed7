//! Programs others wrote that no package has as current as it takes: built from Go modules pinned in `tests/servers`.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::{cache, packages};

/// A program and the modules it is built of.
struct Recipe {
    name: &'static str,
    package: &'static str,
    go_mod: &'static str,
    go_sum: &'static str,
    /// A program of ours over packages of theirs.
    main: Option<&'static str>,
    /// What tests need: Debian's are older at times.
    oldest: (u32, u32),
}

const BUILD: [&str; 4] = ["build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w"];

const KUBE_APISERVER: Recipe = Recipe {
    name: "kube-apiserver",
    package: "k8s.io/kubernetes/cmd/kube-apiserver",
    go_mod: include_str!("../servers/kubernetes/go.mod"),
    go_sum: include_str!("../servers/kubernetes/go.sum"),
    main: None,
    // Its tokens name the node of a pod.
    oldest: (1, 32),
};

/// Of modules of its own: the API server's must not change with it.
const KUBE_CONTROLLER_MANAGER: Recipe = Recipe {
    name: "kube-controller-manager",
    package: "k8s.io/kubernetes/cmd/kube-controller-manager",
    go_mod: include_str!("../servers/kube-controller-manager/go.mod"),
    go_sum: include_str!("../servers/kube-controller-manager/go.sum"),
    main: None,
    oldest: (1, 32),
};

const ETCD: Recipe = Recipe {
    name: "etcd",
    package: "go.etcd.io/etcd/server/v3",
    go_mod: include_str!("../servers/etcd/go.mod"),
    go_sum: include_str!("../servers/etcd/go.sum"),
    main: None,
    // Progress of watches on request, for Kubernetes' streaming lists.
    oldest: (3, 5),
};

const CONSUL: Recipe = Recipe {
    name: "consul",
    package: "github.com/hashicorp/consul",
    go_mod: include_str!("../servers/consul/go.mod"),
    go_sum: include_str!("../servers/consul/go.sum"),
    main: None,
    // Its configuration of TLS.
    oldest: (1, 12),
};

const ISTIO_CLIENT: Recipe = Recipe {
    name: "istio-client",
    package: ".",
    go_mod: include_str!("../servers/istio-client/go.mod"),
    go_sum: include_str!("../servers/istio-client/go.sum"),
    main: Some(include_str!("../servers/istio-client/main.go")),
    oldest: (0, 0),
};

/// What Go's own library makes of a chain.
const GO_VERIFIER: Recipe = Recipe {
    name: "go-verifier",
    package: ".",
    go_mod: include_str!("../servers/go-verifier/go.mod"),
    go_sum: "",
    main: Some(include_str!("../servers/go-verifier/main.go")),
    oldest: (0, 0),
};

/// Whether all of them are there, or can be built.
pub fn all() -> Result<()> {
    [kube_apiserver, kube_controller_manager, etcd, consul, istio_client, go_verifier]
        .iter()
        .try_for_each(|server| server().map(drop))
}

/// Kubernetes' API server.
pub fn kube_apiserver() -> Result<PathBuf> {
    theirs(&KUBE_APISERVER)
}

/// Kubernetes' controllers.
pub fn kube_controller_manager() -> Result<PathBuf> {
    theirs(&KUBE_CONTROLLER_MANAGER)
}

/// Newer than Debian's.
pub fn etcd() -> Result<PathBuf> {
    theirs(&ETCD)
}

pub fn consul() -> Result<PathBuf> {
    theirs(&CONSUL)
}

/// Istio's own client for certificates; nobody but we has a program of it.
pub fn istio_client() -> Result<PathBuf> {
    built(&ISTIO_CLIENT)
}

/// `go-verifier CHAIN ROOTS`, both PEM: 0 if a client and a server in Go believe it.
pub fn go_verifier() -> Result<PathBuf> {
    built(&GO_VERIFIER)
}

/// What the contributor has is good enough unless it is too old, otherwise it is built (minutes, once).
fn theirs(recipe: &Recipe) -> Result<PathBuf> {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(|assets| Path::new(&assets).join(recipe.name));
    let found = assets.filter(|path| path.is_file()).or_else(|| packages::find(recipe.name));
    let ready = found.filter(|path| version(path).is_some_and(|version| version >= recipe.oldest));
    ready.map_or_else(|| built(recipe), Ok)
}

fn version(program: &Path) -> Option<(u32, u32)> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    version_in(&String::from_utf8_lossy(&output.stdout))
}

/// The first thing that looks like one: `Kubernetes v1.35.4`, `etcd Version: 3.4.23`.
fn version_in(said: &str) -> Option<(u32, u32)> {
    said.split_whitespace().find_map(|word| {
        let mut numbers = word.trim_start_matches('v').split('.');
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    })
}

fn built(recipe: &Recipe) -> Result<PathBuf> {
    let name = recipe.name;
    let Some(go) = go() else {
        let (major, minor) = recipe.oldest;
        bail!(
            "no {name} of {major}.{minor} or later: neither in KUBEBUILDER_ASSETS nor on PATH, and no Go toolchain to build \
             it with"
        );
    };
    let mut hasher = DefaultHasher::new();
    (recipe.go_mod, recipe.go_sum, recipe.package).hash(&mut hasher);
    recipe.main.iter().for_each(|main| main.hash(&mut hasher));
    let directory = cache::directory_of(&format!("{name}-{:016x}", hasher.finish()), |directory| {
        println!("Building {name} from its Go module (minutes): {}", directory.display());
        fs::create_dir_all(directory)?;
        fs::write(directory.join("go.mod"), recipe.go_mod)?;
        fs::write(directory.join("go.sum"), recipe.go_sum)?;
        recipe.main.map_or(Ok(()), |main| fs::write(directory.join("main.go"), main))?;
        // Only what nobody else wants of the machine: it takes minutes.
        let mut build = Command::new("nice");
        build.args(["-n", "19"]).arg(go).args(BUILD).args(["-o", name, recipe.package]);
        let output = build.current_dir(directory).stdin(Stdio::null()).output().context("go does not start")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{name} cannot be built: {}", said.lines().last().unwrap_or_default());
        Ok(())
    })?;
    Ok(directory.join(name))
}

/// Its installer's directory is on few users' PATH, and sudo drops the rest.
fn go() -> Option<PathBuf> {
    packages::find("go").or_else(|| Some(PathBuf::from("/usr/local/go/bin/go")).filter(|path| path.is_file()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_found_in_what_a_server_says() {
        assert_eq!(version_in("Kubernetes v1.35.4\n"), Some((1, 35)));
        assert_eq!(version_in("etcd Version: 3.4.23\nGit SHA: Not provided\n"), Some((3, 4)));
        assert_eq!(version_in("Consul v1.20.6\nRevision x\n"), Some((1, 20)));
        assert_eq!(version_in("usage"), None);
    }
}
