//! What tells lives of one registration apart in Consul, where each has an ID of its own.

use crate::register::Key;

/// Of one life. Later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Stamp {
    pub(super) epoch: u64,
    /// Of the process: two that come to the same epoch at the same moment still write two IDs.
    pub(super) nonce: u32,
}

/// Names have no colon.
fn ids_of(key: &Key) -> String {
    format!("meshd:{}:{}:", key.service, key.instance)
}

impl Stamp {
    pub(super) fn id(self, key: &Key) -> String {
        format!("{}{}-{:08x}", ids_of(key), self.epoch, self.nonce)
    }

    pub(super) fn read(id: &str, key: &Key) -> Option<Stamp> {
        let (epoch, nonce) = id.strip_prefix(&ids_of(key))?.split_once('-')?;
        Some(Stamp { epoch: epoch.parse().ok()?, nonce: u32::from_str_radix(nonce, 16).ok()? })
    }

    /// Whether `own` may take it away: it knew of it when it began (nothing found was later than `found`), or its own
    /// process wrote it.
    pub(super) fn is_left_to(self, own: Stamp, found: u64) -> bool {
        self < own && (self.epoch <= found || self.nonce == own.nonce)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::register::offer_for_tests;

    #[test]
    fn lives_of_one_epoch_have_two_ids_and_an_order() {
        let key = offer_for_tests().key;
        let (one, other) = (Stamp { epoch: 7, nonce: 0xa }, Stamp { epoch: 7, nonce: 0xb });
        assert_eq!(one.id(&key), "meshd:payments.shop:api-1:7-0000000a");
        assert_ne!(one.id(&key), other.id(&key));
        assert!(one < other && other < Stamp { epoch: 8, nonce: 0 });
        assert_eq!(Stamp::read(&other.id(&key), &key), Some(other));
        for odd in ["meshd:payments.shop:api-2:7-0000000a", "meshd:payments.shop:api-1:7", "payments-1"] {
            assert_eq!(Stamp::read(odd, &key), None, "{odd}");
        }
    }

    #[test]
    fn only_what_was_found_or_written_by_the_same_process_is_taken_away() {
        let own = Stamp { epoch: 900, nonce: 1 };
        let is_left = |epoch, nonce| Stamp { epoch, nonce }.is_left_to(own, 5);
        assert!(is_left(5, 2) && is_left(4, 3));
        assert!(is_left(899, 1), "an attempt of ours whose answer was lost");
        assert!(!is_left(7, 2), "it came after the catalog was read");
        assert!(!is_left(900, 1) && !is_left(900, 0x2) && !is_left(901, 1));
    }
}
