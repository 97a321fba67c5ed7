//! From a socket's cgroup id to the systemd unit it runs in, by systemd's own rule.
//!
//! A cgroup-v2 id is the inode of the cgroup's directory, so a walk of the hierarchy translates every
//! id at once. Ids are never reused, so what one walk found stays true.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::ScopePattern;
use super::walk_budget::WalkBudget;

/// Where nft looks for the paths of cgroups.
const CGROUPS: &str = "/sys/fs/cgroup";
/// Ids of cgroups that were gone when asked about; forgotten beyond this many, at the price of a walk each.
const GONE_MAX: usize = 4096;
/// Hierarchies are shallow: units sit at depth 2-4, delegated subtrees a few below.
const MAX_DEPTH: usize = 24;

/// What is known of a cgroup id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnitLookup {
    Unit(Arc<str>),
    /// Below no unit, or the cgroup is gone.
    Unknown,
    /// Too many unknown cgroups lately: this one was not looked for, so it may be any unit's.
    NotLookedFor,
}

/// The cgroup of a unit. A restarted unit has another one under the same path, hence the id.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cgroup {
    /// Below /sys/fs/cgroup, where nft looks; `unified/...` on hosts with both hierarchies.
    pub nft_path: String,
    /// Below the mount of the cgroup2 hierarchy, as iptables wants it.
    pub path: String,
    /// How many levels below the root it is.
    pub level: usize,
    pub id: u64,
}

impl Cgroup {
    /// Where its files are.
    pub fn directory(&self) -> PathBuf {
        Path::new(CGROUPS).join(&self.nft_path)
    }

    /// Whether it is still there; its unit may have stopped since it was found.
    pub fn exists(&self) -> bool {
        self.directory().metadata().is_ok_and(|metadata| metadata.ino() == self.id)
    }
}

/// The translation table; one per worker, so that lookups need no lock.
pub struct CgroupUnits {
    root: Option<PathBuf>,
    /// None: a cgroup of the hierarchy that is below no unit.
    units: HashMap<u64, Option<Arc<str>>>,
    gone: HashSet<u64>,
    budget: WalkBudget,
}

impl CgroupUnits {
    /// Uses the cgroup-v2 hierarchy of this host, also where it is mounted beside v1.
    pub fn discover() -> CgroupUnits {
        CgroupUnits::at(cgroup2().map(Path::to_owned))
    }

    pub fn at(root: Option<PathBuf>) -> CgroupUnits {
        CgroupUnits { root, units: HashMap::new(), gone: HashSet::new(), budget: WalkBudget::default() }
    }

    /// Walks the hierarchy (about a millisecond) only for an id never seen before: a unit that just started. One walk
    /// finds all that run, so with many unknown ids a few walks a second miss only what starts between two of them.
    pub fn unit_of(&mut self, cgroup: u64) -> UnitLookup {
        if !self.units.contains_key(&cgroup) && !self.gone.contains(&cgroup) {
            let began = Instant::now();
            if !self.budget.allows(began) {
                return UnitLookup::NotLookedFor;
            }
            self.walk();
            self.budget.spend(began, began.elapsed());
            if !self.units.contains_key(&cgroup) {
                self.remember_gone(cgroup);
            }
        }
        self.units.get(&cgroup).cloned().flatten().map_or(UnitLookup::Unknown, UnitLookup::Unit)
    }

    fn remember_gone(&mut self, cgroup: u64) {
        if self.gone.len() >= GONE_MAX {
            self.gone.clear();
        }
        self.gone.insert(cgroup);
    }

    /// Rebuilt whole, so that cgroups of ended units do not pile up.
    fn walk(&mut self) {
        self.units.clear();
        if let Some(root) = self.root.clone() {
            self.descend(&root, None, MAX_DEPTH);
        }
    }

    fn descend(&mut self, directory: &Path, unit: Option<&Arc<str>>, depth: usize) {
        let Ok(entries) = std::fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            if depth == 0 || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let below = match unit {
                // All below the unit is named by the unit itself, so it belongs to it whatever it is called.
                Some(unit) => Some(unit.clone()),
                None if name.ends_with(".slice") => None,
                None => Some(Arc::from(name.as_ref())),
            };
            self.units.insert(entry.ino(), below.clone());
            self.descend(&entry.path(), below.as_ref(), depth - 1);
        }
    }
}

/// The cgroups of those of `units` that run, by name; a pattern stands for every scope it matches.
pub fn find_cgroups(units: &BTreeSet<&str>) -> BTreeMap<String, Cgroup> {
    let mut found = BTreeMap::new();
    if units.is_empty() {
        return found;
    }
    if let Some(root) = cgroup2() {
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let search = Search { root, names: Names::of(units), own: own_cgroup(&own) };
        search.descend(root, MAX_DEPTH, &mut found);
    }
    found
}

