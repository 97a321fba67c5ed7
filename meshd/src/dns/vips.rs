//! One virtual IP pair per service: stable, kept on disk, never on the wire between hosts.
//!
//! The IPv4 address starts at a hash of the service's name and probes onwards; the IPv6 address carries the same
//! offset, so that one table serves both families. A service that leaves keeps its addresses for as long as nobody
//! needs them, and for a day in any case: clients cache addresses, and a reused one would reach a stranger.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use std::{fs, io};

use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use meshd_discovery::{Directory, ServiceName};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use crate::durable;
use crate::unix_time::unix_now;

const SCHEMA: u32 = 1;
/// Addresses of a service that is gone are not given to another within this time.
const REST: Duration = Duration::from_secs(24 * 3600);
const SAVE_AGAIN: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Vip {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

#[derive(Debug, thiserror::Error)]
pub enum VipsError {
    #[error("capture.vip4 = {0}: use a range from /8 to /28; the default is 240.240.0.0/16")]
    Range4(Ipv4Net),
    #[error("capture.vip6 = {v6}: too small for as many addresses as vip4 = {v4}; use a /64 of your own ULA")]
    Range6 { v4: Ipv4Net, v6: Ipv6Net },
    #[error("cannot {doing} {path}: {source}; check that the directory exists and belongs to meshd's user")]
    File { doing: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{path}: {reason}; restore it, or move it away to have virtual IPs assigned anew (few change; restart clients that \
         keep addresses for long)"
    )]
    Corrupt { path: PathBuf, reason: String },
    #[error("{path}: schema {found} was written by a newer meshd; this one reads up to {SCHEMA}: upgrade meshd")]
    Newer { path: PathBuf, found: u32 },
}

/// The virtual IPs of this host. Asking never locks.
pub struct Vips {
    range: Range,
    path: PathBuf,
    table: ArcSwap<Table>,
    /// Held while a new table is made from the current one.
    assigning: Mutex<()>,
    /// What is on disk.
    saved: Mutex<Arc<Table>>,
    /// Something was assigned outside `keep`, which then saves it.
    unsaved: Notify,
}

impl Vips {
    pub fn open(path: &Path, v4: Ipv4Net, v6: Ipv6Net) -> Result<Vips, VipsError> {
        let range = Range::new(v4, v6)?;
        let table = Arc::new(load(path, &range)?);
        let (saved, table) = (Mutex::new(table.clone()), ArcSwap::new(table));
        Ok(Vips { range, path: path.into(), table, assigning: Mutex::new(()), saved, unsaved: Notify::new() })
    }

    /// The service behind a virtual IP. On the path of every captured connection.
    pub fn service_of(&self, address: IpAddr) -> Option<ServiceName> {
        self.table.load().by_offset.get(&self.range.offset_of(address)?).cloned()
    }

    pub fn get(&self, service: &ServiceName) -> Option<Vip> {
        self.table.load().by_name.get(service).map(|entry| self.range.vip(entry.offset))
    }

    /// The ranges that virtual IPs are taken from.
    pub fn networks(&self) -> [IpNet; 2] {
        [self.range.v4.into(), self.range.v6.into()]
    }

    /// The service's addresses, chosen now if it has none. None only when the range is used up.
    pub fn assign(&self, service: &ServiceName) -> Option<Vip> {
        if let Some(vip) = self.get(service) {
            return Some(vip);
        }
        self.update(|table, range| table.assign(service, range, unix_now()))?;
        self.unsaved.notify_one();
        self.get(service)
    }

    /// Gives every service of the directory its addresses, and notes which of the known ones are gone.
    pub fn sync(&self, directory: &Directory) {
        self.sync_at(directory, unix_now());
    }

    fn sync_at(&self, directory: &Directory, now: u64) {
        if !self.table.load().differs_from(directory) {
            return;
        }
        let homeless = self.update(|table, range| {
            table.note_presence(directory, now);
            let names = directory.services().map(|service| &service.name);
            Some(names.filter(|name| table.assign(name, range, now).is_none()).count())
        });
        if let Some(homeless @ 1..) = homeless {
            tracing::error!(
                homeless,
                "no virtual IPs left for some services, they cannot be reached by name; widen capture.vip4"
            );
        }
    }

