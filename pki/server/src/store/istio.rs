//! What proxies of Istio were given: on record as what hosts were given, by who asked.

use super::hosts::{self, Issued, KEEP_ENDED_S};
use super::{DbError, Records, glance};

/// No host id has a colon.
const PREFIX: &str = "istio:";
/// A transaction of etcd has 128 operations.
const AT_ONCE: usize = 32;

/// `holder`: a node as its cluster names it, or whoever else asked.
pub(crate) fn note(records: &mut dyn Records, holder: &str, issued: Issued, now: i64) -> Result<(), DbError> {
    let holder = format!("{PREFIX}{holder}");
    // Nodes come and go: where one comes, those that went are forgotten.
    if records.get(&format!("issued/{holder}"))?.is_none() {
        forget_gone(records, now)?;
    }
    hosts::note_issued(records, &holder, vec![issued], now)
}

fn forget_gone(records: &mut dyn Records, now: i64) -> Result<(), DbError> {
    let found: Vec<(String, Vec<Issued>)> = glance(records, &format!("issued/{PREFIX}"))?;
    let is_gone = |issued: &[Issued]| issued.iter().all(|one| one.not_after <= now - KEEP_ENDED_S);
    for (holder, _) in found.iter().filter(|(_, issued)| is_gone(issued)).take(AT_ONCE) {
        records.delete(&format!("issued/{PREFIX}{holder}"))?;
        records.delete(&format!("leaves/{PREFIX}{holder}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Database, View};

    fn issued(not_after: i64) -> Issued {
        let text = |text: &str| text.to_owned();
        Issued {
            serial: text("1"),
            spiffe_id: text("spiffe://a/ns/b/sa/c"),
            authority: text("x"),
            issued_at: 0,
            not_after,
        }
    }

    fn holders(view: &mut dyn View, prefix: &str) -> Vec<String> {
        view.list(prefix).unwrap().into_iter().map(|(key, _)| key).collect()
    }

    #[test]
    fn what_nodes_were_given_that_are_gone_is_forgotten_when_another_comes_and_what_hosts_were_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pki.db");
        let domain = "prod.example.org".parse().unwrap();
        Database::create(&path, &domain, |_| Ok::<(), DbError>(())).unwrap();
        let database = Database::open_file(&path).unwrap();
        let done = database.transaction(|records| -> Result<_, DbError> {
            hosts::note_issued(records, "web", vec![issued(10)], 0)?;
            note(records, "prod:old", issued(10), 0)?;
            note(records, "prod:kept", issued(10 + KEEP_ENDED_S), 0)?;
            assert_eq!(holders(records, "issued/").len(), 3);
            note(records, "prod:new", issued(20 + KEEP_ENDED_S), 10 + KEEP_ENDED_S)?;
            Ok((holders(records, "issued/"), holders(records, "leaves/")))
        });
        let (issued, leaves) = done.unwrap();
        assert_eq!(issued, ["issued/istio:prod:kept", "issued/istio:prod:new", "issued/web"]);
        assert_eq!(leaves, ["leaves/istio:prod:kept", "leaves/istio:prod:new", "leaves/web"]);
    }
}
