//! What is measured.

use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Subject {
    Direct,
    Haproxy,
    Envoy,
    Meshd,
    /// meshd with the TUN backend; only when asked for.
    MeshdTun,
}

impl Subject {
    pub(crate) const ALL: [Self; 5] = [Self::Direct, Self::Haproxy, Self::Envoy, Self::Meshd, Self::MeshdTun];

    /// meshd's capture backend, if it is meshd.
    pub(crate) fn backend(self) -> Option<&'static str> {
        match self {
            Self::Direct | Self::Haproxy | Self::Envoy => None,
            Self::Meshd => Some("nft-tproxy"),
            Self::MeshdTun => Some("tun"),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Haproxy => "HAProxy",
            Self::Envoy => "Envoy",
            Self::Meshd => "meshd",
            Self::MeshdTun => "meshd-tun",
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}
