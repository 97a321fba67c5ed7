//! The audit log: one JSON line per act, each carrying the hash of the one before, so that a removed or changed line
//! shows. Several processes append (the server and the command line); a file lock orders them.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use data_encoding::HEXLOWER;
use meshd_identity::sha256;
use serde::{Deserialize, Serialize};

/// The previous hash of the first line.
const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// No line is longer: texts in events are capped.
const MAX_LINE: u64 = 64 * 1024;
/// Most are a tenth of this.
const USUAL_TAIL: u64 = 4 * 1024;

/// What happened. Absent fields are left out of the line.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Event {
    pub event: &'static str,
    pub result: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_after: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remote: Option<String>,
    /// The operator who asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

#[derive(Serialize)]
struct Line<'a> {
    sequence: u64,
    time: &'a str,
    previous: &'a str,
    #[serde(flatten)]
    event: &'a Event,
}

#[derive(Deserialize)]
struct Tail {
    sequence: u64,
    previous: String,
    hash: String,
}

/// How many refusals of strangers are written. Anybody who reaches the port can be refused as often as they like, and
/// must not fill the disk with it: after a burst, one line in six seconds.
#[derive(Debug)]
pub(crate) struct Allowance {
    left: i64,
    counted_at: i64,
}

const BURST: i64 = 50;
const SECONDS_PER_LINE: i64 = 6;

impl Allowance {
    pub(crate) fn new(now: i64) -> Allowance {
        Allowance { left: BURST, counted_at: now }
    }

    pub(crate) fn take(&mut self, now: i64) -> bool {
        let earned = (now - self.counted_at).max(0) / SECONDS_PER_LINE;
        self.left = (self.left + earned).min(BURST);
        self.counted_at += earned * SECONDS_PER_LINE;
        let may = self.left > 0;
        self.left -= i64::from(may);
        may
    }
}

pub struct Audit {
    path: PathBuf,
    /// Taken all at once by whoever gets to write: one sync for everybody who came while another waited for the disk.
    waiting: Mutex<Vec<Arc<Batch>>>,
    writing: Mutex<()>,
}

/// What one caller wants written, as a whole.
struct Batch {
    time: String,
    events: Vec<Event>,
    outcome: OnceLock<Result<(), (io::ErrorKind, String)>>,
}

impl Batch {
    fn outcome(&self) -> Option<io::Result<()>> {
        let outcome = self.outcome.get()?.clone();
        Some(outcome.map_err(|(kind, text)| io::Error::new(kind, text)))
    }
}

impl Audit {
    pub fn new(path: PathBuf) -> Audit {
        Audit { path, waiting: Mutex::default(), writing: Mutex::default() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns when all of them are on the disk.
    pub fn append(&self, now: i64, events: &[Event]) -> io::Result<()> {
        let time = crate::times::rfc3339(now);
        let batch = Arc::new(Batch { time, events: events.to_vec(), outcome: OnceLock::new() });
        lock(&self.waiting).push(batch.clone());
        let _writing = lock(&self.writing);
        // Whoever wrote meanwhile wrote these, too.
        if let Some(outcome) = batch.outcome() {
            return outcome;
        }
        let batches = std::mem::take(&mut *lock(&self.waiting));
        let written = self.write(&batches);
        for batch in &batches {
            let outcome = written.as_ref().copied().map_err(|error| (error.kind(), error.to_string()));
            batch.outcome.set(outcome).expect("each batch is taken once");
        }
        batch.outcome().unwrap_or_else(|| {
            Err(io::Error::other("the thread that wrote the audit log panicked; see the log of meshd-pki"))
        })
    }

    /// Appends all events with one sync.
    fn write(&self, batches: &[Arc<Batch>]) -> io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).mode(0o600).open(&self.path)?;
        file.lock()?;
        let (mut text, mut sequence, mut previous) = continue_from(&mut file)?;
        for (batch, event) in batches.iter().flat_map(|batch| batch.events.iter().map(move |event| (batch, event))) {
            sequence += 1;
            let line = Line { sequence, time: &batch.time, previous: &previous, event };
            let body = serde_json::to_string(&line).map_err(io::Error::other)?;
            let hash = HEXLOWER.encode(&sha256(body.as_bytes()));
            text.push_str(&with_hash(&body, &hash));
            text.push('\n');
            previous = hash;
        }
        file.write_all(text.as_bytes())?;
        file.sync_data()
    }

    /// Counts the lines, or names the first that breaks the chain.
    pub fn verify(&self) -> Result<u64, String> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(format!("{}: {error}", self.path.display())),
        };
        let (mut sequence, mut previous) = (0, GENESIS.to_owned());
        for (number, line) in BufReader::new(file).lines().enumerate() {
            let broken = |what: &str| format!("{}:{}: {what}", self.path.display(), number + 1);
            let line = line.map_err(|error| broken(&error.to_string()))?;
            // A line cut by a crash is followed by a whole one that continues the chain without it.
            let Some(tail) = read_line(&line) else {
                tracing::warn!(file = %self.path.display(), line = number + 1, "the audit log has a torn line");
                continue;
            };
            if tail.previous != previous || tail.sequence != sequence + 1 {
                return Err(broken("the chain is broken: a line before it was removed or changed"));
            }
            (sequence, previous) = (tail.sequence, tail.hash);
        }
        Ok(sequence)
    }
}

/// Nothing is half done behind either lock when a thread panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn with_hash(body: &str, hash: &str) -> String {
    format!("{},\"hash\":\"{hash}\"}}", &body[..body.len() - 1])
}