    /// Replaces the table by what `change` makes of a copy, unless it declines.
    fn update<T>(&self, change: impl FnOnce(&mut Table, &Range) -> Option<T>) -> Option<T> {
        let _one_at_a_time = self.assigning.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = Table::clone(&self.table.load());
        let result = change(&mut table, &self.range)?;
        self.table.store(Arc::new(table));
        Some(result)
    }

    /// Writes the table if it is not on disk yet. Blocks.
    pub fn save(&self) -> Result<(), VipsError> {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let table = self.table.load_full();
        if !Arc::ptr_eq(&saved, &table) {
            write(&self.path, &table.to_document(&self.range))?;
            *saved = table;
        }
        Ok(())
    }

    /// Keeps the table in step with the directory, and the file with the table. Never returns.
    pub(super) async fn keep(self: Arc<Vips>, mut directory: watch::Receiver<Arc<Directory>>) {
        let mut publisher_lives = true;
        loop {
            let current = directory.borrow_and_update().clone();
            self.sync(&current);
            let vips = self.clone();
            let saved = tokio::task::spawn_blocking(move || vips.save()).await;
            let failed = match saved {
                Ok(Ok(())) => false,
                Ok(Err(error)) => {
                    tracing::error!(%error, "virtual IPs are not saved; they hold until meshd restarts");
                    true
                }
                Err(_) => return, // the runtime is shutting down
            };
            tokio::select! {
                changed = directory.changed(), if publisher_lives => publisher_lives = changed.is_ok(),
                () = self.unsaved.notified() => {}
                () = tokio::time::sleep(SAVE_AGAIN), if failed => {}
            }
        }
    }
}

/// The two ranges, and the offsets in them that make good addresses.
#[derive(Debug, Clone, Copy)]
struct Range {
    v4: Ipv4Net,
    v6: Ipv6Net,
}

impl Range {
    fn new(v4: Ipv4Net, v6: Ipv6Net) -> Result<Range, VipsError> {
        let (v4, v6) = (v4.trunc(), v6.trunc());
        if !(8..=28).contains(&v4.prefix_len()) {
            return Err(VipsError::Range4(v4));
        }
        if v6.prefix_len() > 96 + v4.prefix_len() {
            return Err(VipsError::Range6 { v4, v6 });
        }
        Ok(Range { v4, v6 })
    }

    fn size(&self) -> u32 {
        1 << (32 - self.v4.prefix_len())
    }

    fn vip(&self, offset: u32) -> Vip {
        let v4 = Ipv4Addr::from_bits(self.v4.network().to_bits() | offset);
        let v6 = Ipv6Addr::from_bits(self.v6.network().to_bits() | u128::from(offset));
        Vip { v4, v6 }
    }

    fn offset_of(&self, address: IpAddr) -> Option<u32> {
        match address.to_canonical() {
            IpAddr::V4(v4) => self.v4.contains(&v4).then(|| v4.to_bits() - self.v4.network().to_bits()),
            IpAddr::V6(v6) if self.v6.contains(&v6) => (v6.to_bits() - self.v6.network().to_bits()).try_into().ok(),
            IpAddr::V6(_) => None,
        }
    }

    /// Old software takes addresses ending in .0 and .255 for networks and broadcasts.
    fn usable(&self, offset: u32) -> bool {
        !matches!(offset & 0xff, 0 | 0xff) && offset != self.size() - 1
    }

    /// All good offsets, beginning with the one the name hashes to.
    fn candidates(&self, service: &ServiceName) -> impl Iterator<Item = u32> {
        let (range, size) = (*self, self.size());
        let hash = digest::digest(&digest::SHA256, service.as_str().as_bytes());
        let start = hash.as_ref().iter().take(4).fold(0u32, |sum, byte| (sum << 8) | u32::from(*byte)) % size;
        (0..size).map(move |step| (start + step) % size).filter(move |offset| range.usable(*offset))
    }
}

