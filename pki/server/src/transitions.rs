//! The way from a bundle that a host holds to the one in force.

use meshd_pki_api::v1;

use crate::pki::Pki;
use crate::refused::Refused;
use crate::store::bundles::{self, StoredBundle};
use crate::store::{settings, trust};

impl Pki {
    pub fn transitions(&self, request: &v1::TransitionsRequest) -> Result<v1::TransitionsReply, Refused> {
        let (all, sequence, recovery) = self.state.database.read(|view| -> Result<_, Refused> {
            let sequence = trust::trust(view)?.sequence;
            // From a bundle that never was, no way is looked for.
            let known = bundles::bundle(view, request.sequence)?.filter(|known| known.sequence < sequence);
            let from = known.map_or(sequence, |known| known.sequence);
            Ok((bundles::from(view, from)?, sequence, settings::recovery_statements(view)?))
        })?;
        let in_force = all.iter().find(|one| one.sequence == sequence).map(|one| self.wire(one));
        let steps = path(&all, request.sequence, sequence).into_iter();
        let steps = steps.map(|step| v1::SignedBundle {
            bundle: Some(self.wire(step)),
            signatures: step.signatures.iter().map(|one| one.jws.clone()).collect(),
        });
        Ok(v1::TransitionsReply { steps: steps.collect(), recovery, bundle: in_force })
    }

    fn wire(&self, stored: &StoredBundle) -> v1::TrustBundle {
        let trust_domain = self.trust_domain.to_string();
        v1::TrustBundle { trust_domain, sequence: stored.sequence, jwks: stored.jwks.clone().into_bytes() }
    }
}

/// The shortest way from one bundle to another: from each, as far as one of its roots has signed.
fn path(all: &[StoredBundle], from: u64, to: u64) -> Vec<&StoredBundle> {
    let mut steps = Vec::new();
    let mut held = all.iter().find(|one| one.sequence == from);
    while let Some(bundle) = held.filter(|bundle| bundle.sequence < to) {
        let signed = |one: &StoredBundle| one.signatures.iter().any(|signature| bundle.roots.contains(&signature.root));
        let next = all.iter().filter(|one| one.sequence > bundle.sequence && one.sequence <= to && signed(one));
        held = next.max_by_key(|one| one.sequence);
        steps.extend(held);
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::bundles::Signature;

    fn stored(sequence: u64, roots: &[&str], signed_by: &[&str]) -> StoredBundle {
        let signature = |root: &&str| Signature { root: (*root).to_owned(), jws: String::new() };
        StoredBundle {
            sequence,
            jwks: String::new(),
            roots: roots.iter().map(|root| (*root).to_owned()).collect(),
            signatures: signed_by.iter().map(signature).collect(),
            created_at: 0,
        }
    }

    #[test]
    fn the_way_jumps_as_far_as_a_known_root_has_signed() {
        let all = [
            stored(1, &["a"], &["a"]),
            stored(2, &["a", "b"], &["a", "b"]),
            stored(3, &["b"], &["a", "b"]),
            stored(4, &["b", "c"], &["b", "c"]),
            stored(5, &["c"], &["b", "c"]),
        ];
        let way = |from, to| path(&all, from, to).iter().map(|one| one.sequence).collect::<Vec<_>>();
        assert_eq!(way(1, 5), [3, 5]);
        assert_eq!(way(2, 5), [5]);
        assert_eq!(way(2, 4), [4]);
        assert_eq!(way(5, 5), [0_u64; 0]);
        assert_eq!(way(9, 5), [0_u64; 0], "an unknown bundle has no way");
    }
}
