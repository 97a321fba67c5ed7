//! Other tools that remove meshd's rules and routes.

use anyhow::{Context, Result, ensure};
use meshd_tests::backend;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;

use crate::crash::kernel_state;
use crate::{DEADLINE, ask, ensure_refused};

fn heals(mesh: &Mesh, host: &str) -> f64 {
    mesh.daemon(host).metrics().map_or(0.0, |metrics| metrics.sum("meshd_capture_healed_total", &[]))
}

/// Without the cgroups of units: those of other labs on this machine have the same names, and come and go. Sorted:
/// policy rules of one preference are listed in the order they were added.
fn rules(mesh: &Mesh) -> Result<Vec<String>> {
    let state = kernel_state(&mesh.host("api-1"))?;
    let mut lines: Vec<String> = state.lines().filter(|line| !line.contains("cgroup")).map(str::to_owned).collect();
    lines.sort();
    Ok(lines)
}

fn is_nft() -> bool {
    matches!(backend::chosen().as_str(), "auto" | "nft-tproxy" | "nft-redirect")
}

#[test]
fn whatever_is_removed_is_back_soon_and_counted() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let host = mesh.host("api-1");
    let before = rules(&mesh)?;
    let mut attacks: Vec<&[&str]> = vec![
        &["ip", "rule", "del", "pref", "100"],
        &["ip", "-6", "rule", "del", "pref", "100"],
        &["ip", "route", "flush", "table", "7471"],
    ];
    if is_nft() {
        attacks.extend([&["nft", "flush", "ruleset"][..], &["nft", "delete", "table", "inet", "meshd"]]);
        attacks.push(&["nft", "flush", "chain", "inet", "meshd", "strict_stranger"]);
    }
    for (count, attack) in attacks.iter().enumerate() {
        host.command(attack[0], &attack[1..])?;
        let back = || rules(&mesh).is_ok_and(|now| now == before) && heals(&mesh, "api-1") > count as f64;
        until(DEADLINE, &format!("what `{}` removed to be back", attack.join(" ")), back).with_context(|| {
            let now = rules(&mesh).unwrap_or_default();
            format!("there is:\n{now:#?}\nbefore it was:\n{before:#?}\n{}", mesh.daemon("api-1").log())
        })?;
    }
    ensure!(heals(&mesh, "api-1") == attacks.len() as f64, "counted {} heals", heals(&mesh, "api-1"));
    ask(&mesh)?;
    let strict = format!("http://{}:8080/", host.address());
    if backend::can_be_strict() {
        ensure_refused(&mesh.curl("web", "stray", &["--max-time", "3", &strict])?)?;
    }
    Ok(())
}

#[test]
fn what_another_tool_does_to_its_own_rules_is_none_of_ours() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let host = mesh.host("web");
    host.nft("table inet other {\n chain c { type filter hook input priority 0; }\n}\n")?;
    host.command("ip", &["route", "add", "192.0.2.0/24", "dev", "lo"])?;
    // The next heal tells that everything before it was looked at.
    host.command("ip", &["rule", "del", "pref", "100"])?;
    until(DEADLINE, "the rule to be back", || heals(&mesh, "web") >= 1.0)?;
    ensure!(heals(&mesh, "web") == 1.0, "healed what was not broken");
    ensure!(
        host.command("nft", &["list", "table", "inet", "other"])?.contains("hook input"),
        "the other table is gone"
    );
    Ok(())
}

#[test]
fn whoever_keeps_removing_rules_is_named_and_not_fought() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let (host, web) = (mesh.host("web"), mesh.daemon("web"));
    let mut flushed = Ok(String::new());
    let named = || {
        let present = host.command("nft", &["list", "table", "inet", "meshd"]).is_ok();
        if present {
            flushed = host.command("nft", &["flush", "ruleset"]);
        }
        web.log().lines().any(|line| line.contains("again and again") && line.contains("nft (pid "))
    };
    until(DEADLINE * 3, "meshd to say who to look for", named)?;
    flushed.context("flushing")?;
    let status = web.json("intercept status")?;
    ensure!(status["daemon"]["fighting"] == true, "status is content: {status}");
    Ok(())
}
