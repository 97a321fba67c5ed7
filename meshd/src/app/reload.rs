//! Reads enrolment again and puts it in force: a task of its own, as it may wait for certificates.

use std::collections::BTreeSet;
use std::sync::Arc;

use meshd_identity::SpiffeId;
use meshd_pki_client::Credentials;
use tokio::sync::{Notify, mpsc, watch};

use super::certificates::{Certificates, wait_for_certificates};
use super::intent::planned;
use crate::admin::Reload;
use crate::capture::{KeeperHandle, Wanted};
use crate::config::Config;
use crate::enrol::{self, Enrolment, Sight};
use crate::proxy::Shared;

pub(super) struct Reloader {
    pub config: Config,
    pub shared: Arc<Shared>,
    pub credentials: watch::Receiver<Arc<Credentials>>,
    pub certificates: Arc<Certificates>,
    /// What the PKI is asked for.
    pub identities: watch::Sender<BTreeSet<SpiffeId>>,
    pub keeper: KeeperHandle,
}

impl Reloader {
    /// One after the other: what is ordered meanwhile reads what is there by then.
    pub(super) async fn serve(&self, orders: &mut mpsc::Receiver<Reload>, hangup: &Notify) {
        loop {
            tokio::select! {
                Some(Reload { apply, answer }) = orders.recv() => {
                    // Whoever asked may have given up waiting.
                    let _ = answer.send(self.reload(apply.as_deref()).await);
                }
                // Told in the log; nobody waits for an answer.
                () = hangup.notified() => drop(self.reload(None).await),
            }
        }
    }

    /// `apply`: the plan an operator has ordered to be in force after it.
    async fn reload(&self, apply: Option<&str>) -> Result<(), String> {
        let reloaded = self.try_reload(apply).await;
        match &reloaded {
            Ok(()) => tracing::info!("enrolment reloaded"),
            Err(error) => tracing::error!(error, "enrolment not reloaded; the last good one stays in force"),
        }
        reloaded
    }

    async fn try_reload(&self, apply: Option<&str>) -> Result<(), String> {
        let credentials = self.certificates.installed();
        let enrolment = Arc::new(
            load_enrolment(&self.config, &credentials, self.shared.attestor.sight())
                .map_err(|error| error.to_string())?,
        );
        let plan = self.plan(enrolment.clone()).await?;
        if let Some(hash) = apply.filter(|hash| *hash != plan.hash()) {
            return Err(another_plan(hash, &plan.hash()));
        }
        // Who is captured must be known and certified first: a connection that went direct a moment ago is not to
        // be refused for that.
        let before = self.certificates.enrol(&enrolment);
        self.identities.send_replace(enrolment.identities());
        if !plan.raw_callers.is_empty() {
            wait_for_certificates(&mut self.credentials.clone(), &enrolment.identities()).await;
            // What has arrived must be in use before anybody is captured.
            self.certificates.install(self.credentials.borrow().clone());
        }
        let done = match apply {
            Some(_) => self.keeper.apply(plan).await,
            None => self.keeper.want(plan).await,
        };
        if let Err(error) = done {
            self.identities.send_replace(before.identities());
            self.certificates.enrol(&before);
            return Err(error.to_string());
        }
        self.shared.ports.refresh(&enrolment);
        Ok(())
    }

    /// Asks systemd, and looks through sockets and processes: not on the thread that answers names.
    async fn plan(&self, enrolment: Arc<Enrolment>) -> Result<Wanted, String> {
        let config = self.config.clone();
        let planned = tokio::task::spawn_blocking(move || planned(&config, &enrolment));
        planned.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
    }
}

pub(super) fn load_enrolment(
    config: &Config,
    credentials: &Credentials,
    sight: Sight,
) -> Result<Enrolment, enrol::EnrolError> {
    let mut enrolment = enrol::load(&config.enrol_dir, &credentials.trust_domain, &config.reserved())?;
    withhold(&mut enrolment, credentials, sight);
    Ok(enrolment)
}

/// What the PKI gives to other processes is given to nobody.
pub(super) fn withhold(enrolment: &mut Enrolment, credentials: &Credentials, sight: Sight) {
    let known = enrolment.withheld().len();
    enrolment.withhold(&credentials.host_id, &credentials.selectors, sight);
    for withheld in &enrolment.withheld()[known..] {
        tracing::error!("{}", withheld.why);
    }
}

fn another_plan(asked: &str, found: &str) -> String {
    format!(
        "plan {asked} was asked for, but the daemon finds {found}: enrol.d has changed since (look at `meshd intercept \
         plan` again), or meshd.toml has changed since the daemon was started (restart it)"
    )
}
