//! The two implementations of iptables, their programs, and which one a host uses.

use super::super::backend::BackendKind;
use super::super::tool::{CaptureError, Tool};

/// Rules of one variant are invisible to the other's programs, and both are in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Variant {
    /// Kept in nf_tables; what distributions install by default since Debian 10 and RHEL 8.
    Nft,
    /// Kept in ip_tables.
    Legacy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    /// Those there are rules to keep for.
    pub(super) fn present() -> impl Iterator<Item = Family> {
        std::iter::once(Family::V4).chain(crate::host::has_ipv6().then_some(Family::V6))
    }
}

const NFT_NEEDS: &str = "nf_tables, nft_compat and connection tracking";
/// Legacy programs speak to the kernel by a raw socket, and take a lock that only root may open by default.
const LEGACY_NEEDS: &str = "ip_tables and connection tracking, and for this variant CAP_NET_RAW and read access to \
                            /run/xtables.lock (docs/capture.md)";

impl Variant {
    /// The one `iptables` stands for on this host.
    pub(in super::super) fn of_host() -> Result<Variant, CaptureError> {
        let version = Tool { name: "iptables", package: "iptables", needs: NFT_NEEDS }.run(&["-V"], "")?;
        Ok(Variant::named_in(&version))
    }

    /// `iptables v1.8.9 (nf_tables)`; before 1.8 there was only one, and nothing in parentheses.
    fn named_in(version: &str) -> Variant {
        if version.contains("(nf_tables)") { Variant::Nft } else { Variant::Legacy }
    }

    pub(in super::super) fn kind(self) -> BackendKind {
        match self {
            Variant::Nft => BackendKind::IptablesNft,
            Variant::Legacy => BackendKind::IptablesLegacy,
        }
    }

    /// False if there certainly is no such table: merely looking at one of the legacy variant would make it.
    pub(super) fn may_have(self, family: Family, table: &str) -> bool {
        let names = match (self, family) {
            (Variant::Nft, _) => return true,
            (Variant::Legacy, Family::V4) => "/proc/net/ip_tables_names",
            (Variant::Legacy, Family::V6) => "/proc/net/ip6_tables_names",
        };
        match std::fs::read_to_string(names) {
            Ok(names) => names.lines().any(|name| name == table),
            // Only root may read it.
            Err(error) => error.kind() != std::io::ErrorKind::NotFound,
        }
    }

    pub(super) fn restore(self, family: Family) -> Tool {
        self.tool(match (self, family) {
            (Variant::Nft, Family::V4) => "iptables-nft-restore",
            (Variant::Nft, Family::V6) => "ip6tables-nft-restore",
            (Variant::Legacy, Family::V4) => "iptables-legacy-restore",
            (Variant::Legacy, Family::V6) => "ip6tables-legacy-restore",
        })
    }

    pub(super) fn save(self, family: Family) -> Tool {
        self.tool(match (self, family) {
            (Variant::Nft, Family::V4) => "iptables-nft-save",
            (Variant::Nft, Family::V6) => "ip6tables-nft-save",
            (Variant::Legacy, Family::V4) => "iptables-legacy-save",
            (Variant::Legacy, Family::V6) => "ip6tables-legacy-save",
        })
    }

    fn tool(self, name: &'static str) -> Tool {
        let needs = match self {
            Variant::Nft => NFT_NEEDS,
            Variant::Legacy => LEGACY_NEEDS,
        };
        Tool { name, package: "iptables", needs }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variant_is_what_the_version_says() {
        assert_eq!(Variant::named_in("iptables v1.8.9 (nf_tables)\n"), Variant::Nft);
        assert_eq!(Variant::named_in("iptables v1.8.9 (legacy)\n"), Variant::Legacy);
        assert_eq!(Variant::named_in("iptables v1.6.1\n"), Variant::Legacy);
    }
}
