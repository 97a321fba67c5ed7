//! The iptables backends: chains of our own beside everybody else's, in the variant a host uses.

mod alive;
mod answers;
mod chains;
mod heard;
mod listener;
mod owners;
mod plain;
mod raw;
mod saved;
mod table;
mod variant;

use std::cell::OnceCell;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use super::backend::{Backend, BackendKind, ListenAt};
use super::flow::Recovery;
use super::ledger::Tally;
use super::owner::OwnerRecord;
use super::tool::CaptureError;
use super::wanted::{Facts, Present, Wanted};
use super::{routes, transparent};
use crate::enrol::Cgroup;
use alive::Alive;
use chains::TABLES;
use listener::Listener;
use plain::{Counts, Life};
use saved::Ours;
use table::Table;
use variant::Family;

pub(super) use listener::Hearing;
pub(super) use variant::Variant;

/// Docker, kube-proxy and ufw hold the lock of the legacy variant for as long as a change takes.
const RESTORE: [&str; 3] = ["--noflush", "--wait", "5"];
const SYN: &str = "--tcp-flags FIN,SYN,RST,ACK SYN";
/// Of our NFLOG rules: the number of our routing table, as hardly anybody else will use it.
const GROUP: u16 = 7471;

/// What a kernel can do for us besides what it must.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Abilities {
    /// Tell who calls permissive ports.
    ledger: bool,
    /// Tell who opens connections to virtual IPs.
    owners: bool,
}

/// One family's rules: what they are to be, and what is ours as the kernel listed it after we had put it there.
struct Installed {
    family: Family,
    tables: [Table; 4],
    listed: [Ours; 4],
}

pub(super) struct Iptables {
    variant: Variant,
    abilities: OnceCell<Abilities>,
    installed: Vec<Installed>,
    /// Of the rules that count.
    life: Life,
    listener: Option<Listener>,
    /// Raw addresses are captured as long as it is there.
    alive: Option<Alive>,
}

impl Iptables {
    pub(super) fn new(variant: Variant) -> Iptables {
        let abilities = OnceCell::new();
        Iptables { variant, abilities, installed: Vec::new(), life: fastrand::u32(1..), listener: None, alive: None }
    }

    fn ours(&self, family: Family, table: &str) -> Result<Ours, CaptureError> {
        if !self.variant.may_have(family, table) {
            return Ok(Ours::default());
        }
        Ok(Ours::of(&self.variant.save(family).run(&["-t", table], "")?))
    }

    /// What is there of what is, or was, to be there. Looking at an unused table of the legacy variant would make it.
    fn listed(&self, family: Family, tables: &[Table; 4]) -> Result<[Ours; 4], CaptureError> {
        let before = self.installed(family);
        let mut listed = <[Ours; 4]>::default();
        for (at, table) in tables.iter().enumerate() {
            let was_used = before.map_or(self.variant == Variant::Nft, |before| !before.tables[at].is_empty());
            if was_used || !table.is_empty() {
                listed[at] = self.ours(family, table.name)?;
            }
        }
        Ok(listed)
    }

    fn installed(&self, family: Family) -> Option<&Installed> {
        self.installed.iter().find(|installed| installed.family == family)
    }

    fn tables(&self, family: Family, wanted: &Wanted, facts: &Facts, life: Life) -> [Table; 4] {
        chains::tables(family, wanted, &self.usable(facts), self.abilities(wanted), life)
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
        let local = wanted.strict.iter().flat_map(|strict| &strict.local);
        let units: Vec<String> =
            local.filter(|caller| !matches!(caller, super::Caller::Uid(_))).map(super::Caller::label).collect();
        if self.variant == Variant::Legacy && !units.is_empty() {
            tracing::warn!(
                ?units,
                "legacy iptables tells callers apart by user only: these units are refused at strict ports of this \
                 host unless local_ok names their users"
            );
        }
    }

    /// What this host can do besides capturing, tried once.
    fn abilities(&self, wanted: &Wanted) -> Abilities {
        *self.abilities.get_or_init(|| {
            let can = |able: Abilities| {
                let counted = Wanted { permissive: [1].into(), strict: Default::default(), ..wanted.clone() };
                self.try_out(&counted, able, &["security", "mangle"]).is_ok()
            };
            let nothing = Abilities::default();
            let abilities = Abilities {
                ledger: can(Abilities { ledger: true, ..nothing }),
                owners: can(Abilities { owners: true, ..nothing }),
            };
            if abilities != (Abilities { ledger: true, owners: true }) {
                let what = "this kernel lacks xt_NFLOG, nfnetlink_log or iptables' table security: see docs/capture.md";
                tracing::warn!(ledger = abilities.ledger, hasty_clients = abilities.owners, "{what}");
            }
            abilities
        })
    }

