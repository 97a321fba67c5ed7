//! Two sides must agree who has an identity: enrol.d claims it for a unit, user or port; an entry of the PKI may say what
//! its processes must be. What they do not agree on is given to nobody; what cannot be judged of a claim is asked of every
//! process (`guard`).

use std::collections::BTreeMap;
use std::sync::Arc;

use meshd_identity::{ProcessSelector, SpiffeId};

use super::{Enrolment, Guard, Origin, Selector, Sight, Workload};

/// A claim that nobody has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Withheld {
    pub identity: SpiffeId,
    pub unit: Arc<str>,
    pub origin: Origin,
    /// Names both sides and the remedy.
    pub why: String,
}

impl Enrolment {
    /// Takes out what `selectors`, the PKI's, do not permit, and remembers why. `sight`: whether programs can be seen.
    pub fn withhold(&mut self, host: &str, selectors: &BTreeMap<SpiffeId, Vec<String>>, sight: Sight) {
        self.guards.clear();
        let workloads = std::mem::take(&mut self.workloads);
        for workload in workloads {
            let wanted = selectors.get(&workload.identity).map_or(&[][..], Vec::as_slice);
            match workload.guard(wanted, sight) {
                Ok(guard) => {
                    if !guard.is_empty() {
                        self.guards.insert(workload.identity.clone(), Arc::new(guard));
                    }
                    self.workloads.push(workload);
                }
                Err(reason) => self.withheld.push(workload.withheld(host, wanted, &reason)),
            }
        }
        let may_stay = |workload: &Workload| {
            let wanted = selectors.get(&workload.identity).map_or(&[][..], Vec::as_slice);
            workload.guard(wanted, sight).is_ok()
        };
        self.units.retain(|_, workload| may_stay(workload));
        self.scopes.retain(|(_, workload)| may_stay(workload));
        self.uids.retain(|_, workload| may_stay(workload));
        self.by_port.retain(|_, workload| may_stay(workload));
        let withheld = self.deliveries.extract_if(.., |delivery| !may_stay(&delivery.owner));
        self.withheld_deliveries.extend(withheld);
        self.by_target.retain(|_, delivery| may_stay(&delivery.owner));
    }
}

impl Workload {
    /// What to ask of each process; or why no process of the claim can be what the entry asks for.
    fn guard(&self, wanted: &[String], sight: Sight) -> Result<Guard, String> {
        if wanted.is_empty() {
            return Ok(Guard::default());
        }
        let disagree = || "so nobody has it here; enrol that one instead, or".to_owned();
        // What this version does not know means no process it knows of.
        let parsed = ProcessSelector::parse_all(wanted).map_err(|_| disagree())?;
        let agrees = |one: &ProcessSelector| match (&self.selector, one) {
            (Selector::Unit(unit), ProcessSelector::Unit(wanted)) => **unit == **wanted,
            (Selector::Uid(uid), ProcessSelector::Uid(wanted)) => uid == wanted,
            // They mean whoever comes, which no entry can.
            (Selector::Scope(_) | Selector::Port(_), _) => false,
            _ => true,
        };
        if !parsed.iter().all(agrees) {
            return Err(disagree());
        }
        let guard = Guard::of(&self.selector, parsed);
        match sight.remedy().filter(|_| guard.needs_program()) {
            Some(remedy) => Err(format!("and this meshd does not see programs, so nobody has it here; {remedy}; or")),
            None => Ok(guard),
        }
    }

    fn withheld(&self, host: &str, wanted: &[String], reason: &str) -> Withheld {
        let (id, unit, wanted) = (self.identity.short(), &self.unit, wanted.join(" "));
        let why = format!(
            "{}: {unit} claims {id}, the PKI's entry gives it to {wanted} only, {reason} run `meshd-pki entry add --host \
             {host}{} {id}`",
            self.origin,
            remedy(&self.selector)
        );
        Withheld { identity: self.identity.clone(), unit: self.unit.clone(), origin: self.origin.clone(), why }
    }
}

