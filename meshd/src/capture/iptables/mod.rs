//! The iptables backends: chains of our own beside everybody else's, in the variant a host uses.

mod chains;
mod saved;
mod variant;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use super::backend::{Backend, BackendKind, ListenAt};
use super::flow::Recovery;
use super::routes;
use super::tool::CaptureError;
use super::wanted::{Facts, Wanted};
use crate::enrol::Cgroup;
use chains::Table;
use saved::Ours;
use variant::Family;

pub(super) use variant::Variant;

/// Docker, kube-proxy and ufw hold the lock of the legacy variant for as long as a change takes.
const RESTORE: [&str; 3] = ["--noflush", "--wait", "5"];
/// In the order they are put in force (`chains::tables`), and taken out of it from the end: capture goes before what
/// refuses the uncaptured.
const TABLES: [&str; 2] = ["filter", "nat"];

pub(super) struct Iptables {
    variant: Variant,
    /// What is ours as the kernel listed it after we had put it there.
    installed: Option<Vec<Vec<Ours>>>,
}

impl Iptables {
    pub(super) fn new(variant: Variant) -> Iptables {
        Iptables { variant, installed: None }
    }

    fn ours(&self, family: Family, table: &str) -> Result<Ours, CaptureError> {
        Ok(Ours::of(&self.variant.save(family).run(&["-t", table], "")?))
    }

    fn listed(&self, family: Family) -> Result<Vec<Ours>, CaptureError> {
        TABLES.into_iter().map(|table| self.ours(family, table)).collect()
    }

    /// The whole input for one family, for the jumps that are there at the moment.
    fn input(&self, family: Family, tables: &[Table]) -> Result<String, CaptureError> {
        tables.iter().map(|table| Ok(table.restore(&self.ours(family, table.name)?.jumps))).collect()
    }

    fn tables(&self, family: Family, wanted: &Wanted, facts: &Facts) -> [Table; 2] {
        chains::tables(family, wanted, &self.usable(facts))
    }

    /// Without what no rule can be made of: nobody is let in by it then.
    fn usable(&self, facts: &Facts) -> Facts {
        let usable = |cgroup: &Cgroup| match self.variant {
            // One missing path fails the whole input, and units stop when they like.
            Variant::Nft => cgroup.exists(),
            // This variant rewrites the whole table at every change of anybody's, and the kernel looks up every
            // path again: a rule about a unit that has stopped would lock Docker and everybody else out.
            Variant::Legacy => false,
        };
        let cgroups = facts.cgroups.iter().filter(|(_, cgroup)| usable(cgroup));
        Facts { cgroups: cgroups.map(|(unit, cgroup)| (unit.clone(), cgroup.clone())).collect(), ..facts.clone() }
    }

    fn warn_of_units(&self, wanted: &Wanted) {
        let units = wanted.units();
        if self.variant == Variant::Legacy && !units.is_empty() {
            tracing::warn!(
                ?units,
                "legacy iptables tells callers apart by user only: these units are refused at strict ports of this \
                 host unless local_ok names their users"
            );
        }
    }

    /// Puts one family in force and tells what of it is there then.
    fn restore(&self, family: Family, wanted: &Wanted, facts: &Facts) -> Result<Vec<Ours>, CaptureError> {
        let once = || {
            let tables = self.tables(family, wanted, facts);
            self.variant.restore(family).run(&RESTORE, &self.input(family, &tables)?)?;
            let listed = self.listed(family)?;
            // Taken for what is to be, a table that somebody else changed meanwhile would never be healed.
            let complete = tables.iter().zip(&listed).all(|(table, ours)| table.is_in(ours));
            if complete { Ok(listed) } else { Err(self.contended()) }
        };
        // Somebody else may take a jump away between our looking and our writing, or a unit may stop.
        once().or_else(|_| once()).or_else(|_| once())
    }

    fn contended(&self) -> CaptureError {
        CaptureError::Cannot {
            backend: self.kind().label(),
            what: "rules that stay as they were written".into(),
            remedy: "another tool changes iptables at this moment; meshd tries again",
        }
    }

    fn remove(&self, family: Family, table: &str) -> Result<(), CaptureError> {
        let once = || match self.ours(family, table)?.removal(table) {
            Some(input) => self.variant.restore(family).run(&RESTORE, &input).map(drop),
            None => Ok(()),
        };
        once().or_else(|_| once())
    }
}

impl Backend for Iptables {
    fn kind(&self) -> BackendKind {
        self.variant.kind()
    }

    fn probe(&self, wanted: &Wanted) -> Result<(), CaptureError> {
        for family in Family::present() {
            for table in chains::tables(family, wanted, &Facts::default()) {
                // `--test` asks the kernel for matches and targets, but never has it judge a rule: only chains
                // that nothing jumps to do that.
                self.variant.restore(family).run(&RESTORE, &table.scratch())?;
                self.variant.restore(family).run(&RESTORE, &table.scratch_removal())?;
            }
        }
        Ok(())
    }

    fn prepare(&mut self, wanted: &Wanted) -> Result<ListenAt, CaptureError> {
        let at = |ip| SocketAddr::new(ip, wanted.capture_port);
        let addresses = vec![at(Ipv4Addr::LOCALHOST.into()), at(Ipv6Addr::LOCALHOST.into())];
        Ok(ListenAt { addresses, transparent: false })
    }

    fn recovery(&self) -> Recovery {
        Recovery::Redirect
    }

    fn render(&self, wanted: &Wanted, facts: &Facts) -> String {
        let families = Family::present().map(|family| {
            let tables: String = chains::tables(family, wanted, facts).iter().map(|table| table.restore(&[])).collect();
            format!("# {} {}\n{tables}", self.variant.restore(family).name, RESTORE.join(" "))
        });
        format!("{}# routes\n{}", families.collect::<String>(), routes::render(wanted))
    }

    fn apply(&mut self, wanted: &Wanted, facts: &Facts) -> Result<(), CaptureError> {
        if self.installed.is_none() {
            self.warn_of_units(wanted);
        }
        // Routes first: once the rules capture, a virtual IP must already lead to this host.
        routes::install(wanted)?;
        // Four steps, not one transaction, so what can be refused is refused before the first. Each leaves virtual
        // IPs refused or captured, and strict ports closed.
        for family in Family::present() {
            let input = self.input(family, &self.tables(family, wanted, facts))?;
            self.variant.restore(family).run(&[&RESTORE[..], &["--test"]].concat(), &input)?;
        }
        let installed = Family::present().map(|family| self.restore(family, wanted, facts));
        self.installed = Some(installed.collect::<Result<_, _>>()?);
        Ok(())
    }

    fn intact(&mut self, wanted: &Wanted) -> Result<bool, CaptureError> {
        let listed = Family::present().map(|family| self.listed(family)).collect::<Result<_, _>>()?;
        Ok(self.installed == Some(listed) && routes::intact(wanted)?)
    }

    fn notified(&self) -> bool {
        self.variant == Variant::Nft
    }

    fn revert(&mut self, wanted: &Wanted) -> Result<(), CaptureError> {
        for family in Family::present() {
            let mut used = TABLES.into_iter().rev().filter(|table| self.variant.may_have(family, table));
            used.try_for_each(|table| self.remove(family, table))?;
        }
        self.installed = None;
        routes::remove(wanted);
        Ok(())
    }
}
