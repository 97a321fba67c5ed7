//! An intermediate in files that others replace: read every 30 s, taken over when it is good, refused aloud when not.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::task::spawn_blocking;
use tokio::time::interval;

use super::check::{certificates, private_key};
use super::commands::{UpstreamError, take_over};
use super::import::{Imported, Source};
use crate::audit::Event;
use crate::files::{Files, READ_EVERY};
use crate::lifetimes::Lifetimes;
use crate::pki::{Pki, PkiError};
use crate::state_dir::StateDir;
use crate::store::upstream;
use crate::times::unix;

/// Chain (the intermediate, then its root unless `roots` has it) and key, PEM.
#[derive(Debug, Clone)]
pub struct UpstreamFiles {
    pub chain: PathBuf,
    pub key: PathBuf,
    pub roots: Option<PathBuf>,
}

/// Reads the files now and then.
pub struct Upstream {
    files: Files,
    /// Why what was read last was refused.
    refused: Option<String>,
}

impl Upstream {
    pub fn new(paths: &UpstreamFiles) -> Upstream {
        let mut all = vec![paths.chain.as_path(), paths.key.as_path()];
        all.extend(paths.roots.as_deref());
        Upstream { files: Files::new(&all), refused: None }
    }

    /// One look.
    pub fn look(&mut self, pki: &Pki) {
        let outcome = match self.files.changed() {
            Ok(None) => return,
            Ok(Some(contents)) => {
                accept(&pki.state, &contents, &pki.lifetimes, pki.now()).map_err(|error| error.to_string())
            }
            Err(reason) => Err(reason),
        };
        match outcome {
            Ok(imported) => {
                self.refused = None;
                tracing::info!(?imported, "the intermediate from outside was taken over");
                if let Err(error) =
                    pki.refresh().and_then(|()| pki.show_health().map_err(|error| PkiError::State(error.into())))
                {
                    tracing::error!(%error, "the intermediate is stored, but cannot be used yet");
                }
            }
            Err(reason) => {
                // A clock or a full disk may have been the reason.
                self.files.forget();
                self.refuse(pki, reason);
            }
        }
    }

    fn refuse(&mut self, pki: &Pki, reason: String) {
        if self.refused.as_ref() != Some(&reason) {
            tracing::error!(reason, "the intermediate from outside is refused; what is in force stays");
        }
        if self.refused.is_none() {
            let detail = Some(reason.clone());
            _ = pki.record(&[Event { event: "upstream", result: "refused", detail, ..Event::default() }]);
        }
        self.refused = Some(reason.clone());
        let refused = upstream::Refused { at: unix(pki.now()), reason };
        let told = pki.state.database.transaction(|records| upstream::set_refused(records, Some(&refused)));
        if let Err(error) = told.and_then(|()| pki.show_health()) {
            tracing::error!(%error, "that is not in the status");
        }
    }
}

/// For ever.
pub async fn watch(pki: Arc<Pki>, paths: UpstreamFiles) {
    let mut upstream = Upstream::new(&paths);
    let mut ticks = interval(READ_EVERY);
    loop {
        ticks.tick().await;
        let (looking, pki) = (upstream, pki.clone());
        let looked = spawn_blocking(move || {
            let mut looking = looking;
            looking.look(&pki);
            looking
        });
        upstream = looked.await.unwrap_or_else(|error| {
            tracing::error!(%error, "looking at the intermediate from outside panicked");
            Upstream::new(&paths)
        });
    }
}

/// Before there is a running PKI: with an intermediate that has ended none can run, and the next may lie ready. What is
/// wrong with the files is told by the first look of [`watch`].
pub(crate) fn look_ahead(state: &StateDir, paths: &UpstreamFiles, lifetimes: &Lifetimes, now: SystemTime) {
    let contents = Upstream::new(paths).files.changed().ok().flatten();
    match contents.map(|contents| accept(state, &contents, lifetimes, now)) {
        Some(Ok(imported)) => tracing::info!(?imported, "the intermediate from outside was read"),
        Some(Err(error)) => tracing::error!(%error, "the intermediate from outside is refused; what is in force stays"),
        None => {}
    }
}

fn accept(
    state: &StateDir,
    contents: &[Vec<u8>],
    lifetimes: &Lifetimes,
    now: SystemTime,
) -> Result<Imported, UpstreamError> {
    let mut chain = certificates(contents.first().map_or(&[], Vec::as_slice))?;
    let key = private_key(contents.get(1).map_or(&[], Vec::as_slice))?;
    if let Some(roots) = contents.get(2) {
        chain.extend(certificates(roots)?);
        chain.dedup();
    }
    take_over(state, (&chain, &key), Source::Files, lifetimes, now)
}