/// A whole line whose hash covers it.
fn read_line(line: &str) -> Option<Tail> {
    let tail: Tail = serde_json::from_str(line).ok()?;
    let suffix = format!(",\"hash\":\"{}\"}}", tail.hash);
    let body = format!("{}}}", line.strip_suffix(&suffix)?);
    (HEXLOWER.encode(&sha256(body.as_bytes())) == tail.hash).then_some(tail)
}

/// Where the chain goes on: text to write first (a newline after a torn line), last sequence, last hash.
fn continue_from(file: &mut File) -> io::Result<(String, u64, String)> {
    let length = file.seek(SeekFrom::End(0))?;
    let (mut first, mut last) = ("", None);
    // Behind a torn line, the last whole one may be further away.
    for tail in [USUAL_TAIL, 2 * MAX_LINE] {
        file.seek(SeekFrom::Start(length.saturating_sub(tail)))?;
        let mut end = Vec::new();
        (&mut *file).take(tail).read_to_end(&mut end)?;
        let end = String::from_utf8_lossy(&end);
        first = if end.is_empty() || end.ends_with('\n') { "" } else { "\n" };
        last = end.lines().rev().find_map(read_line);
        if last.is_some() || tail >= length {
            break;
        }
    }
    let (sequence, hash) = last.map_or((0, GENESIS.to_owned()), |tail| (tail.sequence, tail.hash));
    Ok((first.to_owned(), sequence, hash))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn event(host: &str) -> Event {
        Event { event: "issue", result: "ok", host: Some(host.to_owned()), ..Event::default() }
    }

    fn log() -> (tempfile::TempDir, Audit) {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::new(dir.path().join("audit.jsonl"));
        (dir, audit)
    }

    #[test]
    fn strangers_get_a_burst_of_lines_and_then_one_in_six_seconds() {
        let mut allowance = Allowance::new(1000);
        assert_eq!((0..200).filter(|_| allowance.take(1000)).count(), 50);
        assert_eq!((1001..1061).filter(|now| allowance.take(*now)).count(), 10);
        assert_eq!((0..200).filter(|_| allowance.take(10_000)).count(), 50, "what was saved is capped");
    }

    #[test]
    fn lines_chain_across_reopening() {
        let (_dir, audit) = log();
        assert_eq!(audit.verify(), Ok(0));
        audit.append(1_700_000_000, &[event("a"), event("b")]).unwrap();
        Audit::new(audit.path().to_owned()).append(1_700_000_001, &[event("c")]).unwrap();
        assert_eq!(audit.verify(), Ok(3));
        let text = fs::read_to_string(audit.path()).unwrap();
        assert!(text.starts_with("{\"sequence\":1,\"time\":\"2023-11-14T22:13:20Z\""), "{text}");
    }

    #[test]
    fn lines_of_many_writers_are_whole_and_chained() {
        let (_dir, audit) = log();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let audit = &audit;
                scope.spawn(move || {
                    for round in 0..10 {
                        let (first, second) = (format!("{thread}.{round}a"), format!("{thread}.{round}b"));
                        audit.append(0, &[event(&first), event(&second)]).unwrap();
                        let text = fs::read_to_string(audit.path()).unwrap();
                        assert!(text.contains(&format!("\"{second}\"")), "told that it is written, and it is not");
                    }
                });
            }
        });
        assert_eq!(audit.verify(), Ok(160));
    }

    #[test]
    fn lines_that_wait_together_share_what_becomes_of_them() {
        let (dir, audit) = log();
        std::thread::scope(|scope| {
            let writing = lock(&audit.writing);
            let appended: Vec<_> = (0..4).map(|_| scope.spawn(|| audit.append(0, &[event("a")]))).collect();
            while lock(&audit.waiting).len() < 4 {
                std::thread::yield_now();
            }
            fs::create_dir(dir.path().join("audit.jsonl")).unwrap();
            drop(writing);
            for appended in appended {
                assert_eq!(appended.join().unwrap().unwrap_err().kind(), io::ErrorKind::IsADirectory);
            }
        });
        fs::remove_dir(audit.path()).unwrap();
        audit.append(0, &[event("b")]).unwrap();
        assert_eq!(audit.verify(), Ok(1), "what failed was told to have failed, and is not written later");
    }

    #[test]
    fn a_removed_or_changed_line_is_found() {
        let (_dir, audit) = log();
        audit.append(0, &[event("a"), event("b"), event("c")]).unwrap();
        let text = fs::read_to_string(audit.path()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        fs::write(audit.path(), format!("{}\n{}\n", lines[0], lines[2])).unwrap();
        assert!(audit.verify().unwrap_err().contains(":2:"));
        fs::write(audit.path(), text.replace("\"host\":\"b\"", "\"host\":\"x\"")).unwrap();
        assert!(audit.verify().unwrap_err().contains(":3:"));
    }

    #[test]
    fn the_chain_goes_on_behind_lines_of_any_length() {
        let (_dir, audit) = log();
        let long = "x".repeat(60_000);
        for _ in 0..3 {
            audit.append(0, &[event("a"), event(&long)]).unwrap();
        }
        let text = fs::read_to_string(audit.path()).unwrap();
        fs::write(audit.path(), &text[..text.len() - 20]).unwrap();
        audit.append(0, &[event("c")]).unwrap();
        assert_eq!(audit.verify(), Ok(6));
    }

    #[test]
    fn a_torn_last_line_does_not_stop_the_log() {
        let (_dir, audit) = log();
        audit.append(0, &[event("a"), event("b")]).unwrap();
        let text = fs::read_to_string(audit.path()).unwrap();
        fs::write(audit.path(), &text[..text.len() - 20]).unwrap();
        audit.append(0, &[event("c")]).unwrap();
        assert_eq!(audit.verify(), Ok(2));
    }
}