#[derive(Debug, Clone, Default)]
struct Table {
    by_name: HashMap<ServiceName, Entry>,
    by_offset: HashMap<u32, ServiceName>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    offset: u32,
    /// Unix seconds since when no source knows the service; None while one does.
    unused_since: Option<u64>,
}

impl Table {
    fn assign(&mut self, service: &ServiceName, range: &Range, now: u64) -> Option<u32> {
        if let Some(entry) = self.by_name.get(service) {
            return Some(entry.offset);
        }
        let free = range.candidates(service).find(|offset| !self.by_offset.contains_key(offset));
        let offset = free.or_else(|| self.evict(now))?;
        self.insert(service.clone(), Entry { offset, unused_since: None });
        Some(offset)
    }

    fn insert(&mut self, service: ServiceName, entry: Entry) {
        self.by_offset.insert(entry.offset, service.clone());
        self.by_name.insert(service, entry);
    }

    /// Takes the addresses of the service that has been gone longest, if that is long enough.
    fn evict(&mut self, now: u64) -> Option<u32> {
        let rested = |entry: &Entry| entry.unused_since.filter(|since| now.saturating_sub(*since) >= REST.as_secs());
        let candidates = self.by_name.iter().filter_map(|(name, entry)| Some((rested(entry)?, name)));
        let (_, name) = candidates.min()?;
        let name = name.clone();
        let entry = self.by_name.remove(&name)?;
        self.by_offset.remove(&entry.offset);
        Some(entry.offset)
    }

    fn differs_from(&self, directory: &Directory) -> bool {
        let used = self.by_name.values().filter(|entry| entry.unused_since.is_none()).count();
        let known = |name| self.by_name.get(name).is_some_and(|entry| entry.unused_since.is_none());
        used != directory.len() || directory.services().any(|service| !known(&service.name))
    }

    fn note_presence(&mut self, directory: &Directory, now: u64) {
        for (name, entry) in &mut self.by_name {
            let gone_since = entry.unused_since.or(Some(now));
            entry.unused_since = if directory.get(name).is_some() { None } else { gone_since };
        }
    }

    fn to_document(&self, range: &Range) -> Document {
        let saved = |entry: &Entry| Saved { v4: range.vip(entry.offset).v4, unused_since: entry.unused_since };
        let services = self.by_name.iter().map(|(name, entry)| (name.clone(), saved(entry))).collect();
        Document { schema: SCHEMA, services }
    }
}

/// vips.json
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    schema: u32,
    services: BTreeMap<ServiceName, Saved>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    v4: Ipv4Addr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unused_since: Option<u64>,
}

/// Read first, so that a file of the future is told from a broken one.
#[derive(Deserialize)]
struct SchemaOnly {
    schema: u32,
}

fn load(path: &Path, range: &Range) -> Result<Table, VipsError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Table::default()),
        Err(source) => return Err(VipsError::File { doing: "read", path: path.into(), source }),
    };
    let corrupt = |reason: String| VipsError::Corrupt { path: path.into(), reason };
    let SchemaOnly { schema } = serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))?;
    if schema > SCHEMA {
        return Err(VipsError::Newer { path: path.into(), found: schema });
    }
    let document: Document = serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))?;
    let mut table = Table::default();
    for (name, saved) in document.services {
        let Some(offset) = range.offset_of(saved.v4.into()).filter(|offset| range.usable(*offset)) else {
            tracing::info!(service = %name, address = %saved.v4, "outside capture.vip4 now, gets another virtual IP");
            continue;
        };
        if let Some(other) = table.by_offset.get(&offset) {
            return Err(corrupt(format!("{name} and {other} both have {}", saved.v4)));
        }
        table.insert(name, Entry { offset, unused_since: saved.unused_since });
    }
    Ok(table)
}

fn write(path: &Path, document: &Document) -> Result<(), VipsError> {
    let written = serde_json::to_vec_pretty(document).map_err(io::Error::from);
    let written = written.and_then(|text| durable::replace(path, text));
    written.map_err(|source| VipsError::File { doing: "write", path: path.into(), source })
}

#[cfg(test)]
#[path = "vips_tests.rs"]
mod tests;
