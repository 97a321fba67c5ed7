//! Two sides must agree who has an identity: enrol.d claims it for a unit, user or port; an entry of the PKI may say which
//! unit or user it is for. What they do not agree on is given to nobody.

use std::collections::BTreeMap;

use meshd_identity::SpiffeId;

use super::{Enrolment, Selector, Workload};

impl Enrolment {
    /// Takes out what `selectors`, the PKI's, do not permit. Each comes back as one message with the remedy.
    pub fn withhold(&mut self, host: &str, selectors: &BTreeMap<SpiffeId, Vec<String>>) -> Vec<String> {
        let mut messages = Vec::new();
        for workload in &self.workloads {
            let Some(wanted) = selectors.get(&workload.identity).filter(|wanted| !workload.meets(wanted)) else {
                continue;
            };
            self.withheld.insert(workload.identity.clone());
            let (id, unit, wanted) = (workload.identity.short(), &workload.unit, wanted.join(" "));
            messages.push(format!(
                "{}: {unit} claims {id}, the PKI's entry gives it to {wanted} only, so nobody has it here; enrol that \
                 one instead, or run `meshd-pki entry add --host {host}{} {id}`",
                workload.origin,
                remedy(&workload.selector)
            ));
        }
        let may_stay =
            |workload: &Workload| selectors.get(&workload.identity).is_none_or(|wanted| workload.meets(wanted));
        self.workloads.retain(|workload| may_stay(workload));
        self.units.retain(|_, workload| may_stay(workload));
        self.scopes.retain(|(_, workload)| may_stay(workload));
        self.uids.retain(|_, workload| may_stay(workload));
        self.by_port.retain(|_, workload| may_stay(workload));
        let withheld = self.deliveries.extract_if(.., |delivery| !may_stay(&delivery.owner));
        self.withheld_deliveries.extend(withheld);
        self.by_target.retain(|_, delivery| may_stay(&delivery.owner));
        messages
    }
}

impl Workload {
    /// Whether all selectors are what it is claimed by. One that this version does not know is none of them.
    fn meets(&self, selectors: &[String]) -> bool {
        selectors.iter().all(|selector| Some(selector) == spelt(&self.selector).as_ref())
    }
}

/// As entries of the PKI have it; patterns and ports mean whoever comes, which no entry can.
fn spelt(selector: &Selector) -> Option<String> {
    match selector {
        Selector::Unit(unit) => Some(format!("systemd:unit:{unit}")),
        Selector::Uid(uid) => Some(format!("unix:uid:{uid}")),
        Selector::Scope(_) | Selector::Port(_) => None,
    }
}

fn remedy(selector: &Selector) -> String {
    spelt(selector).map(|selector| format!(" --selector {selector}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enrol::{self, Reserved};

    const TWO: &str = "[[workload]]\nunit = \"checkout.service\"\nnamespace = \"shop\"\nname = \"checkout\"\n\
                       [[workload.serve]]\nservice = \"checkout.shop\"\nport = 80\ndeliver = \"127.0.0.1:8080\"\n\
                       [[workload]]\nuid = 7\nnamespace = \"shop\"\nname = \"ledger\"\n";

    fn withheld(selectors: &[(&str, &str)]) -> (Enrolment, Vec<String>) {
        let domain = "mesh.example".parse().unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.toml"), TWO).unwrap();
        let mut enrolment = enrol::load(dir.path(), &domain, &Reserved::default()).unwrap();
        let of = |(name, selector): &(&str, &str)| {
            (SpiffeId::workload(&domain, "shop", name).unwrap(), vec![(*selector).to_owned()])
        };
        let messages = enrolment.withhold("web", &selectors.iter().map(of).collect());
        (enrolment, messages)
    }

    #[test]
    fn claims_the_entries_agree_with_stay() {
        let (enrolment, messages) =
            withheld(&[("checkout", "systemd:unit:checkout.service"), ("ledger", "unix:uid:7")]);
        assert_eq!((enrolment.workloads().len(), enrolment.deliveries().len(), messages.len()), (2, 1, 0));
        assert!(withheld(&[]).1.is_empty());
    }

    #[test]
    fn an_identity_given_to_another_unit_or_user_is_had_by_nobody_and_still_asked_for() {
        for selector in ["systemd:unit:other.service", "unix:uid:7", "unix:sha256:00", "from:the:future"] {
            let (enrolment, messages) = withheld(&[("checkout", selector)]);
            assert!(enrolment.workload_of_unit("checkout.service").is_none() && enrolment.deliveries().is_empty());
            assert_eq!((enrolment.workloads().len(), enrolment.identities().len()), (1, 2));
            assert_eq!(enrolment.claimed_deliveries().count(), 1, "its strict port would open");
            let [message] = &messages[..] else { panic!("{messages:?}") };
            for part in [
                "a.toml:1",
                "checkout.service claims ns/shop/sa/checkout",
                selector,
                "--selector systemd:unit:checkout.service",
            ] {
                assert!(message.contains(part), "{part}: {message}");
            }
        }
    }
}
