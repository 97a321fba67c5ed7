//! The running server looks after its own health, exports it, and leaves word for `status`.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use super::Health;
use super::census::Kind;
use super::metrics::Renewal;
use crate::pki::Pki;
use crate::store::DbError;
use crate::store::clones::{self, Alarm};
use crate::store::servers::{self, Server, ServerCertificate};
use crate::times::unix;

/// The whole fleet is read for it, so not at every turn.
const LOOK_EVERY_S: i64 = 60;
/// A server that was silent for longer is not running.
pub(crate) const SILENT_S: i64 = 300;

impl Pki {
    /// Looks when it is time to.
    pub(crate) fn look_after_health(&self) -> Result<(), DbError> {
        let now = unix(self.now());
        let is_due = {
            let last = self.health_seen.lock().unwrap_or_else(PoisonError::into_inner);
            last.is_none_or(|last| now < last || now - last >= LOOK_EVERY_S)
        };
        if is_due { self.show_health() } else { Ok(()) }
    }

    pub(crate) fn show_health(&self) -> Result<(), DbError> {
        let now = unix(self.now());
        let doubt = self.clock_doubt();
        let look = |view: &mut dyn crate::store::View| Health::look(view, &self.lifetimes, doubt.is_none(), now);
        let health = self.state.database.read(look)?;
        let certificates = self.server_certificates();
        self.metrics.health.show(&health, &certificates, &self.lifetimes);
        let server = Server {
            replica: self.state.replica.clone(),
            at: now,
            lifetimes: self.lifetimes,
            certificates,
            distrust: self.distrust().map(|why| why.to_string()),
            is_clock_unconfirmed: self.is_clock_unconfirmed(),
            renewals: self.renewals(),
        };
        // Only `status` lacks it, and the database's trouble is told by itself.
        let told = self.state.database.transaction(|records| servers::put_server(records, &server));
        if let Err::<(), DbError>(error) = told {
            tracing::warn!(%error, "this server's word for `status` is not on record");
        }
        *self.health_seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        Ok(())
    }

    /// What this process shows on its ports.
    fn server_certificates(&self) -> Vec<ServerCertificate> {
        let signer = self.signer();
        let not_after = unix(signer.endpoint_not_after);
        let endpoint =
            ServerCertificate { kind: "endpoint".to_owned(), serial: signer.endpoint_serial.clone(), not_after };
        std::iter::once(endpoint).chain(self.web_certificate().map(|web| web.certificate())).collect()
    }

    fn renewals(&self) -> BTreeMap<String, u64> {
        let mut all = BTreeMap::new();
        for kind in Kind::ALL.map(Kind::name) {
            for result in ["ok", "refused"] {
                let counted = self.metrics.health.renewals.get_or_create(&Renewal { kind, result }).get();
                all.insert(format!("{kind}_{result}"), counted);
            }
        }
        all
    }

    pub(crate) fn count_renewal(&self, is_host: bool, result: &'static str) {
        let kind = if is_host { Kind::Host } else { Kind::Workload }.name();
        self.metrics.health.renewals.get_or_create(&Renewal { kind, result }).inc();
    }

    /// The alarm outlives the process: an operator looks at it when they come to work.
    pub(crate) fn note_clone(&self, host: &str, remote: &str) {
        let alarm = Alarm { host: host.to_owned(), at: unix(self.now()), remote: remote.to_owned() };
        if let Err(error) = self.state.database.transaction(|records| clones::put_alarm(records, &alarm)) {
            self.metrics.note_failures.inc();
            tracing::error!(%error, host, "the alarm about a cloned host is not on record");
        }
    }
}
