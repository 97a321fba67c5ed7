//! The nftables backends: one table of our own, replaced whole in one transaction.

mod guard;
mod ledger;
mod owned;
mod owners;
mod raw;
mod redirect;
mod tproxy;

use std::cell::OnceCell;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use self::owners::Recorded;
use self::raw::Raw;
use super::backend::{Backend, BackendKind, ListenAt};
use super::flow::Recovery;
use super::ledger::Tally;
use super::owner::OwnerRecord;
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

/// Our table.
struct Installed {
    /// As we put it there.
    text: String,
    /// As the kernel listed it then.
    listed: String,
}

pub(super) struct Nft {
    capture: NftCapture,
    installed: Option<Installed>,
    raw: Raw,
    /// What this host's nft and kernel can record, once tried.
    owners: OnceCell<Recorded>,
}

impl Nft {
    pub(super) fn new(capture: NftCapture) -> Nft {
        Nft { capture, installed: None, raw: Raw::default(), owners: OnceCell::new() }
    }

    fn tool(&self) -> Tool {
        match self.capture {
            NftCapture::Tproxy => TPROXY_NEEDS,
            NftCapture::Redirect => REDIRECT_NEEDS,
        }
    }

    /// The `nft -f -` input that replaces our table.
    fn table(&self, wanted: &Wanted, facts: &Facts, record: Recorded) -> String {
        let capture = match self.capture {
            NftCapture::Tproxy => tproxy::chains(wanted),
            NftCapture::Redirect => redirect::chains(wanted),
        };
        let Wanted { vip4, vip6, .. } = wanted;
        let owners = owners::chains(record, &format!("ip daddr {vip4}"), &format!("ip6 daddr {vip6}"));
        let (guard, ledger) = (guard::chains(wanted, facts), ledger::chains(wanted));
        let rest = ledger + &transparent::chains(wanted);
        format!("table inet meshd\ndelete table inet meshd\ntable inet meshd {{\n{capture}{owners}{guard}{rest}}}\n")
    }

    /// `--check` has the kernel judge the whole transaction without committing it.
    fn check(&self, wanted: &Wanted, record: Recorded) -> Result<(), CaptureError> {
        self.tool().run(&["--check", "-f", "-"], &self.table(wanted, &Facts::default(), record)).map(drop)
    }

    /// As much as this host can: old ones cannot write down both user and cgroup.
    fn record(&self, wanted: &Wanted) -> Recorded {
        const BEST_FIRST: [Recorded; 2] = [Recorded { v4: true, v6: true }, Recorded { v4: true, v6: false }];
        *self.owners.get_or_init(|| {
            let can = BEST_FIRST.into_iter().find(|record| self.check(wanted, *record).is_ok()).unwrap_or_default();
            if !can.v4 {
                tracing::info!("nft or the kernel is too old to record who opens connections: see docs/enrolment.md");
            }
            can
        })
    }

    fn has(&self, text: &str) -> bool {
        self.installed.as_ref().is_some_and(|installed| installed.text == text && installed.is_intact())
    }

    /// TPROXY takes what is routed to this host; REDIRECT needs no routes.
    fn needs_raw_routes(&self, wanted: &Wanted) -> bool {
        self.capture == NftCapture::Tproxy && !wanted.raw_callers.is_empty()
    }

    fn render_raw_routes(&self, wanted: &Wanted) -> String {
        if self.needs_raw_routes(wanted) { routes::render_raw(wanted) } else { String::new() }
    }
}

impl Installed {
    fn is_intact(&self) -> bool {
        // Listing fails when the table is gone.
        listed().is_ok_and(|listed| listed == self.listed)
    }
}

/// Whether a table of raw addresses is there: only whoever holds it can remove it, or end.
pub(super) fn raw_is_held() -> bool {
    NFT.run(&["list", "table", "inet", owned::NAME], "").is_ok()
}

impl Backend for Nft {
    fn kind(&self) -> BackendKind {
        match self.capture {
            NftCapture::Tproxy => BackendKind::NftTproxy,
            NftCapture::Redirect => BackendKind::NftRedirect,
        }
    }

    fn probe(&self, wanted: &Wanted) -> Result<(), CaptureError> {
        self.check(wanted, Recorded::default())?;
        let record = self.record(wanted);
        if !wanted.raw_callers.is_empty() {
            let chains = raw::chains(self.capture, wanted, &Facts::default(), record);
            // Under another name: the one of a daemon that just ended may still be held.
            NFT.run(&["--check", "-f", "-"], &owned::transaction("meshd_raw_probe", 0, &chains))?;
        }
        Ok(())
    }

    fn owners(&self) -> OwnerRecord {
        let records = self.owners.get().is_some_and(|recorded| recorded.v4);
        if records { OwnerRecord::Nft } else { OwnerRecord::Nowhere }
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
        let mut text = format!(
            "# nft -f -\n{}# routes\n{}",
            self.table(wanted, facts, self.record(wanted)),
            routes::render(wanted) + &transparent::render(wanted)
        );
        if !wanted.raw_callers.is_empty() {
            let raw =
                owned::transaction(owned::NAME, 0, &raw::chains(self.capture, wanted, facts, self.record(wanted)));
            text += &format!("# nft -i, held while meshd runs\n{raw}# routes\n{}", self.render_raw_routes(wanted));
        }
        text
    }

    fn apply(&mut self, wanted: &Wanted, facts: &Facts) -> Result<(), CaptureError> {
        // Routes first: once the rules capture, a virtual IP must already lead to this host.
        routes::install(wanted)?;
        transparent::install(wanted)?;
        if self.needs_raw_routes(wanted) {
            routes::install_raw(wanted)?;
        }
        self.raw.keep(raw::chains(self.capture, wanted, facts, self.record(wanted)), wanted)?;
        let text = self.table(wanted, facts, self.record(wanted));
        // Replacing it would reset what it counts.
        if !self.has(&text) {
            self.tool().run(&["-f", "-"], &text)?;
            self.installed = Some(Installed { text, listed: listed()? });
        }
        Ok(())
    }

    fn intact(&mut self, wanted: &Wanted) -> Result<bool, CaptureError> {
        let table = self.installed.as_ref().is_some_and(Installed::is_intact);
        let routes = routes::intact(wanted)? && (!self.needs_raw_routes(wanted) || routes::raw_intact(wanted)?);
        Ok(table && self.raw.intact() && routes && transparent::intact(wanted)?)
    }

    fn tally(&self) -> Result<Tally, CaptureError> {
        let json = NFT.run(&["--json", "list", "table", "inet", "meshd"], "")?;
        let broken = |error: serde_json::Error| CaptureError::State {
            what: "cannot read what `nft --json list table inet meshd` prints".into(),
            source: error.into(),
        };
        Ok(ledger::tally(&serde_json::from_str(&json).map_err(broken)?))
    }

    fn revert(&mut self, wanted: &Wanted) -> Result<(), CaptureError> {
        // Adding before deleting makes it succeed whether or not the table is there.
        NFT.run(&["-f", "-"], "table inet meshd\ndelete table inet meshd\n")?;
        self.installed = None;
        // Of a daemon that is gone, the raw table is gone, too.
        self.raw.release();
        routes::remove(wanted);
        routes::remove_raw(wanted);
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
        let text = Nft::new(NftCapture::Tproxy).table(&wanted(), &Facts::default(), Recorded::default());
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
