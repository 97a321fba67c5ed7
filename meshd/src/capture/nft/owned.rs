//! A table that exists as long as somebody holds it (`flags owner`): the kernel removes it when the netlink socket that
//! made it closes. That socket is a long-lived `nft -i` child's, whose input is a pipe from us: however we end, the pipe
//! closes, the child ends, and the table is gone.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use super::super::tool::{CaptureError, NFT};
use crate::tool;

pub(super) const NAME: &str = "meshd_raw";

/// `systemctl stop` signals every process of the unit; the table must stay while meshd drains.
const HOLD: &str = "trap '' TERM INT HUP; exec nft -i";
/// 20,000 addresses take 1.4 s.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

pub(super) struct OwnedTable {
    child: Child,
    stdin: ChildStdin,
    /// Of the contents in force: the name of an empty chain says which they are.
    generation: u64,
}

impl OwnedTable {
    pub(super) fn hold(chains: &str) -> Result<OwnedTable, CaptureError> {
        let missing = |source| CaptureError::Missing { tool: "nft -i".into(), package: NFT.package, source };
        let mut child = Command::new("/bin/sh")
            .args(["-c", HOLD])
            .env("PATH", tool::PATH)
            // Where it would write a history of its commands.
            .env("HOME", "/dev/null")
            // Ctrl-C in a terminal is for us; we decide when it ends.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(missing)?;
        let Some(stdin) = child.stdin.take() else { return Err(missing(std::io::ErrorKind::BrokenPipe.into())) };
        let mut table = OwnedTable { child, stdin, generation: fastrand::u64(..) };
        table.replace(chains)?;
        Ok(table)
    }

    /// In one transaction. After an error nothing is known of it: drop it.
    pub(super) fn replace(&mut self, chains: &str) -> Result<(), CaptureError> {
        self.generation = self.generation.wrapping_add(1);
        let command = one_line(&transaction(NAME, self.generation, chains));
        let written = writeln!(self.stdin, "{command}").and_then(|()| self.stdin.flush());
        if written.is_err() || !self.is_acknowledged() {
            return Err(self.failure());
        }
        Ok(())
    }

    pub(super) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    #[expect(clippy::disallowed_methods, reason = "the capture thread is blocking code")]
    fn is_acknowledged(&mut self) -> bool {
        let give_up = Instant::now() + ACKNOWLEDGED_WITHIN;
        let chain = generation_chain(self.generation);
        while self.is_alive() && Instant::now() < give_up {
            if NFT.run(&["list", "chain", "inet", NAME, &chain], "").is_ok() {
                return true;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        false
    }

    /// Ends the child, to hear what it complained about.
    fn failure(&mut self) -> CaptureError {
        self.end();
        let mut stderr = String::new();
        if let Some(mut complaint) = self.child.stderr.take() {
            // What cannot be read is not part of the message.
            let _ = complaint.read_to_string(&mut stderr);
        }
        let needs = "nf_tables and table owners (5.12), and an interactive nft";
        CaptureError::Failed { command: format!("nft -i (table inet {NAME})"), stderr: stderr.trim().into(), needs }
    }

    fn end(&mut self) {
        // Fails only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for OwnedTable {
    fn drop(&mut self) {
        self.end();
    }
}

/// Replaces the table, or makes it.
pub(super) fn transaction(name: &str, generation: u64, chains: &str) -> String {
    format!(
        "table inet {name} {{ flags owner; }}\ndelete table inet {name}\n\
         table inet {name} {{\n  flags owner;\n  chain {} {{ }}\n{chains}}}\n",
        generation_chain(generation)
    )
}

fn generation_chain(generation: u64) -> String {
    format!("generation_{generation:x}")
}

/// An interactive nft takes a command per line: ends of lines become semicolons.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len() + text.len() / 8);
    for part in text.lines().map(str::trim).filter(|part| !part.is_empty()) {
        line.push_str(part);
        line.push_str(if part.ends_with('{') || part.ends_with(';') { " " } else { "; " });
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_becomes_one_line() {
        let text = transaction("meshd_raw", 10, "  chain take {\n    ct mark set 1\n  }\n");
        let expected = "table inet meshd_raw { flags owner; }; delete table inet meshd_raw; table inet meshd_raw { \
                        flags owner; chain generation_a { }; chain take { ct mark set 1; }; }; ";
        assert_eq!(one_line(&text), expected);
    }
}
