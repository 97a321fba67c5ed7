//! The nftables backends: one table of our own, replaced whole in one transaction.

mod guard;
mod redirect;
mod tproxy;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use super::backend::{Backend, BackendKind, ListenAt};
use super::flow::Recovery;
use super::tool::{CaptureError, NFT, Tool};
use super::wanted::{Facts, Wanted};
use super::{routes, transparent};

const TPROXY_NEEDS: Tool = Tool { needs: "nft_tproxy", ..NFT };
const REDIRECT_NEEDS: Tool = Tool { needs: "nft_redir and connection tracking", ..NFT };

/// How a connection to a virtual IP gets to our listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NftCapture {
    Tproxy,
    Redirect,
}

pub(super) struct Nft {
    capture: NftCapture,
    /// Our table as the kernel listed it after we had put it there.
    installed: Option<String>,
}

impl Nft {
    pub(super) fn new(capture: NftCapture) -> Nft {
        Nft { capture, installed: None }
    }

    fn tool(&self) -> Tool {
        match self.capture {
            NftCapture::Tproxy => TPROXY_NEEDS,
            NftCapture::Redirect => REDIRECT_NEEDS,
        }
    }

    /// The `nft -f -` input that replaces our table.
    fn table(&self, wanted: &Wanted, facts: &Facts) -> String {
        let capture = match self.capture {
            NftCapture::Tproxy => tproxy::chains(wanted),
            NftCapture::Redirect => redirect::chains(wanted),
        };
        let guard = guard::chains(wanted, facts);
        let transparent = transparent::chains(wanted);
        format!("table inet meshd\ndelete table inet meshd\ntable inet meshd {{\n{capture}{guard}{transparent}}}\n")
    }
}

impl Backend for Nft {
    fn kind(&self) -> BackendKind {
        match self.capture {
            NftCapture::Tproxy => BackendKind::NftTproxy,
            NftCapture::Redirect => BackendKind::NftRedirect,
        }
    }

    fn probe(&self, wanted: &Wanted) -> Result<(), CaptureError> {
        // `--check` has the kernel judge the whole transaction without committing it.
        self.tool().run(&["--check", "-f", "-"], &self.table(wanted, &Facts::default())).map(drop)
    }

    fn prepare(&mut self, wanted: &Wanted) -> Result<ListenAt, CaptureError> {
        let at = |ip| SocketAddr::new(ip, wanted.capture_port);
        Ok(ListenAt {
            addresses: vec![at(Ipv4Addr::LOCALHOST.into()), at(Ipv6Addr::LOCALHOST.into())],
            transparent: self.capture == NftCapture::Tproxy,
        })
    }

    fn recovery(&self) -> Recovery {
        match self.capture {
            NftCapture::Tproxy => Recovery::Transparent,
            NftCapture::Redirect => Recovery::Redirect,
        }
    }

    fn render(&self, wanted: &Wanted, facts: &Facts) -> String {
        format!(
            "# nft -f -\n{}# routes\n{}",
            self.table(wanted, facts),
            routes::render(wanted) + &transparent::render(wanted)
        )
    }

    fn apply(&mut self, wanted: &Wanted, facts: &Facts) -> Result<(), CaptureError> {
        // Routes first: once the rules capture, a virtual IP must already lead to this host.
        routes::install(wanted)?;
        transparent::install(wanted)?;
        self.tool().run(&["-f", "-"], &self.table(wanted, facts))?;
        self.installed = Some(listed()?);
        Ok(())
    }

    fn intact(&mut self, wanted: &Wanted) -> Result<bool, CaptureError> {
        // Listing fails when the table is gone.
        let table = listed().is_ok_and(|listed| Some(listed) == self.installed);
        Ok(table && routes::intact(wanted)? && transparent::intact(wanted)?)
    }

    fn revert(&mut self, wanted: &Wanted) -> Result<(), CaptureError> {
        // Adding before deleting makes it succeed whether or not the table is there.
        NFT.run(&["-f", "-"], "table inet meshd\ndelete table inet meshd\n")?;
        self.installed = None;
        routes::remove(wanted);
        transparent::remove(wanted)?;
        Ok(())
    }
}

/// Without counters and the contents of sets, which change by themselves.
fn listed() -> Result<String, CaptureError> {
    NFT.run(&["--stateless", "--terse", "list", "table", "inet", "meshd"], "")
}

#[cfg(test)]
mod tests {
    use super::super::wanted::tests::wanted;
    use super::*;

    #[test]
    fn without_strict_ports_only_virtual_ips_are_touched() {
        let text = Nft::new(NftCapture::Tproxy).table(&wanted(), &Facts::default());
        let expected = "table inet meshd
delete table inet meshd
table inet meshd {
  chain prerouting {
    type filter hook prerouting priority mangle; policy accept;
    iif lo ip daddr 240.240.0.0/16 meta l4proto tcp tproxy ip to 127.0.0.1:15001 accept
    iif lo ip6 daddr fd6d:6573:6864::/64 meta l4proto tcp tproxy ip6 to [::1]:15001 accept
    iif lo ip daddr 240.240.0.0/16 meta l4proto tcp reject with tcp reset
    iif lo ip6 daddr fd6d:6573:6864::/64 meta l4proto tcp reject with tcp reset
    ip daddr 240.240.0.0/16 reject
    ip6 daddr fd6d:6573:6864::/64 reject
  }
}
";
        assert_eq!(text, expected);
    }
}
