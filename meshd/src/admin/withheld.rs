//! Claims of enrol.d that nobody has, because the PKI does not agree.

use meshd_pki_client::Credentials;
use serde::{Deserialize, Serialize};

use crate::enrol::Enrolment;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WithheldView {
    /// A unit, a pattern of scopes, `uid:1001` or `port:5432`.
    pub unit: String,
    pub identity: String,
    /// File and line.
    pub origin: String,
    /// Names both sides and the remedy.
    pub why: String,
}

impl WithheldView {
    /// Those that the PKI has no entry for, and those whose entry is for other processes.
    pub(crate) fn all(enrolment: &Enrolment, credentials: &Credentials) -> Vec<WithheldView> {
        let refused = enrolment.workloads().iter().filter_map(|workload| {
            let why = credentials.refused.get(&workload.identity)?;
            Some(WithheldView {
                unit: workload.unit.to_string(),
                identity: workload.identity.to_string(),
                origin: workload.origin.to_string(),
                why: why.clone(),
            })
        });
        let of_others = enrolment.withheld().iter().map(|withheld| WithheldView {
            unit: withheld.unit.to_string(),
            identity: withheld.identity.to_string(),
            origin: withheld.origin.to_string(),
            why: withheld.why.clone(),
        });
        refused.chain(of_others).collect()
    }
}

/// As lines of `meshd status`.
pub(super) fn show(withheld: &[WithheldView]) -> String {
    let lines = withheld.iter().map(|one| format!("  ‼ {}: {}\n", one.unit, one.why));
    match withheld.is_empty() {
        true => String::new(),
        false => format!("withheld: claimed here, and had by nobody\n{}", lines.collect::<String>()),
    }
}

#[cfg(test)]
mod tests {
    use meshd_identity::SpiffeId;
    use meshd_pki_client::fake::FakeCa;

    use super::*;
    use crate::enrol::{Reserved, Sight, load};

    #[test]
    fn what_the_pki_has_no_entry_for_and_what_it_gives_to_others_is_shown() {
        let domain = "mesh.example".parse().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let claim =
            |name: &str| format!("[[workload]]\nunit = \"{name}.service\"\nnamespace = \"shop\"\nname = \"{name}\"\n");
        std::fs::write(dir.path().join("a.toml"), ["web", "db", "ok"].map(claim).concat()).unwrap();
        let mut enrolment = load(dir.path(), &domain, &Reserved::default()).unwrap();
        let id = |name: &str| SpiffeId::workload(&domain, "shop", name).unwrap();
        let mut credentials = FakeCa::new(&domain).credentials("host", &[id("ok")]);
        credentials.refused.insert(id("web"), "the PKI permits it: none; run that".to_owned());
        enrolment.withhold("host", &[(id("db"), vec!["systemd:unit:other.service".to_owned()])].into(), Sight::Off);
        let all = WithheldView::all(&enrolment, &credentials);
        assert_eq!(all.iter().map(|one| &*one.unit).collect::<Vec<_>>(), ["web.service", "db.service"]);
        let page = show(&all);
        for part in ["had by nobody", "web.service: the PKI permits it: none", "gives it to systemd:unit:other.service"]
        {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert_eq!(show(&[]), "");
    }
}
