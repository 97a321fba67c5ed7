//! `status` for people.

use std::fmt::Write;

use super::Status;

/// Certificates of hosts and workloads shown, the earliest end first; `-o json` has all.
const SHOWN: usize = 20;
const LEAVES: [&str; 2] = ["host", "workload"];

impl Status {
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "trust domain   {}", self.trust_domain)?;
        writeln!(text, "bundle         sequence {}, sha256 {}", self.bundle_sequence, self.bundle_sha256)?;
        let ended = self.certificates.iter().filter(|one| one.state == "ended").count();
        writeln!(text, "certificates   {} valid, {ended} ended", self.valid_certificates)?;
        for one in &self.replicas {
            let state = match (one.leads, one.runs) {
                (true, _) => "leads",
                (false, true) => "runs",
                (false, false) => "away",
            };
            writeln!(text, "replica        {} {state}, {}", one.id, one.addresses.join(", "))?;
        }
        writeln!(text, "\n{:<14} {:<10} {:<34} NOT AFTER", "AUTHORITY", "STATE", "ID")?;
        for one in &self.authorities {
            writeln!(text, "{:<14} {:<10} {:<34} {}", one.kind, one.state, one.id, one.not_after)?;
        }
        self.write_certificates(text)?;
        writeln!(text, "\n{:<20} {:<8} {:<22} {:>9}  IDENTITIES", "HOST", "STATE", "LAST SEEN", "CLOCK")?;
        for one in &self.hosts {
            let clock = format!("{:+.1} s", one.clock_offset_ms as f64 / 1000.0);
            let identities = one.identities.join(", ");
            writeln!(text, "{:<20} {:<8} {:<22} {:>9}  {}", one.id, one.state, one.last_seen, clock, identities)?;
        }
        if !self.open_tokens.is_empty() {
            writeln!(text, "\n{:<18} {:<20} {:<22} IDENTITIES", "OPEN TOKEN", "HOST", "EXPIRES")?;
        }
        for one in &self.open_tokens {
            let identities = one.identities.join(", ");
            writeln!(text, "{:<18} {:<20} {:<22} {}", one.id, one.host, one.expires_at, identities)?;
        }
        writeln!(text)?;
        if let Some(lines) = self.audit_lines {
            writeln!(text, "√ audit log: {lines} lines, chain whole")?;
        }
        self.write_health(text)?;
        for problem in self.problems.iter().chain(&self.advice) {
            writeln!(text, "‼ {problem}")?;
        }
        Ok(())
    }

    fn write_certificates(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n{:<14} {:<10} {:<48} NOT AFTER", "CERTIFICATE", "STATE", "OF")?;
        let authorities = ["root", "intermediate"];
        let own = self.certificates.iter().filter(|one| !LEAVES.contains(&one.kind.as_str()));
        for one in own.filter(|one| !authorities.contains(&one.kind.as_str())) {
            let of = one.host.as_deref().unwrap_or(&one.id);
            writeln!(text, "{:<14} {:<10} {:<48} {}", one.kind, one.state, of, one.not_after)?;
        }
        let leaves = || self.certificates.iter().filter(|one| LEAVES.contains(&one.kind.as_str()));
        for one in leaves().take(SHOWN) {
            let identity = one.identity.as_deref().map_or("", crate::issue::shorten);
            let of = format!("{} {identity}", one.host.as_deref().unwrap_or_default());
            writeln!(text, "{:<14} {:<10} {of:<48} {}", one.kind, one.state, one.not_after)?;
        }
        match leaves().count().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => writeln!(text, "and {more} more with a later end; -o json shows all"),
        }
    }

    fn write_health(&self, text: &mut String) -> std::fmt::Result {
        if let Some(next) = &self.rotation.next_root {
            writeln!(text, "next root      {next}")?;
        }
        for one in &self.rotation.waiting {
            writeln!(
                text,
                "  {:<12} {}",
                one.root.as_deref().map_or("next root", |id| &id[..id.len().min(12)]),
                one.text
            )?;
        }
        for server in &self.servers {
            let state = if server.is_running { "running" } else { "silent" };
            writeln!(text, "server         {} {state}, seen {}", server.replica, server.seen)?;
            if server.is_clock_unconfirmed {
                let waits = "rotation waits until hosts agree with it, or for the life of a leaf";
                writeln!(text, "clock          of {} not confirmed since its start: {waits}", server.replica)?;
            }
            let renewals: Vec<String> = server.renewals.iter().map(|(what, count)| format!("{what} {count}")).collect();
            writeln!(text, "renewals       {} since it started", renewals.join(", "))?;
        }
        if let Some(clocks) = &self.clocks {
            let seconds = |milliseconds: i64| milliseconds as f64 / 1000.0;
            let (low, middle, high) =
                (seconds(clocks.lowest_ms), seconds(clocks.median_ms), seconds(clocks.highest_ms));
            writeln!(text, "host clocks    {low:+.1} s to {high:+.1} s, median {middle:+.1} s")?;
        }
        Ok(())
    }
}
