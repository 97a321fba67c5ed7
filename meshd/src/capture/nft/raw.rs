//! Raw service addresses: captured for enrolled callers only, in a second table that vanishes with the daemon.
//!
//! Which way a connection goes is decided at its first SYN and remembered in its conntrack mark; see
//! docs/adr/0004-raw-flows-decided-at-syn.md.

use std::fmt::Write;
use std::net::SocketAddr;

use super::super::tool::CaptureError;
use super::super::wanted::{Facts, Present, Wanted};
use super::guard::SYN;
use super::owned::OwnedTable;
use super::owners::Recorded;
use super::{NftCapture, owners, redirect};

/// Keeps the second table equal to what is wanted.
#[derive(Default)]
pub(super) struct Raw {
    held: Option<Held>,
}

struct Held {
    table: OwnedTable,
    chains: String,
}

impl Raw {
    /// Puts it in force, where raw addresses are wanted. Once there, it stays until `release` even if nothing is
    /// wanted any more: connections it captured live on.
    pub(super) fn keep(&mut self, chains: String, wanted: &Wanted) -> Result<(), CaptureError> {
        if wanted.raw_callers.is_empty() && self.held.is_none() {
            return Ok(());
        }
        if let Some(held) = &mut self.held
            && held.table.is_alive()
        {
            if held.chains == chains {
                return Ok(());
            }
            if held.table.replace(&chains).is_ok() {
                held.chains = chains;
                return Ok(());
            }
        }
        // A new holder can have the name only when the old one is gone.
        self.held = None;
        self.held = Some(Held { table: OwnedTable::hold(&chains)?, chains });
        Ok(())
    }

    pub(super) fn intact(&mut self) -> bool {
        self.held.as_mut().is_none_or(|held| held.table.is_alive())
    }

    pub(super) fn release(&mut self) {
        self.held = None;
    }
}

/// What is in the table.
pub(super) fn chains(capture: NftCapture, wanted: &Wanted, facts: &Facts, record: Recorded) -> String {
    let mut text = set("raw4", "ipv4_addr", facts.raw_addresses.iter().filter(|address| address.is_ipv4()));
    text += &set("raw6", "ipv6_addr", facts.raw_addresses.iter().filter(|address| address.is_ipv6()));
    // Of every caller: what an enrolled one left must not be another one's.
    text += &owners::chains(record, "ip daddr . tcp dport @raw4", "ip6 daddr . tcp dport @raw6");
    text += "  chain take {\n";
    text += &take(capture, wanted);
    text += "  }\n  chain caller {\n";
    let Wanted { mark, mark_mask, daemon_uid, .. } = wanted;
    let _ = write!(
        text,
        "\x20   meta skuid {daemon_uid} meta mark & {mark_mask:#010x} == {mark:#010x} return\n\
         \x20   fib daddr type local return\n\
         \x20   ct status & confirmed == confirmed return\n"
    );
    for caller in &wanted.raw_callers {
        // A unit that does not run has no cgroup, and calls nobody.
        for present in facts.present(caller) {
            let _ = match present {
                Present::Uid(uid) => writeln!(text, "    meta skuid {uid} goto take"),
                Present::Cgroup(cgroup) => {
                    writeln!(text, "    socket cgroupv2 level {} \"{}\" goto take", cgroup.level, cgroup.nft_path)
                }
            };
        }
    }
    text += "  }\n";
    text + &hooks(capture, wanted)
}

fn set<'a>(name: &str, kind: &str, addresses: impl Iterator<Item = &'a SocketAddr>) -> String {
    let elements: Vec<String> = addresses.map(|address| format!("{} . {}", address.ip(), address.port())).collect();
    let elements = match elements.is_empty() {
        true => String::new(),
        false => format!(" elements = {{ {} }};", elements.join(", ")),
    };
    format!("  set {name} {{ type {kind} . inet_service;{elements} }}\n")
}

/// `meta mark` or `ct mark`, with our bits saying "captured".
fn marked(what: &str, wanted: &Wanted) -> String {
    format!("{what} mark set {what} mark & {:#010x} | {:#010x}", !wanted.mark_mask, wanted.raw_mark())
}

fn take(capture: NftCapture, wanted: &Wanted) -> String {
    match capture {
        NftCapture::Tproxy => format!("    {}\n    {}\n", marked("ct", wanted), marked("meta", wanted)),
        NftCapture::Redirect => format!("    meta l4proto tcp redirect to :{}\n", wanted.capture_port),
    }
}

