//! The verbs of the command line, one file per family.

pub(crate) mod bypass;
pub(crate) mod enrol;
pub(crate) mod inspect;
pub(crate) mod intercept;
pub(crate) mod join;
pub(crate) mod ledger;
pub(crate) mod probe;
pub(crate) mod run;

use clap::ValueEnum;

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    #[default]
    Table,
    Json,
}

/// Control work needs one thread: the data plane has threads of its own.
pub(crate) fn on_runtime<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}
