//! A host that is banned stops being its workloads: when a deny set that the PKI has signed names the host itself, and for as
//! long as it does. Its own certificate and the key it enrolled with stay, for a ban that is lifted: by them it hears of
//! that, and comes back.

use crate::Credentials;
use crate::state::State;

/// What the credentials become; None where nothing changes.
pub(crate) fn heed(state: &State, is_banned: bool) -> Option<State> {
    if state.credentials.banned == is_banned {
        return None;
    }
    let mut next = state.clone();
    let held = &mut next.credentials;
    held.banned = is_banned;
    // What was refused for it is asked for again once it is lifted.
    held.refused.clear();
    if is_banned {
        let words = held.why_banned();
        let given_up = std::mem::take(&mut held.workloads);
        held.refused.extend(given_up.into_keys().map(|id| (id, words.clone())));
    }
    Some(next)
}

impl Credentials {
    /// For operators, where `banned` is set.
    pub fn why_banned(&self) -> String {
        let host = &self.host_id;
        format!(
            "host `{host}` is banned (the deny set in force, signed by the PKI, names it): it has given up its identities; \
             to let it back in, run `meshd-pki host unban {host}`"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::sample;

    #[test]
    fn a_ban_takes_the_workloads_identities_and_leaves_what_the_host_comes_back_with() {
        let before = sample("web");
        let banned = heed(&before, true).unwrap();
        let held = &banned.credentials;
        assert!(held.workloads.is_empty() && held.refused.values().all(|words| words.contains("host unban web")));
        assert_eq!(held.refused.len(), before.credentials.workloads.len());
        assert_eq!((&held.host.serial, &banned.enrolled_key), (&before.credentials.host.serial, &before.enrolled_key));
        assert!(heed(&banned, true).is_none());
        let back = heed(&banned, false).unwrap();
        assert!(back.credentials.refused.is_empty() && !back.credentials.banned);
        assert!(heed(&before, false).is_none());
    }
}
