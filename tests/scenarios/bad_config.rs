//! Input of operators that is wrong.

use std::fs;

use anyhow::{Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{self, Plan, ServicePlan};
use meshd_tests::wait::until;

use crate::{DEADLINE, ask};

#[test]
fn an_invalid_resource_file_keeps_the_last_good_one_in_force() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let service = ServicePlan { hosts: vec!["api-1".to_owned()], ..ServicePlan::new("payments", 80) };
    let good = plan::document(&service, &mesh.endpoints(&service));
    let bad = good.replace("port: 80", "port: eighty");
    let line = 1 + bad.lines().position(|line| line.contains("eighty")).unwrap_or_default();
    let web = mesh.daemon("web");
    web.resource("payments.yaml", &bad)?;
    let place = format!("payments.yaml:{line}");
    let status_says = || web.run(&["status"]).is_ok_and(|answer| answer.stdout.contains(&place));
    until(DEADLINE, &format!("`meshd status` to say {place}"), status_says)?;
    ask(&mesh)?;
    web.resource("payments.yaml", &good)?;
    until(DEADLINE, "`meshd status` to be content again", || !status_says())?;
    ask(&mesh)?;
    Ok(())
}

#[test]
fn an_unknown_key_is_refused_with_its_line_and_a_suggestion() -> Result<()> {
    let plan = Plan::shop_with_one_server();
    let lab = std::sync::Arc::new(meshd_tests::lab::Lab::new(&plan.host_names())?);
    let mesh = Mesh::prepare(lab, plan)?;
    let web = mesh.daemon("web");
    let text = fs::read_to_string(web.config())?.replace("threads =", "thread =");
    let line = 1 + text.lines().position(|line| line.starts_with("thread =")).unwrap_or_default();
    fs::write(web.config(), text)?;
    let answer = web.run(&["run"])?;
    let said = answer.stdout + &answer.stderr;
    ensure!(!answer.status.success(), "it ran: {said}");
    for word in [&format!("meshd.toml:{line}"), "thread", "threads"] {
        ensure!(said.contains(word), "does not say `{word}`: {said}");
    }
    Ok(())
}

#[test]
fn an_enrolment_that_is_wrong_names_file_and_field() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let web = mesh.daemon("web");
    web.stop()?;
    web.enrol("[[workload]]\nunit = \"checkout.service\"\nnamespace = \"shop\"\nname = \"Check Out\"\n")?;
    let answer = web.run(&["run"])?;
    let said = answer.stdout + &answer.stderr;
    ensure!(!answer.status.success(), "it ran: {said}");
    ensure!(
        said.contains("harness.toml") && said.contains("name") && said.contains("Check Out"),
        "not where and what: {said}"
    );
    Ok(())
}