/// Where the hierarchy is mounted. Looked for until found: the list of mounts is long where containers run.
fn cgroup2() -> Option<&'static Path> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    if FOUND.get().is_none() {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        // Whoever else found it meanwhile found the same.
        let _ = FOUND.set(cgroup2_mount(&mounts)?);
    }
    FOUND.get().map(PathBuf::as_path)
}

/// Names to look for, patterns apart.
struct Names<'a> {
    exact: &'a BTreeSet<&'a str>,
    patterns: Vec<ScopePattern>,
}

impl<'a> Names<'a> {
    fn of(units: &'a BTreeSet<&'a str>) -> Names<'a> {
        Names { exact: units, patterns: units.iter().filter_map(|unit| ScopePattern::parse(unit).ok()).collect() }
    }

    fn contain(&self, name: &str) -> bool {
        self.exact.contains(name) || self.patterns.iter().any(|pattern| pattern.matches(name))
    }
}

struct Search<'a> {
    root: &'a Path,
    names: Names<'a>,
    /// The path of our own cgroup.
    own: &'a str,
}

impl Search<'_> {
    /// Units are the first components below slices, so only slices are descended into.
    fn descend(&self, directory: &Path, depth: usize, found: &mut BTreeMap<String, Cgroup>) {
        let Ok(entries) = std::fs::read_dir(directory) else { return };
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".slice") && depth > 0 {
                self.descend(&entry.path(), depth - 1, found);
            } else if self.names.contain(&name)
                && let Some(cgroup) = cgroup_at(self.root, &entry.path())
                && found.get(&name).is_none_or(|other| self.is_nearer(&cgroup, other))
            {
                found.insert(name, cgroup);
            }
        }
    }

    /// Of two with one name, the one below the same slices as we are: the other may be of a system within the system.
    fn is_nearer(&self, one: &Cgroup, other: &Cgroup) -> bool {
        let shared =
            |path: &str| path.split('/').zip(self.own.split('/')).take_while(|(theirs, own)| theirs == own).count();
        shared(&one.path) > shared(&other.path)
    }
}

/// The cgroup-v2 line of /proc/self/cgroup.
fn own_cgroup(text: &str) -> &str {
    text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default()
}

fn cgroup_at(root: &Path, directory: &Path) -> Option<Cgroup> {
    let id = std::fs::metadata(directory).ok()?.ino();
    let below = |base: &Path| Some(directory.strip_prefix(base).ok()?.to_str()?.to_owned());
    let path = below(root)?;
    let level = path.split('/').count();
    Some(Cgroup { nft_path: below(Path::new(CGROUPS)).unwrap_or_else(|| path.clone()), path, level, id })
}

/// The unit this process runs in.
pub fn own_unit() -> Option<Arc<str>> {
    unit_in(&std::fs::read_to_string("/proc/self/cgroup").ok()?)
}

/// The unit of another process, and whether it has a cgroup of the hierarchy at all. Its number must mean the same
/// process before and after.
pub fn unit_of_process(pid: i32) -> std::io::Result<(Option<Arc<str>>, bool)> {
    let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    Ok((unit_in(&cgroups), cgroups.lines().any(|line| line.starts_with("0::"))))
}

/// `0::<path>` is the line of the cgroup2 hierarchy. Whoever is outside of our cgroup namespace is in no unit we know:
/// the path begins with `..` then.
fn unit_in(cgroups: &str) -> Option<Arc<str>> {
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let unit = path.split('/').find(|part| !part.is_empty() && !part.ends_with(".slice"))?;
    (unit != "..").then(|| Arc::from(unit))
}

