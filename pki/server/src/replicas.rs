//! This server as one of several: where hosts reach each, who leads, what is wrong with what they share.

use std::path::Path;
use std::time::SystemTime;

use serde::Serialize;

use crate::pki::{Pki, PkiError};
use crate::state_dir::{LOCAL_REPLICA, StateDir, StateError};
use crate::store::replicas::{self, Replica};
use crate::store::settings;
use crate::times::unix;

/// Puts down where hosts reach this server. What is there already is not written again, so that a start needs no etcd.
pub(crate) fn register(state: &StateDir, advertise: &[String], now: SystemTime) -> Result<(), StateError> {
    if advertise.is_empty() && state.replica == LOCAL_REPLICA {
        return Ok(());
    }
    state.database.transaction(|records| -> Result<(), StateError> {
        let id = state.replica.clone();
        if id != LOCAL_REPLICA {
            let known = replicas::replica(records, &id)?;
            if known.is_none_or(|known| !advertise.is_empty() && known.addresses != advertise) {
                let replica = Replica { id, addresses: advertise.to_vec(), started_at: unix(now) };
                replicas::put_replica(records, &replica)?;
            }
        } else if settings::advertise(records)? != advertise {
            settings::set_advertise(records, advertise)?;
        }
        Ok(())
    })
}

/// One server of a PKI in etcd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReplicaStatus {
    pub id: String,
    pub addresses: Vec<String>,
    pub runs: bool,
    pub leads: bool,
}

/// None where there is but one, with a file of its own.
pub fn replicas(dir: &Path) -> Result<Vec<ReplicaStatus>, StateError> {
    of(&StateDir::open(dir)?)
}

pub(crate) fn of(state: &StateDir) -> Result<Vec<ReplicaStatus>, StateError> {
    let engine = state.database.engine();
    let (live, leader) = (engine.live_replicas(), engine.leader());
    let known = state.database.read(replicas::replicas)?.into_iter();
    let status = |one: Replica| ReplicaStatus {
        runs: live.contains(&one.id),
        leads: leader.as_ref() == Some(&one.id),
        id: one.id,
        addresses: one.addresses,
    };
    Ok(known.map(status).collect())
}

impl Pki {
    /// Why nothing can be written to what the replicas share.
    pub fn store_trouble(&self) -> Option<String> {
        self.state.database.engine().trouble()
    }

    /// Hosts use any of the replicas, so each tells of all.
    pub(crate) fn refresh_replicas(&self) -> Result<(), PkiError> {
        let engine = self.state.database.engine();
        self.metrics.leads.set(i64::from(engine.leads()));
        self.metrics.store_trouble.set(i64::from(self.store_trouble().is_some()));
        self.metrics.replicas.set(i64::try_from(engine.live_replicas().len().max(1)).unwrap_or(i64::MAX));
        let mut addresses = self.state.database.read(replicas::addresses).map_err(StateError::from)?;
        if self.state.replica == LOCAL_REPLICA || addresses.is_empty() {
            addresses.clone_from(&self.advertise);
        }
        if self.addresses() != addresses {
            self.set_addresses(addresses);
        }
        Ok(())
    }
}