/// As entries of the PKI have it; patterns and ports mean whoever comes, which no entry can.
fn remedy(selector: &Selector) -> String {
    let spelt = match selector {
        Selector::Unit(unit) => ProcessSelector::Unit((&**unit).into()),
        Selector::Uid(uid) => ProcessSelector::Uid(*uid),
        Selector::Scope(_) | Selector::Port(_) => return String::new(),
    };
    format!(" --selector {spelt}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enrol::{self, Owner, Reserved};

    const TWO: &str = "[[workload]]\nunit = \"checkout.service\"\nnamespace = \"shop\"\nname = \"checkout\"\n\
                       [[workload.serve]]\nservice = \"checkout.shop\"\nport = 80\ndeliver = \"127.0.0.1:8080\"\n\
                       [[workload]]\nuid = 7\nnamespace = \"shop\"\nname = \"ledger\"\n\
                       [[workload]]\nport = 99\nnamespace = \"shop\"\nname = \"port\"\n";

    fn id(name: &str) -> SpiffeId {
        SpiffeId::workload(&"mesh.example".parse().unwrap(), "shop", name).unwrap()
    }

    fn withheld(sight: Sight, selectors: &[(&str, &[&str])]) -> Enrolment {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.toml"), TWO).unwrap();
        let mut enrolment = enrol::load(dir.path(), id("x").trust_domain(), &Reserved::default()).unwrap();
        let of = |(name, selectors): &(&str, &[&str])| {
            (id(name), selectors.iter().map(|selector| (*selector).to_owned()).collect())
        };
        enrolment.withhold("web", &selectors.iter().map(of).collect(), sight);
        enrolment
    }

    #[test]
    fn claims_the_entries_agree_with_stay() {
        let agreed: [(&str, &[&str]); 2] =
            [("checkout", &["systemd:unit:checkout.service"]), ("ledger", &["unix:uid:7"])];
        for enrolment in [withheld(Sight::Off, &agreed), withheld(Sight::Off, &[])] {
            assert_eq!((enrolment.workloads().len(), enrolment.deliveries().len()), (3, 1));
            assert!(enrolment.withheld().is_empty() && enrolment.guard(&id("checkout")).is_none());
        }
    }

    #[test]
    fn an_identity_given_to_another_unit_is_had_by_nobody_and_still_asked_for() {
        for selector in ["systemd:unit:other.service", "unix:sha256:00", "from:the:future"] {
            let enrolment = withheld(Sight::On, &[("checkout", &[selector])]);
            assert!(enrolment.workload_of_unit("checkout.service").is_none() && enrolment.deliveries().is_empty());
            assert_eq!((enrolment.workloads().len(), enrolment.identities().len()), (2, 3));
            assert_eq!(enrolment.claimed_deliveries().count(), 1, "its strict port would open");
            let [Withheld { why, .. }] = enrolment.withheld() else { panic!("{:?}", enrolment.withheld()) };
            for part in [
                "a.toml:1",
                "checkout.service claims ns/shop/sa/checkout",
                selector,
                "--selector systemd:unit:checkout.service",
            ] {
                assert!(why.contains(part), "{part}: {why}");
            }
        }
        assert_eq!(withheld(Sight::On, &[("port", &["unix:uid:7"])]).withheld().len(), 1);
    }

    #[test]
    fn what_a_claim_does_not_say_is_asked_of_each_process() {
        let selectors = ["systemd:unit:checkout.service", "unix:uid:7"];
        let enrolment = withheld(Sight::Off, &[("checkout", &selectors), ("ledger", &["systemd:unit:ledger.service"])]);
        assert!(enrolment.withheld().is_empty());
        let owner = |unit: &str, uid| Owner { unit: Some(unit.into()), has_cgroup: true, uid };
        let checkout = enrolment.guard(&id("checkout")).unwrap();
        assert_eq!(checkout.unmet_by_owner(&owner("checkout.service", 7)), None);
        assert!(checkout.unmet_by_owner(&owner("checkout.service", 8)).is_some());
        let ledger = enrolment.guard(&id("ledger")).unwrap();
        assert_eq!(ledger.unmet_by_owner(&owner("ledger.service", 7)), None);
        assert!(ledger.unmet_by_owner(&owner("cron.service", 7)).is_some());
    }

    #[test]
    fn programs_are_asked_for_only_where_they_are_seen() {
        let selectors: [(&str, &[&str]); 1] = [("checkout", &["unix:path:/usr/bin/checkout"])];
        assert!(withheld(Sight::On, &selectors).guard(&id("checkout")).unwrap().needs_program());
        for (sight, remedy) in [(Sight::Off, "path_selectors = true"), (Sight::Blind, "AmbientCapabilities")] {
            let enrolment = withheld(sight, &selectors);
            let [Withheld { why, .. }] = enrolment.withheld() else { panic!("{:?}", enrolment.withheld()) };
            assert!(why.contains(remedy), "{why}");
        }
    }
}
