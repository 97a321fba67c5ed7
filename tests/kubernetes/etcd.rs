//! The harness's etcd: what scenarios on it take for granted.

use std::sync::Arc;

use anyhow::{Result, ensure};
use meshd_tests::etcd::Etcd;
use meshd_tests::lab::Lab;
use meshd_tests::wait::until;

use crate::DEADLINE;

#[test]
fn an_etcd_lets_a_user_have_its_prefix_alone_and_survives_a_member() -> Result<()> {
    let lab = Arc::new(Lab::new(&["store"])?);
    let mut etcd = Etcd::start(&lab.host("store"), 3)?;
    etcd.add_user("meshd", "/meshd/")?;
    etcd.ctl("meshd", &["put", "/meshd/a", "1"])?.expect_success("a write of its own")?;
    let other = etcd.ctl("meshd", &["get", "/other"])?;
    ensure!(!other.success() && other.stderr.contains("permission denied"), "{other:?}");
    let url = format!("{}/v3/kv/range", etcd.endpoints()[0]);
    let authority = etcd.authority().display().to_string();
    let anonymous = lab.host("store").command("curl", &["-sS", "--cacert", &authority, "-d", "{}", &url]);
    ensure!(anonymous.is_err(), "whoever shows no certificate got {anonymous:?}");
    // What curl says depends on whether it still writes when it is refused: the server names the reason always.
    let refused = || etcd.output().contains("client didn't provide a certificate");
    until(DEADLINE, "a refusal for want of a certificate", refused)?;

    etcd.kill_member(0)?;
    let read = || etcd.ctl("meshd", &["get", "/meshd/a"]).is_ok_and(|got| got.stdout == "/meshd/a\n1\n");
    until(DEADLINE, "a read from two of three members", read)?;
    etcd.restart_empty()?;
    let left = etcd.ctl("root", &["get", "--prefix", "/"])?.expect_success("a read")?;
    ensure!(left.is_empty(), "it has still {left}");
    Ok(())
}
