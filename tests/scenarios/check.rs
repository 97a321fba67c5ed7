//! `meshd check`, before and after the daemon is there.

use std::net::TcpListener;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{MESH_PORT, Plan};
use serde_json::Value;

/// A host of a lab before meshd ever ran there.
fn clean_host() -> Result<Mesh> {
    let plan = Plan::shop_with_one_server();
    let lab = Arc::new(Lab::new(&plan.host_names())?);
    Mesh::prepare(lab, plan)
}

struct Checked {
    findings: Vec<Value>,
    exit: Option<i32>,
}

impl Checked {
    fn on(mesh: &Mesh, verb: &[&str]) -> Result<Checked> {
        let finished = mesh.daemon("web").run(&[verb, &["-o", "json"]].concat())?;
        let findings = serde_json::from_str(&finished.stdout).with_context(|| format!("not findings: {finished:?}"))?;
        Ok(Checked { findings, exit: finished.exit_code() })
    }

    fn before_install(mesh: &Mesh) -> Result<Checked> {
        Checked::on(mesh, &["check", "--pre"])
    }

    /// The one finding whose name holds these words, as verdict and all that is said.
    fn about(&self, words: &str) -> Result<(&str, String)> {
        let named = |finding: &&Value| finding["check"].as_str().is_some_and(|check| check.contains(words));
        let found = self.findings.iter().find(named).with_context(|| format!("nothing about {words}"))?;
        Ok((found["verdict"].as_str().unwrap_or_default(), found.to_string()))
    }

    fn failed(&self) -> Vec<&Value> {
        self.findings.iter().filter(|finding| finding["verdict"] == "failed").collect()
    }
}

#[test]
fn a_clean_host_is_ready_for_meshd() -> Result<()> {
    let mesh = clean_host()?;
    let checked = Checked::before_install(&mesh)?;
    ensure!(checked.failed().is_empty() && checked.exit == Some(0), "failed: {:#?}", checked.failed());
    for words in ["other mesh", "mark bits", "mesh port", "virtual IPs", "earlier meshd", "firewall", "way to capture"]
    {
        let (verdict, said) = checked.about(words)?;
        ensure!(verdict == "ok", "{said}");
    }
    Ok(())
}

#[test]
fn rules_of_another_mesh_fail_the_check_with_their_owner_and_remedy() -> Result<()> {
    let mesh = clean_host()?;
    let web = mesh.host("web");
    for arguments in ["-N ISTIO_OUTPUT", "-A OUTPUT -p tcp -j ISTIO_OUTPUT"] {
        web.command("iptables", &["-t nat", arguments].join(" ").split(' ').collect::<Vec<_>>())?;
    }
    let checked = Checked::before_install(&mesh)?;
    let (verdict, said) = checked.about("other mesh")?;
    ensure!(verdict == "failed" && said.contains("Istio") && said.contains("istio-clean-iptables"), "{said}");
    ensure!(checked.exit == Some(1), "exit code {:?}", checked.exit);
    Ok(())
}

#[test]
fn another_user_of_the_mark_is_named_and_warned_about() -> Result<()> {
    let mesh = clean_host()?;
    // As Tailscale sets it up (its router, linux).
    let rule = "rule add pref 5210 fwmark 0x80000/0xff0000 lookup main";
    mesh.host("web").command("ip", &rule.split(' ').collect::<Vec<_>>())?;
    let checked = Checked::before_install(&mesh)?;
    let (verdict, said) = checked.about("mark bits")?;
    ensure!(verdict == "warning" && said.contains("Tailscale") && said.contains("[capture] mark"), "{said}");
    ensure!(checked.exit == Some(0), "warnings alone must not fail: {:?}", checked.exit);
    Ok(())
}

#[test]
fn a_taken_mesh_port_is_reported_with_who_has_it() -> Result<()> {
    let mesh = clean_host()?;
    let _taken = mesh.host("web").within(|| TcpListener::bind(("0.0.0.0", MESH_PORT)))??;
    let checked = Checked::before_install(&mesh)?;
    let (verdict, said) = checked.about("mesh port")?;
    let process = format!("process {}", std::process::id());
    ensure!(verdict == "failed" && said.contains(&process) && said.contains("mesh_listen"), "{said}");
    Ok(())
}

#[test]
fn a_firewall_that_drops_peers_is_noticed() -> Result<()> {
    let mesh = clean_host()?;
    let rules =
        "table inet filter { chain input { type filter hook input priority 0; policy drop; tcp dport 22 accept; }; }";
    mesh.host("web").nft(rules)?;
    let checked = Checked::before_install(&mesh)?;
    let (verdict, said) = checked.about("firewall")?;
    ensure!(verdict == "warning" && said.contains("tcp dport 15008 accept"), "{said}");
    let (verdict, said) = checked.about("owns a connection")?;
    ensure!(verdict == "failed" && said.contains("drops what comes from lo"), "{said}");
    Ok(())
}

#[test]
fn what_a_dead_meshd_left_is_found_and_how_to_remove_it() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let running = Checked::on(&mesh, &["check"])?;
    ensure!(running.failed().is_empty() && running.exit == Some(0), "failed: {:#?}", running.failed());
    let (verdict, said) = running.about("capture rules")?;
    ensure!(verdict == "ok", "{said}");
    mesh.daemon("web").kill()?;
    if meshd_tests::backend::chosen() != "tun" {
        let (verdict, said) = Checked::before_install(&mesh)?.about("earlier meshd").map(|(v, s)| (v.to_owned(), s))?;
        ensure!(verdict == "warning" && said.contains("intercept revert"), "{said}");
    }
    ensure!(Checked::on(&mesh, &["check"])?.exit == Some(1), "a host without its daemon is not all right");
    Ok(())
}

#[test]
fn rules_removed_behind_a_dead_daemon_are_missed() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    mesh.daemon("web").kill()?;
    for family in ["-4", "-6"] {
        mesh.host("web").command("ip", &[family, "rule", "flush"])?;
    }
    let (verdict, said) = Checked::on(&mesh, &["check"])?.about("capture rules").map(|(v, s)| (v.to_owned(), s))?;
    ensure!(verdict == "failed", "{said}");
    Ok(())
}
