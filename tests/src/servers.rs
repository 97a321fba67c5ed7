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
}

const KUBERNETES_MOD: &str = include_str!("../servers/kubernetes/go.mod");
const KUBERNETES_SUM: &str = include_str!("../servers/kubernetes/go.sum");

const KUBE_APISERVER: Recipe = Recipe {
    name: "kube-apiserver",
    package: "k8s.io/kubernetes/cmd/kube-apiserver",
    go_mod: KUBERNETES_MOD,
    go_sum: KUBERNETES_SUM,
    main: None,
};

const ISTIO_CLIENT: Recipe = Recipe {
    name: "istio-client",
    package: ".",
    go_mod: include_str!("../servers/istio-client/go.mod"),
    go_sum: include_str!("../servers/istio-client/go.sum"),
    main: Some(include_str!("../servers/istio-client/main.go")),
};

/// Kubernetes' API server.
pub fn kube_apiserver() -> Result<PathBuf> {
    theirs(&KUBE_APISERVER)
}

/// Istio's own client for certificates; nobody but we has a program of it.
pub fn istio_client() -> Result<PathBuf> {
    built(&ISTIO_CLIENT)
}

/// What the contributor has is good enough, otherwise it is built (minutes, once).
fn theirs(recipe: &Recipe) -> Result<PathBuf> {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(|assets| Path::new(&assets).join(recipe.name));
    let ready = assets.filter(|path| path.is_file()).or_else(|| packages::find(recipe.name));
    ready.map_or_else(|| built(recipe), Ok)
}

fn built(recipe: &Recipe) -> Result<PathBuf> {
    let name = recipe.name;
    let Some(go) = go() else {
        bail!("no {name}: neither in KUBEBUILDER_ASSETS nor on PATH, and no Go toolchain to build it with");
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
        let mut build = Command::new(go);
        build.args(["build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", name, recipe.package]);
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
