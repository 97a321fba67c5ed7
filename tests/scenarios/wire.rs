//! What an eavesdropper sees.

use anyhow::{Result, ensure};
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{MESH_PORT, PKI_PORT, Plan};
use std::sync::Arc;

const SECRET: &str = "order-4711-for-somebody";

#[test]
fn nothing_but_tls_records_crosses_the_wire() -> Result<()> {
    let plan = Plan::shop_with_one_server();
    let mut mesh = Mesh::prepare(Arc::new(Lab::new(&plan.host_names())?), plan)?;
    mesh.start_pki()?;
    mesh.join_all()?;
    let capture = mesh.host("web").capture("web.pcap")?;
    mesh.start_all()?;
    let url = format!("http://payments.shop.mesh/{SECRET}");
    mesh.curl("web", "checkout", &["--fail", &url])?.expect_success("the request")?;
    let talk = ["talk", "--target", "smtp.shop.mesh:25", "--say", SECRET];
    mesh.host("web").run(&mesh.testkit("web", "billing", &talk))?.expect_success("the talk")?;
    let pcap = capture.finish()?;
    let tls = pcap.tls_on(MESH_PORT);
    ensure!(tls.foreign.is_empty(), "not TLS: {:?}", tls.foreign);
    ensure!(tls.streams >= 4 && tls.records > 10, "two identities, both directions: {tls:?}");
    let others: Vec<_> = pcap.outside(&[MESH_PORT, PKI_PORT]).map(|stream| (stream.from, stream.to)).collect();
    ensure!(others.is_empty(), "beside the mesh: {others:?}");
    ensure!(!pcap.contains(SECRET.as_bytes()), "the secret is readable");
    ensure!(!pcap.contains(b"payments"), "a service's name is readable");
    Ok(())
}
