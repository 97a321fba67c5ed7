//! meshd between the two hosts.

use std::sync::Arc;

use anyhow::Result;
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{HostPlan, Plan, Serve, ServicePlan, Workload};

use super::bed::APP;

pub(crate) const CLIENT_UID: u32 = 2003;

pub(crate) struct BenchMesh(Mesh);

impl BenchMesh {
    pub(crate) fn join(lab: Arc<Lab>) -> Result<Self> {
        let mut mesh = Mesh::prepare(lab, plan())?;
        mesh.start_pki()?;
        mesh.join_all()?;
        Ok(Self(mesh))
    }

    /// The address to ask and the two daemons.
    pub(crate) fn start(&self, backend: &str) -> Result<(String, Vec<u32>)> {
        let (near, far) = (self.0.daemon("near"), self.0.daemon("far"));
        for daemon in [near, far] {
            daemon.use_backend(backend)?;
        }
        far.start()?;
        near.start()?;
        // Resolved once, so that no lookup is measured.
        let address = self.0.virtual_address("near", "app.bench.mesh")?;
        Ok((format!("{address}:80"), vec![near.pid()?, far.pid()?]))
    }

    pub(crate) fn stop(&self) -> Result<()> {
        self.0.daemon("near").stop()?;
        self.0.daemon("far").stop()
    }
}

fn plan() -> Plan {
    let workload = |name: &str, uid| Workload { namespace: "bench".to_owned(), ..Workload::client(name, uid) };
    let app = Workload { serve: vec![Serve::new("app.bench", 80, APP, false)], ..workload("app", 2001) };
    let service = ServicePlan {
        namespace: "bench".to_owned(),
        hosts: vec!["far".to_owned()],
        protocol: Some("tcp".to_owned()),
        ..ServicePlan::new("app", 80)
    };
    Plan {
        hosts: vec![
            HostPlan { name: "near".to_owned(), workloads: vec![workload("client", CLIENT_UID)] },
            HostPlan { name: "far".to_owned(), workloads: vec![app] },
        ],
        services: vec![service],
        access_log: false,
        ..Plan::shop()
    }
}
