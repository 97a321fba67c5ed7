//! Nobody is locked out: SSH works whatever meshd does.

use anyhow::{Context, Result, ensure};
use meshd_tests::machine::MachineMesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::Process;
use meshd_tests::wait::until;

use crate::{DEADLINE, ask};

/// Says something several times a second until the connection ends.
const CHATTER: &str = "while echo still here; do sleep 0.05; done";

#[test]
fn ssh_works_before_during_and_after_meshd() -> Result<()> {
    let mesh = MachineMesh::prepare(Plan::shop_with_one_server(), "auto")?;
    let mut session = mesh.ssh("api-1", CHATTER)?;
    let mut check = |when: &str| {
        alive(&mut session).with_context(|| format!("the session opened before meshd, {when}"))?;
        let login = mesh.ssh("api-1", "echo welcome")?.finish(DEADLINE)?;
        let said = login.expect_success(&format!("a new session {when}"))?;
        ensure!(said == "welcome\n", "{when}: {said}");
        Ok(())
    };
    check("before meshd runs")?;
    mesh.start_daemons()?;
    ask(&mesh, "checkout")?;
    check("while meshd runs")?;
    let daemon = mesh.daemon("api-1");
    daemon.stop()?;
    check("while meshd is stopped")?;
    daemon.start()?;
    daemon.kill()?;
    check("just after meshd was killed")?;
    daemon.stop()?;
    daemon.run(&["intercept", "revert"])?.expect_success("meshd intercept revert")?;
    check("after everything was reverted")?;
    Ok(())
}

/// What it says is still arriving.
fn alive(session: &mut Process) -> Result<()> {
    let said = session.stdout().len();
    until(DEADLINE, "more from the session", || session.stdout().len() > said || !session.is_running())?;
    ensure!(session.is_running(), "it ended: {}", session.stderr());
    Ok(())
}
