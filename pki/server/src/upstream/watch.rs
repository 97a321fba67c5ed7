//! An intermediate in files that others replace: read every 30 s, taken over when it is good, refused aloud when not.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::spawn_blocking;
use tokio::time::interval;

use super::check::{certificates, private_key};
use super::commands::{UpstreamError, take_over};
use crate::audit::Event;
use crate::files::{Files, READ_EVERY};
use crate::pki::{Pki, PkiError};
use crate::rotation::step::Imported;
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
    /// Whether what was read last was refused.
    is_refused: bool,
}

impl Upstream {
    pub fn new(paths: &UpstreamFiles) -> Upstream {
        let mut all = vec![paths.chain.as_path(), paths.key.as_path()];
        all.extend(paths.roots.as_deref());
        Upstream { files: Files::new(&all), is_refused: false }
    }

    /// One look.
    pub fn look(&mut self, pki: &Pki) {
        let outcome = match self.files.changed() {
            Ok(None) => return,
            Ok(Some(contents)) => accept(pki, &contents).map_err(|error| error.to_string()),
            Err(reason) => Err(reason),
        };
        match outcome {
            Ok(imported) => {
                self.is_refused = false;
                tracing::info!(?imported, "the intermediate from outside was taken over");
                if let Err(error) =
                    pki.refresh().and_then(|()| pki.show_health().map_err(|error| PkiError::State(error.into())))
                {
                    tracing::error!(%error, "the intermediate is stored, but cannot be used yet");
                }
            }
            Err(reason) => self.refused(pki, &reason),
        }
    }

    fn refused(&mut self, pki: &Pki, reason: &str) {
        tracing::error!(reason, "the intermediate from outside is refused; what is in force stays");
        if !self.is_refused {
            let detail = Some(reason.to_owned());
            _ = pki.record(&[Event { event: "upstream", result: "refused", detail, ..Event::default() }]);
        }
        self.is_refused = true;
        let refused = upstream::Refused { at: unix(pki.now()), reason: reason.to_owned() };
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

fn accept(pki: &Pki, contents: &[Vec<u8>]) -> Result<Imported, UpstreamError> {
    let mut chain = certificates(contents.first().map_or(&[], Vec::as_slice))?;
    let key = private_key(contents.get(1).map_or(&[], Vec::as_slice))?;
    if let Some(roots) = contents.get(2) {
        chain.extend(certificates(roots)?);
        chain.dedup();
    }
    take_over(&pki.state, &chain, &key, &pki.lifetimes, pki.now())
}
