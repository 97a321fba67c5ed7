//! What hosts are told of other trust domains: only what an identity they may hold has dealings with.

use meshd_pki_api::v1;

use crate::pki::Pki;
use crate::store::federation::{self, EVERYBODY, Federated};
use crate::store::{DbError, View};

impl Pki {
    /// For a host that may hold these identities.
    pub(crate) fn federation_for(&self, view: &mut dyn View, permitted: &[String]) -> Result<v1::Federation, DbError> {
        let bundles = federation::all(view)?.iter().filter_map(|one| share(one, permitted)).collect();
        Ok(v1::Federation { revision: federation::revision(view)?, bundles })
    }
}

fn share(one: &Federated, permitted: &[String]) -> Option<v1::FederatedBundle> {
    let held = one.held.as_ref()?;
    let named = &one.relationship.identities;
    let everybody = named.iter().any(|identity| identity == EVERYBODY);
    let spiffe_ids: Vec<String> = permitted.iter().filter(|id| everybody || named.contains(id)).cloned().collect();
    let bundle = v1::TrustBundle {
        trust_domain: one.relationship.trust_domain.to_string(),
        sequence: held.sequence,
        jwks: held.jwks.clone().into_bytes(),
    };
    (!spiffe_ids.is_empty()).then_some(v1::FederatedBundle { bundle: Some(bundle), spiffe_ids })
}
