//! Servers others wrote that no package has: built from their Go modules, pinned in `tests/servers`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::{cache, packages};

const GO_MOD: &str = include_str!("../servers/go.mod");
const GO_SUM: &str = include_str!("../servers/go.sum");
const KUBE_APISERVER: &str = "kube-apiserver";
const KUBE_APISERVER_PACKAGE: &str = "k8s.io/kubernetes/cmd/kube-apiserver";

/// Where Kubernetes' API server is: what the contributor has is good enough, otherwise it is built (minutes, once).
pub fn kube_apiserver() -> Result<PathBuf> {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(|assets| Path::new(&assets).join(KUBE_APISERVER));
    let ready = assets.filter(|path| path.is_file()).or_else(|| packages::find(KUBE_APISERVER));
    match ready {
        Some(path) => Ok(path),
        None => built(KUBE_APISERVER, KUBE_APISERVER_PACKAGE),
    }
}

fn built(name: &str, package: &str) -> Result<PathBuf> {
    let Some(go) = go() else {
        bail!("no {name}: neither in KUBEBUILDER_ASSETS nor on PATH, and no Go toolchain to build it with");
    };
    let mut hasher = DefaultHasher::new();
    (GO_MOD, GO_SUM, package).hash(&mut hasher);
    let directory = cache::directory_of(&format!("{name}-{:016x}", hasher.finish()), |directory| {
        println!("Building {name} from its Go module (minutes): {}", directory.display());
        std::fs::create_dir_all(directory)?;
        std::fs::write(directory.join("go.mod"), GO_MOD)?;
        std::fs::write(directory.join("go.sum"), GO_SUM)?;
        let mut build = Command::new(go);
        build.args(["build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", name, package]);
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