/// By a `/proc/PID/mountinfo`.
pub(crate) fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inode(root: &Path, path: &str) -> u64 {
        let path = root.join(path);
        std::fs::create_dir_all(&path).unwrap();
        std::fs::metadata(path).unwrap().ino()
    }

    #[test]
    fn the_first_component_below_the_slices_is_the_unit() {
        let root = tempfile::tempdir().unwrap();
        let web = inode(root.path(), "system.slice/web.service");
        let nested = inode(root.path(), "system.slice/web.service/evil.slice/sshd.service");
        let templated = inode(root.path(), "system.slice/system-pg.slice/pg@15.service");
        let user = inode(root.path(), "user.slice/user-1000.slice/user@1000.service/app.slice/shell.scope");
        let slice = inode(root.path(), "system.slice");
        let mut units = CgroupUnits::at(Some(root.path().into()));
        let unit = |name: &str| UnitLookup::Unit(name.into());
        assert_eq!(units.unit_of(web), unit("web.service"));
        assert_eq!(units.unit_of(nested), unit("web.service"));
        assert_eq!(units.unit_of(templated), unit("pg@15.service"));
        assert_eq!(units.unit_of(user), unit("user@1000.service"));
        assert_eq!(units.unit_of(slice), UnitLookup::Unknown);
    }

    #[test]
    fn a_unit_started_later_is_found_at_its_first_connection() {
        let root = tempfile::tempdir().unwrap();
        let mut units = CgroupUnits::at(Some(root.path().into()));
        assert_eq!(units.unit_of(42), UnitLookup::Unknown);
        let late = inode(root.path(), "system.slice/late.service");
        assert_eq!(units.unit_of(late), UnitLookup::Unit("late.service".into()));
    }

    #[test]
    fn unknown_ids_without_end_are_not_walked_for_without_end_and_known_units_stay_known() {
        let root = tempfile::tempdir().unwrap();
        let web = inode(root.path(), "system.slice/web.service");
        let mut units = CgroupUnits::at(Some(root.path().into()));
        let known = UnitLookup::Unit("web.service".into());
        assert_eq!(units.unit_of(web), known);
        let now = Instant::now();
        units.budget.spend(now, std::time::Duration::from_secs(60));
        assert_eq!((units.unit_of(1 << 40), units.unit_of(web)), (UnitLookup::NotLookedFor, known));
        // Not remembered as gone: it is looked for when there is time again.
        assert!(units.gone.is_empty());
    }

    #[test]
    fn the_cgroup_of_a_unit_is_found_below_slices_only() {
        let root = tempfile::tempdir().unwrap();
        let id = inode(root.path(), "system.slice/web.service");
        inode(root.path(), "system.slice/other.service/evil.slice/web.service");
        let mut found = BTreeMap::new();
        let units = BTreeSet::from(["web.service"]);
        Search { root: root.path(), names: Names::of(&units), own: "" }.descend(root.path(), MAX_DEPTH, &mut found);
        let path = "system.slice/web.service".to_owned();
        let expected = Cgroup { nft_path: path.clone(), path, level: 2, id };
        assert_eq!(found, BTreeMap::from([("web.service".to_owned(), expected)]));
    }

    #[test]
    fn of_two_cgroups_with_one_name_the_nearer_is_the_units() {
        let root = tempfile::tempdir().unwrap();
        let ids = ["a", "b", "c"].map(|host| inode(root.path(), &format!("lab.slice/{host}.slice/web.service")));
        let units = BTreeSet::from(["web.service"]);
        for (host, id) in ["a", "b", "c"].into_iter().zip(ids) {
            let mut found = BTreeMap::new();
            let own = format!("0::/lab.slice/{host}.slice/meshd.service\n");
            Search { root: root.path(), names: Names::of(&units), own: own_cgroup(&own) }.descend(
                root.path(),
                MAX_DEPTH,
                &mut found,
            );
            assert_eq!(found["web.service"].id, id);
        }
    }

    #[test]
    fn ones_own_unit_is_found_by_the_same_rule() {
        let cgroups = "5:cpu:/\n0::/system.slice/meshd.service/worker\n";
        assert_eq!(unit_in(cgroups), Some("meshd.service".into()));
        assert_eq!(unit_in("0::/\n"), None);
        assert_eq!(unit_in("0::/../other.slice/meshd.service\n"), None);
        assert_eq!(unit_in("5:cpu:/system.slice/meshd.service\n"), None);
    }

    #[test]
    fn a_pattern_finds_every_scope_that_runs() {
        let root = tempfile::tempdir().unwrap();
        for path in ["docker-3fa9.scope", "docker-3fb0.scope", "docker-4.scope", "docker-3f.service"] {
            inode(root.path(), &format!("system.slice/{path}"));
        }
        let mut found = BTreeMap::new();
        let units = BTreeSet::from(["docker-3f*.scope"]);
        Search { root: root.path(), names: Names::of(&units), own: "" }.descend(root.path(), MAX_DEPTH, &mut found);
        let names: Vec<&str> = found.keys().map(String::as_str).collect();
        assert_eq!(names, ["docker-3fa9.scope", "docker-3fb0.scope"]);
    }

    #[test]
    fn the_mount_is_found_in_hybrid_hierarchies() {
        let mountinfo = "31 25 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                         42 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mount(mountinfo), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(cgroup2_mount("31 25 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n"), None);
    }
}
