//! The mesh port is no open proxy, and nonsense there hurts nobody.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{self, MESH_PORT, Plan, ServicePlan};
use meshd_tests::wait::until;

use crate::{DEADLINE, ask, ensure_refused, failed_handshakes, refused};

#[test]
fn a_port_that_is_no_service_there_is_refused_there() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let wrong =
        ServicePlan { ports: vec![80, 81], hosts: vec!["api-1".to_owned()], ..ServicePlan::new("payments", 80) };
    mesh.daemon("web").resource("payments.yaml", &plan::document(&wrong, &mesh.endpoints(&wrong)))?;
    until(DEADLINE, "the far side to refuse port 81", || {
        let answer = mesh.curl("web", "checkout", &["--max-time", "5", "http://payments.shop.mesh:81/"]);
        answer.is_ok_and(|answer| !answer.success())
            && refused(&mesh, "api-1", "unknown_target").is_ok_and(|count| count >= 1.0)
    })?;
    ask(&mesh)?;
    Ok(())
}

#[test]
fn a_port_the_service_does_not_have_is_refused_here() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    ensure_refused(&mesh.curl("web", "checkout", &["--max-time", "5", "http://payments.shop.mesh:8080/"])?)?;
    ensure!(refused(&mesh, "api-1", "unknown_target")? < 0.5, "it was asked for over there");
    ask(&mesh)?;
    Ok(())
}

#[test]
fn nonsense_on_the_mesh_port_is_counted_and_disturbs_nothing() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    ask(&mesh)?;
    let server = SocketAddr::from((mesh.host("api-1").address(), MESH_PORT));
    let nonsense: [&[u8]; 3] = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", &[0xff; 3000], &[22, 3, 1, 0, 5, 1, 0, 0, 1, 0]];
    for bytes in nonsense {
        mesh.host("web").within(|| say(server, bytes))??;
    }
    until(DEADLINE, "three refusals counted", || failed_handshakes(&mesh, "api-1").is_ok_and(|count| count >= 3.0))
        .with_context(|| mesh.daemon("api-1").metrics_text().unwrap_or_default())?;
    ask(&mesh)?;
    Ok(())
}

/// Says it and reads until the other side closes.
fn say(server: SocketAddr, bytes: &[u8]) -> Result<()> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(bytes)?;
    let mut answer = Vec::new();
    // A reset is as good an end as any.
    if let Err(error) = stream.read_to_end(&mut answer) {
        ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "it hung on to nonsense: {error}");
    }
    ensure!(answer.len() < 64, "it had much to say: {answer:?}");
    Ok(())
}