fn hooks(capture: NftCapture, wanted: &Wanted) -> String {
    let judge = format!(
        "    {SYN} ip daddr . tcp dport @raw4 jump caller\n    {SYN} ip6 daddr . tcp dport @raw6 jump caller\n  }}\n"
    );
    match capture {
        // NAT decides per connection by itself; the SYN is asked for because conntrack also adopts connections it
        // meets in the middle.
        NftCapture::Redirect => format!(
            "  chain output {{\n    type nat hook output priority {}; policy accept;\n{judge}",
            redirect::PRIORITY
        ),
        NftCapture::Tproxy => {
            let (mask, raw, port) = (wanted.mark_mask, wanted.raw_mark(), wanted.capture_port);
            let remark = marked("meta", wanted);
            format!(
                "\x20 chain output {{\n\
                 \x20   type route hook output priority mangle; policy accept;\n\
                 \x20   ct direction original ct mark & {mask:#010x} == {raw:#010x} {remark} return\n\
                 {judge}\
                 \x20 chain prerouting {{\n\
                 \x20   type filter hook prerouting priority mangle; policy accept;\n\
                 \x20   iif lo meta mark & {mask:#010x} == {raw:#010x} meta l4proto tcp tproxy ip to 127.0.0.1:{port} accept\n\
                 \x20   iif lo meta mark & {mask:#010x} == {raw:#010x} meta l4proto tcp tproxy ip6 to [::1]:{port} accept\n\
                 \x20   iif lo meta mark & {mask:#010x} == {raw:#010x} meta l4proto tcp reject with tcp reset\n\
                 \x20 }}\n"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use std::collections::BTreeMap;

    use super::super::super::wanted::Caller;
    use super::super::super::wanted::tests::wanted;
    use super::*;
    use crate::enrol::Cgroup;

    fn facts() -> Facts {
        let path = "system.slice/web.service".to_owned();
        let cgroup = Cgroup { nft_path: format!("unified/{path}"), path, level: 2, id: 7 };
        Facts {
            cgroups: [("web.service".to_owned(), cgroup)].into(),
            port_owners: BTreeMap::new(),
            raw_addresses: Arc::new(
                ["10.96.3.7:80", "10.0.0.1:8080", "[fd00::3]:80"].map(|a| a.parse().unwrap()).into(),
            ),
        }
    }

    fn asked() -> Wanted {
        let callers = [Caller::Uid(1000), Caller::Unit("web.service".into()), Caller::Unit("off.service".into())];
        Wanted { raw_callers: callers.into(), ..wanted() }
    }

    #[test]
    fn only_first_syns_of_enrolled_callers_are_taken() {
        for capture in [NftCapture::Tproxy, NftCapture::Redirect] {
            let text = chains(capture, &asked(), &facts(), Recorded { v4: true, v6: true });
            for line in [
                "set raw4 { type ipv4_addr . inet_service; elements = { 10.0.0.1 . 8080, 10.96.3.7 . 80 }; }",
                "set raw6 { type ipv6_addr . inet_service; elements = { fd00::3 . 80 }; }",
                "tcp flags syn / fin,syn,rst,ack ip daddr . tcp dport @raw4 jump caller",
                "meta skuid 998 meta mark & 0x00ff0000 == 0x004d0000 return",
                "ct status & confirmed == confirmed return",
                "meta skuid 1000 goto take",
                "tcp flags syn / fin,syn,rst,ack ip daddr . tcp dport @raw4 jump record4",
                "socket cgroupv2 level 2 \"unified/system.slice/web.service\" goto take",
            ] {
                assert!(text.contains(line), "missing `{line}` in\n{text}");
            }
            assert!(!text.contains("off.service"), "{text}");
        }
    }

    #[test]
    fn with_tproxy_the_fate_of_a_connection_is_in_its_conntrack_mark() {
        let text = chains(NftCapture::Tproxy, &asked(), &facts(), Recorded::default());
        for line in [
            "ct direction original ct mark & 0x00ff0000 == 0x00b20000 meta mark set meta mark & 0xff00ffff | 0x00b20000 return",
            "ct mark set ct mark & 0xff00ffff | 0x00b20000",
        ] {
            assert!(text.contains(line), "missing `{line}` in\n{text}");
        }
    }
}
