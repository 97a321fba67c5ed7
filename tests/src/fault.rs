//! Faults on a host's network; each is healed when dropped.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;

use crate::host::Host;

/// A fault in force.
#[must_use = "dropping it heals the fault"]
pub struct Fault {
    host: Host,
    heal: Vec<String>,
}

impl Drop for Fault {
    fn drop(&mut self) {
        let words: Vec<&str> = self.heal.iter().map(String::as_str).collect();
        if let Some((program, args)) = words.split_first() {
            // On failure the namespace is gone, and the fault with it.
            let _ = self.host.command(program, args);
        }
    }
}

impl Host {
    /// Packets from and to `peer` vanish without a word.
    pub fn black_hole(&self, peer: impl Into<IpAddr>) -> Result<Fault> {
        let (family, peer) = family_of(peer.into());
        self.rules(&format!("{family} saddr {peer} drop"), &format!("{family} daddr {peer} drop"))
    }

    /// New and established connections to `port` here are reset.
    pub fn reset_port(&self, port: u16) -> Result<Fault> {
        self.rules(&format!("tcp dport {port} reject with tcp reset"), "")
    }

    /// The cable is pulled.
    pub fn link_down(&self) -> Result<Fault> {
        self.command("ip", &["link", "set", "eth0", "down"])?;
        // Taking the link down drops the default route too.
        let heal = "ip link set eth0 up && ip route replace default via 10.87.0.1";
        Ok(Fault { host: self.clone(), heal: ["sh", "-c", heal].map(str::to_owned).to_vec() })
    }

    fn rules(&self, incoming: &str, outgoing: &str) -> Result<Fault> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let table = format!("labfault{}", COUNT.fetch_add(1, Ordering::Relaxed));
        self.nft(&format!(
            "table inet {table} {{\n chain in {{ type filter hook input priority -300; {incoming} ; }}\n \
             chain out {{ type filter hook output priority -300; {outgoing} ; }}\n}}\n"
        ))?;
        Ok(Fault { host: self.clone(), heal: ["nft", "delete", "table", "inet", &table].map(str::to_owned).to_vec() })
    }
}

fn family_of(address: IpAddr) -> (&'static str, IpAddr) {
    (if address.is_ipv4() { "ip" } else { "ip6" }, address)
}
