//! Options that say how a server reaches its etcd.

use std::path::PathBuf;

use clap::Args;
use meshd_pki::store::etcd::config::EtcdConfig;

#[derive(Args)]
pub(crate) struct EtcdArgs {
    /// https://HOST:PORT of an etcd member. May be repeated; name all.
    #[arg(long, num_args = 1..)]
    etcd: Vec<String>,
    /// What the members' certificates chain to, PEM.
    #[arg(long)]
    etcd_ca: Option<PathBuf>,
    /// Client certificate, PEM; with etcd's --client-cert-auth its common name is the user.
    #[arg(long)]
    etcd_cert: Option<PathBuf>,
    #[arg(long)]
    etcd_key: Option<PathBuf>,
    #[arg(long)]
    etcd_user: Option<String>,
    #[arg(long)]
    etcd_password_file: Option<PathBuf>,
    /// Seconds after which another replica takes the lead from one that is silent.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(i64).range(2..=300))]
    etcd_lease: i64,
}

impl EtcdArgs {
    /// The paths are the server's, wherever this was typed.
    pub(crate) fn config(&self) -> anyhow::Result<EtcdConfig> {
        let absolute = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
        Ok(EtcdConfig {
            replica: String::new(),
            trust_domain: String::new(),
            endpoints: self.etcd.clone(),
            ca: absolute(&self.etcd_ca)?,
            cert: absolute(&self.etcd_cert)?,
            key: absolute(&self.etcd_key)?,
            user: self.etcd_user.clone(),
            password_file: absolute(&self.etcd_password_file)?,
            lease_s: self.etcd_lease,
        })
    }
}
