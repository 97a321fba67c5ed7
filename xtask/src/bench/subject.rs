//! What is measured.

use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Subject {
    Direct,
    Haproxy,
    Envoy,
    Meshd,
}

impl Subject {
    pub(crate) const ALL: [Self; 4] = [Self::Direct, Self::Haproxy, Self::Envoy, Self::Meshd];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Haproxy => "HAProxy",
            Self::Envoy => "Envoy",
            Self::Meshd => "meshd",
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}
