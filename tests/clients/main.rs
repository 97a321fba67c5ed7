//! The Workload API and secret discovery as clients see them that others wrote, unmodified: PyPI's `spiffe` (on gRPC's C
//! core), Envoy, openssl. Run by `cargo xtask test`; needs root, and PyPI's packages.

mod bridge;
mod envoy;
mod federation;
mod pypi;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use meshd_tests::mesh::Mesh;
use meshd_tests::process::Program;
use meshd_tests::python;

/// Longer than anything here takes: what it bounds is a failing test.
const DEADLINE: Duration = Duration::from_secs(30);

/// A script as root in a unit of a host: where Python is, not every user may be.
fn script(mesh: &Mesh, host: &str, unit: &str, name: &str, text: &str) -> Result<Program> {
    let path: PathBuf = mesh.host(host).directory().join(name);
    std::fs::write(&path, text)?;
    Ok(Program::new(python::python(&python::environment()?)).arg(path).unit(unit))
}
