//! What a host needs to keep serving is on that host.

use anyhow::Result;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;

use crate::{PAYMENTS, ask};

#[test]
fn traffic_flows_while_the_pki_is_down_also_after_a_restart() -> Result<()> {
    let mut mesh = Mesh::start(Plan::shop_with_one_server())?;
    ask(&mesh)?;
    mesh.stop_pki()?;
    ask(&mesh)?;
    mesh.curl("web", "billing", &["--fail", PAYMENTS])?.expect_success("a unit that had not asked before")?;
    for host in ["web", "api-1"] {
        mesh.daemon(host).restart()?;
        ask(&mesh)?;
    }
    Ok(())
}
