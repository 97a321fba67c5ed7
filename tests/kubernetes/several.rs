//! Several backends at once: they disagree, one of them goes, all of them are gone while a host boots.

use std::fs;

use anyhow::{Context, Result, ensure};
use meshd_tests::wait::until;
use serde_json::Value;

use crate::DEADLINE;
use crate::applies::{Bed, consul, etcd, kubernetes};

impl Bed {
    /// Who answers so many requests.
    fn answer_all(&self, requests: usize, host: &str) -> Result<()> {
        for _ in 0..requests {
            let asked = self.mesh.curl("web", "checkout", &["-sS", "--max-time", "5", "http://payments.shop.mesh/"])?;
            let body = asked.expect_success("a request")?;
            ensure!(body.contains(host), "answered by {body}, not {host}");
        }
        Ok(())
    }

    fn source(&self, name: &str) -> Result<Value> {
        let status = self.mesh.daemon("web").json("status")?;
        let sources = status["sources"].as_array().context("no sources")?;
        Ok(sources.iter().find(|source| source["name"] == name).context("no such source")?.clone())
    }

    /// Waits until what a source said last is on disk.
    fn is_kept(&self, source: &str, words: &str) -> Result<()> {
        let state = self.mesh.daemon("web").config().with_file_name("").join("../state");
        let file = state.join(format!("directory/{source}.json"));
        until(DEADLINE, &format!("{words} of {source} on disk"), || {
            fs::read_to_string(&file).is_ok_and(|text| text.contains(words))
        })
    }

    /// By the address that is dialled.
    fn row<'a>(&self, rows: &'a [Value], host: &str) -> Option<&'a Value> {
        let dial = format!("{}:15008", self.mesh.host(host).address());
        rows.iter().find(|row| row["dial"] == dial.as_str())
    }
}

#[test]
fn of_two_that_disagree_the_first_holds_both_show_their_age_and_its_last_word_stays_in_force_without_it() -> Result<()>
{
    let mut bed = Bed::make(&[etcd, consul])?;
    let (first, second) = (bed.payments(&["api-1"]), bed.payments(&["api-2"]).replace("port: 80", "port: 81"));
    bed.applies(&bed.backends[1], &bed.payments(&["api-2"]), "created")?;
    bed.answers("api-2")?;
    bed.applies(&bed.backends[0], &first, "created")?;
    bed.answers("api-1")?;
    bed.applies(&bed.backends[1], &second, "changed")?;
    until(DEADLINE, "the second one is shadowed", || {
        bed.source("consul").is_ok_and(|source| source["shadowed"] == serde_json::json!(["payments.shop"]))
    })?;
    let shown = |rows: &[Value]| {
        let from = |host: &str, source: &str| {
            bed.row(rows, host).is_some_and(|row| row["source"] == source && row["age"].is_u64() && row["port"] == 80)
        };
        from("api-1", "etcd") && from("api-2", "consul")
    };
    bed.waits_for("both places, each with its source and age", "payments.shop", shown)?;
    bed.answer_all(20, "api-1")?;

    bed.backends[0].server.kill()?;
    until(DEADLINE, "the loss of the first is named", || {
        bed.source("etcd").is_ok_and(|source| source["errors"].to_string().contains("can be reached"))
    })?;
    let older = |rows: &[Value]| {
        let age = |host: &str| bed.row(rows, host).and_then(|row| row["age"].as_u64());
        matches!((age("api-1"), age("api-2")), (Some(first), Some(second)) if first > second + 3)
    };
    bed.waits_for("the age of what the first said grows", "payments.shop", older)?;
    bed.answer_all(20, "api-1")?;
    // What is down has not become what nobody says: the other one still may not define it.
    ensure!(
        bed.endpoints("payments.shop")?.iter().all(|row| row["port"] == 80),
        "{:?}",
        bed.endpoints("payments.shop")
    );
    bed.mesh.daemon("api-1").stop()?;
    bed.answers("api-2")
}

#[test]
fn a_host_that_boots_while_every_backend_is_down_reaches_what_each_of_them_said() -> Result<()> {
    let mut bed = Bed::make(&[etcd, consul, kubernetes])?;
    let smtp = bed.payments(&["api-2"]).replace("name: payments", "name: smtp").replace("port: 80", "port: 25");
    bed.applies(&bed.backends[0], &bed.payments(&["api-1"]), "created")?;
    bed.applies(&bed.backends[1], &smtp, "created")?;
    bed.applies(&bed.backends[2], &bed.payments(&["api-2"]), "created")?;
    bed.answers("api-1")?;
    let all = |bed: &Bed| {
        let payments = bed.endpoints("payments.shop").is_ok_and(|rows| {
            let from = |host: &str, source: &str| bed.row(&rows, host).is_some_and(|row| row["source"] == source);
            from("api-1", "etcd") && from("api-2", "kubernetes")
        });
        payments && bed.endpoints("smtp.shop").is_ok_and(|rows| rows.len() == 1 && rows[0]["source"] == "consul")
    };
    until(DEADLINE, "what each of them says", || all(&bed))?;
    for (source, words) in [("etcd", "payments"), ("consul", "smtp"), ("kubernetes", "payments")] {
        bed.is_kept(source, words)?;
    }
    for backend in &mut bed.backends {
        backend.server.kill()?;
    }
    let web = bed.mesh.daemon("web");
    web.kill()?;
    web.start()?;
    ensure!(all(&bed), "{:?} {:?}", bed.endpoints("payments.shop"), bed.endpoints("smtp.shop"));
    bed.answer_all(5, "api-1")?;
    let talk = bed.mesh.testkit("web", "checkout", &["talk", "--target", "smtp.shop.mesh:25", "--say", "hello"]);
    let heard = bed.mesh.host("web").run(&talk)?.expect_success("talking to smtp")?;
    ensure!(heard.contains("220 smtp on api-2"), "{heard}");
    bed.mesh.daemon("api-1").stop()?;
    bed.answers("api-2")?;
    for source in ["etcd", "consul", "kubernetes"] {
        until(DEADLINE, &format!("trouble with {source} is named"), || {
            bed.source(source).is_ok_and(|known| known["errors"] != serde_json::json!([]) && known["from_disk"] == true)
        })?;
    }
    Ok(())
}
