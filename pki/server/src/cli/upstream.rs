//! `meshd-pki csr` and `meshd-pki import`.

use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::Context;
use clap::Args;
use meshd_pki::upstream::commands;

#[derive(Args)]
pub(crate) struct Csr {
    #[arg(long)]
    state: PathBuf,
}

#[derive(Args)]
pub(crate) struct Import {
    #[arg(long)]
    state: PathBuf,
    /// PEM file: the intermediate, then the root that signed it.
    chain: PathBuf,
    /// PEM file with the key of the intermediate; not needed for the answer to `meshd-pki csr`.
    #[arg(long)]
    key: Option<PathBuf>,
}

impl Csr {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        print!("{}", commands::csr(&self.state, SystemTime::now())?);
        Ok(())
    }
}

impl Import {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let read = |path: &PathBuf| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let key = self.key.as_ref().map(read).transpose()?;
        let imported = commands::import(&self.state, &read(&self.chain)?, key.as_deref(), SystemTime::now())?;
        println!("{imported}");
        Ok(())
    }
}