    /// `--test` asks the kernel for matches and targets, but never has it judge a rule: only chains that nothing
    /// jumps to do that.
    fn try_out(&self, wanted: &Wanted, can: Abilities, names: &[&str]) -> Result<(), CaptureError> {
        for family in Family::present() {
            let tables = chains::tables(family, wanted, &Facts::default(), can, self.life);
            for table in tables.iter().filter(|table| names.contains(&table.name) && !table.is_empty()) {
                self.variant.restore(family).run(&RESTORE, &table.scratch())?;
                self.variant.restore(family).run(&RESTORE, &table.scratch_removal())?;
            }
        }
        Ok(())
    }

    /// The input that makes one family what it is to be. What is as it should be is left alone, with its counters.
    fn input(&self, family: Family, tables: &[Table; 4], listed: &[Ours; 4]) -> String {
        let changed = (0..TABLES.len()).filter(|at| !self.has(family, *at, &tables[*at], &listed[*at]));
        changed.map(|at| tables[at].restore(&listed[at])).collect()
    }

    /// Whether we put it there, and it is still as it was then.
    fn has(&self, family: Family, at: usize, table: &Table, listed: &Ours) -> bool {
        self.installed(family).is_some_and(|before| before.tables[at] == *table && before.listed[at] == *listed)
    }

    /// Rules that count go together: if one of their tables must be replaced, all begin a new life.
    fn next_life(&self, wanted: &Wanted, facts: &Facts) -> Result<Life, CaptureError> {
        for family in Family::present() {
            let tables = self.tables(family, wanted, facts, self.life);
            let listed = self.listed(family, &tables)?;
            let mut counting = (0..TABLES.len()).filter(|at| COUNTING.contains(&TABLES[*at]));
            if !counting.all(|at| self.has(family, at, &tables[at], &listed[at])) {
                return Ok(fastrand::u32(1..));
            }
        }
        Ok(self.life)
    }

    /// Puts one family in force and tells what of it is there then.
    fn restore(&self, family: Family, wanted: &Wanted, facts: &Facts, life: Life) -> Result<Installed, CaptureError> {
        let once = || {
            let tables = self.tables(family, wanted, facts, life);
            let input = self.input(family, &tables, &self.listed(family, &tables)?);
            if !input.is_empty() {
                self.variant.restore(family).run(&RESTORE, &input)?;
            }
            let listed = self.listed(family, &tables)?;
            // Taken for what is to be, a table that somebody else changed meanwhile would never be healed.
            let complete = tables.iter().zip(&listed).all(|(table, ours)| table.is_in(ours));
            if complete { Ok(Installed { family, tables, listed }) } else { Err(self.contended()) }
        };
        // Somebody else may take a jump away between our looking and our writing, or a unit may stop.
        once().or_else(|_| once()).or_else(|_| once())
    }

    /// Whether it is worth a look: another process may have put our rules there before us.
    fn may_count(&self, family: Family, table: &str) -> bool {
        let is_used = |installed: &Installed| installed.tables.iter().any(|it| it.name == table && !it.is_empty());
        let can = table != plain::TABLE || self.abilities.get().is_none_or(|abilities| abilities.ledger);
        can && self.variant.may_have(family, table) && self.installed(family).is_none_or(is_used)
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

    fn put_in_force(&mut self, wanted: &Wanted, facts: &Facts) -> Result<(), CaptureError> {
        let life = self.next_life(wanted, facts)?;
        // Several steps, not one transaction, so what can be refused is refused before the first. Each leaves
        // virtual IPs refused or captured, and strict ports closed.
        for family in Family::present() {
            let tables = self.tables(family, wanted, facts, life);
            let input = self.input(family, &tables, &self.listed(family, &tables)?);
            if !input.is_empty() {
                self.variant.restore(family).run(&[&RESTORE[..], &["--test"]].concat(), &input)?;
            }
        }
        let installed = Family::present().map(|family| self.restore(family, wanted, facts, life));
        self.installed = installed.collect::<Result<_, _>>()?;
        self.life = life;
        Ok(())
    }

    /// Rules about raw addresses that capture nothing any more. Nothing that somebody else removed comes back.
    fn empty_raw(&self) -> Result<(), CaptureError> {
        for family in Family::present() {
            let chains = self.ours(family, "nat")?.chains;
            let raw = raw::CHAINS.into_iter().filter(|name| chains.iter().any(|chain| chain == name));
            let input: String = raw.map(|name| format!("-F {name}\n")).collect();
            self.variant.restore(family).run(&RESTORE, &format!("*nat\n{input}COMMIT\n"))?;
        }
        Ok(())
    }
}

/// Tables with counts that the ledger adds up.
const COUNTING: [&str; 2] = ["filter", "security"];

/// Whoever carries our mark and is our user: a mark alone needs only CAP_NET_RAW.
fn own_sockets(wanted: &Wanted) -> String {
    let Wanted { mark, mark_mask, daemon_uid, .. } = wanted;
    format!("-m owner --uid-owner {daemon_uid} -m mark --mark {mark:#x}/{mark_mask:#x}")
}

fn local_caller(caller: Present<'_>) -> String {
    match caller {
        Present::Uid(uid) => format!("-m owner --uid-owner {uid}"),
        Present::Cgroup(cgroup) => cgroup_match(cgroup),
    }
}

fn cgroup_match(cgroup: &Cgroup) -> String {
    // Names of units have backslashes in them (systemd's escapes), which a quoted word wants doubled.
    let path = cgroup.path.replace('\\', "\\\\").replace('"', "\\\"");
    format!("-m cgroup --path \"{path}\"")
}

impl Backend for Iptables {
    fn kind(&self) -> BackendKind {
        self.variant.kind()
    }

