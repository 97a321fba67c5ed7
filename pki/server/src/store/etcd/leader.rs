//! Which replica takes the steps of authorities: the one whose key is there. The key hangs on a lease; what the leader
//! writes is written only if its key still is (`create_revision`), so one that stood still and believes to lead writes
//! nothing, whatever its clock says.

use std::sync::Arc;
use std::time::{Duration, Instant};

use meshd_etcd::api::TxnRequest;
use meshd_etcd::{Client, Error, absent, put};
use tokio::time::sleep;

use super::cache::{Cache, LEADER, LIVE, State, refusal};

pub(super) struct Candidate {
    pub(super) client: Arc<Client>,
    pub(super) cache: Arc<Cache>,
    pub(super) base: String,
    pub(super) replica: String,
    pub(super) lease_s: i64,
}

impl Candidate {
    pub(super) async fn run(self) {
        let life = Duration::from_secs(self.lease_s.unsigned_abs());
        loop {
            if let Err(error) = self.hold_a_lease(life).await {
                tracing::debug!(%error, "no lease in etcd");
                self.cache.change(|state| state.refused = refusal(&error).or(state.refused.take()));
            }
            self.cache.change(|state| state.leads = None);
            sleep(life / 10).await;
        }
    }

    /// Until the lease is lost.
    async fn hold_a_lease(&self, life: Duration) -> Result<(), Error> {
        let mut good_until = Instant::now() + life;
        let lease = self.client.grant(self.lease_s).await?;
        self.cache.change(|state| state.lease = Some(lease));
        let announced = self.announce(lease).await?;
        loop {
            self.watch_for_twins(lease, announced);
            self.stand(lease, good_until).await?;
            sleep(life / 5).await;
            let asked = Instant::now();
            match self.client.keep_alive(lease).await {
                Ok(true) => good_until = asked + life,
                Ok(false) => return Ok(()),
                Err(error) if Instant::now() >= good_until => return Err(error),
                Err(error) => tracing::debug!(%error, "no answer about the lease yet"),
            }
        }
    }

    /// The revision that did it.
    async fn announce(&self, lease: i64) -> Result<i64, Error> {
        let live = put(format!("{}{LIVE}{}", self.base, self.replica), lease.to_string(), lease);
        let answer = self.client.txn(TxnRequest { success: vec![live], ..TxnRequest::default() }).await?;
        Ok(answer.header.map_or(0, |header| header.revision))
    }

    /// Two servers from copies of one state directory would sign with one intermediate, and count as one.
    fn watch_for_twins(&self, lease: i64, announced: i64) {
        let key = format!("{LIVE}{}", self.replica);
        let snapshot = self.cache.snapshot();
        if snapshot.revision < announced {
            // What is known is this server's own word of before.
            return;
        }
        let found = snapshot.keys.get(&key).map(|value| value.bytes.clone());
        if found.is_some_and(|found| found != lease.to_string().as_bytes()) {
            tracing::error!(
                replica = self.replica,
                "another server runs under this one's name; was its state directory \
                 copied? Make a new one with `meshd-pki replica init`"
            );
        }
    }

    /// Takes the lead when nobody has it.
    async fn stand(&self, lease: i64, good_until: Instant) -> Result<(), Error> {
        let leads = self.cache.lock().leads;
        if let Some((revision, _)) = leads {
            self.cache.change(|state| state.leads = Some((revision, good_until)));
            return Ok(());
        }
        // Of an etcd that is not believed it is not known who leads.
        let is_taken = |state: &State| state.trouble.is_some() || state.snapshot.keys.get(LEADER).is_some();
        if is_taken(&self.cache.lock()) {
            return Ok(());
        }
        let key = format!("{}{LEADER}", self.base);
        let request = TxnRequest {
            compare: vec![absent(key.clone())],
            success: vec![put(key, self.replica.clone(), lease)],
            failure: Vec::new(),
        };
        let answer = self.client.txn(request).await?;
        if answer.succeeded {
            let revision = answer.header.map_or(0, |header| header.revision);
            tracing::info!(replica = self.replica, "this replica leads");
            self.cache.change(|state| state.leads = Some((revision, good_until)));
        }
        Ok(())
    }
}
