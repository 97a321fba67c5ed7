//! Whether all is well: every certificate the system uses, the rotation and what blocks it, clocks, hosts overdue.
//!
//! - [`census`]: the certificates. [`rotation`]: gates, and which of them are a block. [`clocks`]: of hosts. All pure.
//! - [`metrics`]: what Prometheus sees of it; never more series than a dashboard bears.
//! - [`report`]: the running server looks, exports, and leaves word for `status`.

pub(crate) mod census;
pub(crate) mod clocks;
pub(crate) mod metrics;
pub(crate) mod report;
pub(crate) mod rotation;

use crate::lifetimes::Lifetimes;
use crate::rotation::Trust;
use crate::rotation::decide::{Decision, Surroundings, decide};
use crate::store::clones::{self, Alarm};
use crate::store::federation::{self, Federated};
use crate::store::hosts::{self, Host};
use crate::store::intermediates::{self, Intermediate};
use crate::store::upstream::{self, Refused};
use crate::store::{DbError, View, leaves, trust};
use crate::times::rfc3339;

/// All that judgements are made of, at one moment.
pub(crate) struct Health {
    pub(crate) trust: Trust,
    /// Roots to which chains carry a bridge.
    pub(crate) bridged: Vec<String>,
    pub(crate) intermediates: Vec<Intermediate>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) leaves: Vec<census::Held>,
    pub(crate) clones: Vec<Alarm>,
    pub(crate) federation: Vec<Federated>,
    pub(crate) upstream_refused: Option<Refused>,
    pub(crate) outlook: Decision,
    pub(crate) now: i64,
}

impl Health {
    pub(crate) fn look(
        view: &mut dyn View,
        lifetimes: &Lifetimes,
        clock_is_good: bool,
        now: i64,
    ) -> Result<Health, DbError> {
        let (trust, hosts, intermediates) = (trust::trust(view)?, hosts::hosts(view)?, intermediates::all(view)?);
        let world = Surroundings { hosts: &hosts, intermediates: &intermediates, lifetimes, clock_is_good, now };
        let outlook = decide(&trust, &world);
        let leaves = census::leaves(leaves::all(view)?, &hosts, now);
        let clones = clones::alarms(view)?.into_iter().filter(|alarm| alarm.is_open(&hosts)).collect();
        let federation = federation::all(view)?;
        let upstream_refused = upstream::refused(view)?;
        let mut bridged = Vec::new();
        for root in &trust.roots {
            bridged.extend(trust.carried_to(&root.id, view, lifetimes)?.map(|_| root.id.clone()));
        }
        Ok(Health { upstream_refused, federation, bridged, trust, intermediates, hosts, leaves, clones, outlook, now })
    }

    pub(crate) fn blocks(&self) -> Vec<rotation::Block> {
        let refused = self.upstream_refused.iter().map(|refused| rotation::Block {
            reason: "upstream",
            text: format!("refused since {}: {}", rfc3339(refused.at), refused.reason),
        });
        rotation::blocks(&self.outlook).into_iter().chain(refused).collect()
    }

    pub(crate) fn overdue(&self) -> Vec<&census::Held> {
        census::overdue_hosts(&self.leaves)
    }
}