    fn probe(&self, wanted: &Wanted) -> Result<(), CaptureError> {
        self.try_out(wanted, Abilities::default(), &TABLES)?;
        self.abilities(wanted);
        Ok(())
    }

    fn prepare(&mut self, wanted: &Wanted) -> Result<ListenAt, CaptureError> {
        if self.abilities(wanted) != Abilities::default() {
            let listening = Listener::start().inspect_err(|error| {
                tracing::warn!(%error, "plaintext callers are counted without names, and hasty clients stay unknown");
            });
            self.listener = listening.ok();
        }
        let at = |ip| SocketAddr::new(ip, wanted.capture_port);
        let addresses = vec![at(Ipv4Addr::LOCALHOST.into()), at(Ipv6Addr::LOCALHOST.into())];
        Ok(ListenAt { addresses, transparent: false })
    }

    fn recovery(&self) -> Recovery {
        Recovery::Redirect
    }

    fn owners(&self) -> OwnerRecord {
        let can = self.abilities.get().is_some_and(|abilities| abilities.owners);
        let listener = self.listener.as_ref().filter(|_| can);
        listener.map_or(OwnerRecord::Nowhere, |listener| OwnerRecord::Heard(listener.hearing.clone()))
    }

    fn records_enrolled(&self) -> bool {
        true
    }

    fn render(&self, wanted: &Wanted, facts: &Facts) -> String {
        let families = Family::present().map(|family| {
            let tables = self.tables(family, wanted, facts, self.life);
            let tables: String = tables.iter().map(|table| table.restore(&Ours::default())).collect();
            format!("# {} {}\n{tables}", self.variant.restore(family).name, RESTORE.join(" "))
        });
        let routes = routes::render(wanted) + &transparent::render(wanted);
        format!("{}# routes\n{routes}", families.collect::<String>())
    }

    fn apply(&mut self, wanted: &Wanted, facts: &Facts) -> Result<(), CaptureError> {
        if self.installed.is_empty() {
            self.warn_of_units(wanted);
        }
        // Routes first: once the rules capture, a virtual IP must already lead to this host.
        routes::install(wanted)?;
        transparent::install(wanted)?;
        self.put_in_force(wanted, facts)?;
        if wanted.raw_callers.is_empty() {
            self.alive = None;
        } else if self.alive.is_none() {
            self.alive = Some(Alive::start(wanted)?);
        }
        Ok(())
    }

    fn intact(&mut self, wanted: &Wanted) -> Result<bool, CaptureError> {
        for installed in &self.installed {
            if installed.listed != self.listed(installed.family, &installed.tables)? {
                return Ok(false);
            }
        }
        Ok(!self.installed.is_empty() && routes::intact(wanted)? && transparent::intact(wanted)?)
    }

    fn tally(&self) -> Result<Tally, CaptureError> {
        let mut counts = Counts::default();
        for family in Family::present() {
            for table in COUNTING.into_iter().filter(|table| self.may_count(family, table)) {
                counts.read(&self.variant.save(family).run(&["--counters", "-t", table], "")?);
            }
        }
        let missing = || CaptureError::Cannot {
            backend: self.kind().label(),
            what: "counting without its rules".into(),
            remedy: "meshd puts them back",
        };
        let life = counts.life.ok_or_else(missing)?;
        // After the counts: what was counted has been told of by then.
        let named = self.listener.as_ref().map(|listener| listener.hearing.with(|heard| heard.take_calls(life)));
        let mut ports = named.unwrap_or_default();
        ports.retain(|port, _| counts.calls.contains_key(port));
        for port in counts.calls.keys() {
            ports.entry(*port).or_default();
        }
        Ok(Tally { rules: life.into(), ports, totals: Some(counts.calls), refused: counts.refused })
    }

    fn notified(&self) -> bool {
        self.variant == Variant::Nft
    }

    fn revert(&mut self, wanted: &Wanted) -> Result<(), CaptureError> {
        self.alive = None;
        for family in Family::present() {
            let mut used = TABLES.into_iter().rev().filter(|table| self.variant.may_have(family, table));
            used.try_for_each(|table| self.remove(family, table))?;
        }
        self.installed.clear();
        routes::remove(wanted);
        transparent::remove(wanted)
    }
}

/// Raw addresses go direct again, at once; after a kill, when the kernel has not heard of us for two seconds.
impl Drop for Iptables {
    fn drop(&mut self) {
        if self.alive.take().is_some()
            && let Err(error) = self.empty_raw()
        {
            tracing::warn!(%error, "rules about raw addresses stay behind; they capture nothing after two seconds");
        }
    }
}
