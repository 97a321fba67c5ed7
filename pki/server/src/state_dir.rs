//! The state directory: `pki.db`, `kek`, `audit.jsonl`, and at first `recovery.key`.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use meshd_identity::signed::SignedError;
use meshd_identity::{Bundle, BundleError, TrustDomain, sha256};
use rcgen::{KeyPair, PublicKeyData};

use crate::audit::{Audit, Event};
use crate::authority::AuthorityError;
use crate::keeping::backups::BackupError;
use crate::keeping::mirror::MirrorFile;
use crate::keys::{CREDENTIAL, Kek, KeyError, write_private};
use crate::lifetimes::Lifetimes;
use crate::rotation::step::{Rotator, bundle_of};
use crate::store::etcd::config::EtcdConfig;
use crate::store::{Database, DbError, Records, settings, trust};
use crate::times::unix;

/// The only replica of a PKI with a database of its own.
pub(crate) const LOCAL_REPLICA: &str = "local";

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{} already holds a PKI; use it with `meshd-pki run`, or choose an empty directory", dir.display())]
    Initialised { dir: PathBuf },
    #[error("{} holds what a PKI has left (authorities.json): `meshd-pki restore` brings it back; for a new one choose an empty directory", dir.display())]
    Remains { dir: PathBuf },
    #[error("{} is open to other users (mode {mode:o}); run `chmod 700` on it or choose another directory", dir.display())]
    Open { dir: PathBuf, mode: u32 },
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("another meshd-pki runs on {}; stop it first", dir.display())]
    Running { dir: PathBuf },
    #[error("a command is under way on {}; try again when it is over", dir.display())]
    InUse { dir: PathBuf },
    #[error("{} lacks {what}; restore the newest backup", dir.display())]
    Incomplete { dir: PathBuf, what: &'static str },
    #[error("cannot write the audit log {}: {source}", path.display())]
    Audit { path: PathBuf, source: io::Error },
    #[error("it was done, but cannot be written to the audit log {}: {source}; see to its disk", path.display())]
    Untold { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Db(#[from] DbError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Backup(#[from] BackupError),
    #[error("cannot sign what hosts are told: {0}")]
    Sign(#[from] SignedError),
    #[error("cannot make the recovery key: {0}")]
    Recovery(#[from] rcgen::Error),
}

/// An initialised PKI on disk.
pub struct StateDir {
    dir: PathBuf,
    pub trust_domain: TrustDomain,
    /// Which of the PKI's servers this is.
    pub(crate) replica: String,
    pub(crate) database: Database,
    pub audit: Audit,
    /// Its records are not moved elsewhere meanwhile.
    _in_use: DirLock,
}

/// What `init` made.
#[derive(Debug)]
pub struct Initialised {
    pub trust_domain: TrustDomain,
    pub bundle_digest: [u8; 32],
    pub recovery_key: PathBuf,
    pub recovery_key_id: [u8; 32],
}

/// Makes a new PKI: root, bundle, wrapping key, and the recovery key whose private half never enters the database.
pub fn init(
    dir: &Path,
    domain: &TrustDomain,
    recovery_key: Option<&Path>,
    now: SystemTime,
) -> Result<Initialised, StateError> {
    prepare_dir(dir)?;
    let database = dir.join("pki.db");
    if EtcdConfig::read(dir)?.is_some() || Database::is_initialised(&database)? {
        return Err(StateError::Initialised { dir: dir.to_owned() });
    }
    if MirrorFile::new(dir).path().exists() {
        return Err(StateError::Remains { dir: dir.to_owned() });
    }
    let recovery_path = recovery_key.map_or_else(|| dir.join("recovery.key"), Path::to_owned);
    let recovery = KeyPair::generate()?;
    write_private(&recovery_path, recovery.serialize_pem().as_bytes())?;
    let recovery_public = recovery.subject_public_key_info();
    let made = fill(dir, &database, domain, &recovery_public, now);
    if made.is_err() {
        // Not the operator's to keep: no PKI knows it. The next try makes another.
        _ = fs::remove_file(&recovery_path);
    }
    let bundle_digest = made?;
    Ok(Initialised {
        trust_domain: domain.clone(),
        bundle_digest,
        recovery_key: recovery_path,
        recovery_key_id: sha256(&recovery_public),
    })
}

fn fill(
    dir: &Path,
    path: &Path,
    domain: &TrustDomain,
    recovery: &[u8],
    now: SystemTime,
) -> Result<[u8; 32], StateError> {
    let kek = load_or_create_kek(dir)?;
    let lifetimes = Lifetimes::default();
    let rotator = Rotator { domain, kek: &kek, lifetimes: &lifetimes, clock_is_good: true, deny_floor: 0, now };
    let mut digest = [0; 32];
    Database::create(path, domain, |records| -> Result<(), StateError> {
        let (root, bundle) = rotator.found(records)?;
        digest = bundle.digest();
        settings::set_recovery_keys(records, &[recovery.to_vec()])?;
        settings::set_last_good(records, unix(now))?;
        let audit = Audit::new(dir.join("audit.jsonl"));
        append(&audit, now, &[Event { event: "init", result: "ok", authority: Some(root.id), ..Event::default() }])
    })?;
    Ok(digest)
}

impl StateDir {
    pub fn open(dir: &Path) -> Result<StateDir, StateError> {
        let in_use = in_use(dir)?;
        StateDir::of(dir, Database::open(dir)?, in_use)
    }

    /// As a server does: it starts without etcd, too.
    pub(crate) fn open_to_serve(dir: &Path) -> Result<StateDir, StateError> {
        let in_use = in_use(dir)?;
        StateDir::of(dir, Database::open_to_serve(dir)?, in_use)
    }

    fn of(dir: &Path, database: Database, in_use: DirLock) -> Result<StateDir, StateError> {
        let incomplete = |what| StateError::Incomplete { dir: dir.to_owned(), what };
        let trust_domain = database.read(settings::trust_domain)?.ok_or_else(|| incomplete("its trust domain"))?;
        let audit = Audit::new(dir.join("audit.jsonl"));
        let replica = EtcdConfig::read(dir)?.map_or_else(|| LOCAL_REPLICA.to_owned(), |config| config.replica);
        Ok(StateDir { dir: dir.to_owned(), trust_domain, replica, database, audit, _in_use: in_use })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn kek(&self) -> Result<Kek, StateError> {
        Ok(Kek::load(&kek_path(&self.dir))?)
    }

    pub(crate) fn check(&self) -> Result<(), StateError> {
        Ok(self.database.check()?)
    }

    /// The bundle in force.
    pub(crate) fn latest_bundle(&self) -> Result<Bundle, StateError> {
        let trust = self.database.read(trust::trust)?;
        Ok(bundle_of(&trust, &self.trust_domain)?)
    }

    pub(crate) fn incomplete(&self, what: &'static str) -> StateError {
        StateError::Incomplete { dir: self.dir.clone(), what }
    }

    pub(crate) fn record(&self, now: SystemTime, events: &[Event]) -> Result<(), StateError> {
        append(&self.audit, now, events)
    }

    /// Changes records, then puts into the audit log what the run of `act` told that counted: it may run more than once.
    pub(crate) fn change<T, E: From<StateError> + From<DbError>>(
        &self,
        now: SystemTime,
        mut act: impl FnMut(&mut dyn Records, &mut Vec<Event>) -> Result<T, E>,
    ) -> Result<T, E> {
        let (done, told) = self.database.transaction(|records| telling(&mut act, records))?;
        self.tell(now, &told)?;
        Ok(done)
    }

    /// As `change`, for what only the leader may do; `None` when that is another server.
    pub(crate) fn lead<T, E: From<StateError> + From<DbError>>(
        &self,
        now: SystemTime,
        mut act: impl FnMut(&mut dyn Records, &mut Vec<Event>) -> Result<T, E>,
    ) -> Result<Option<T>, E> {
        let Some((done, told)) = self.database.lead(|records| telling(&mut act, records))? else { return Ok(None) };
        self.tell(now, &told)?;
        Ok(Some(done))
    }

    fn tell(&self, now: SystemTime, told: &[Event]) -> Result<(), StateError> {
        let untold = |source| StateError::Untold { path: self.audit.path().to_owned(), source };
        self.audit.append(unix(now), told).map_err(untold)
    }
}

fn telling<T, E>(
    act: &mut impl FnMut(&mut dyn Records, &mut Vec<Event>) -> Result<T, E>,
    records: &mut dyn Records,
) -> Result<(T, Vec<Event>), E> {
    let mut told = Vec::new();
    let done = act(records, &mut told)?;
    Ok((done, told))
}

/// Held while a server runs, for a second one would rotate the same authorities; while a command or a server uses the
/// directory; or while its records move elsewhere.
pub(crate) struct DirLock(File);

impl Drop for DirLock {
    /// Closing is not enough: until a program forked meanwhile is executed, it has the file open, too.
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

pub(crate) fn lock(dir: &Path) -> Result<DirLock, StateError> {
    if !dir.is_dir() {
        return Err(DbError::Missing { dir: dir.to_owned() }.into());
    }
    let path = dir.join("run.lock");
    let io = |source| StateError::Io { action: "lock", path: path.clone(), source };
    let file = File::create(&path).map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(DirLock(file)),
        Err(TryLockError::WouldBlock) => Err(StateError::Running { dir: dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(io(source)),
    }
}

/// Waits for a move to be over: what is done here would be lost in it.
fn in_use(dir: &Path) -> Result<DirLock, StateError> {
    let file = open_dir(dir)?;
    file.lock_shared().map_err(|source| StateError::Io { action: "lock", path: dir.to_owned(), source })?;
    Ok(DirLock(file))
}

/// For whoever moves what is in it elsewhere: no command changes it meanwhile.
pub(crate) fn alone(dir: &Path) -> Result<DirLock, StateError> {
    let file = open_dir(dir)?;
    match file.try_lock() {
        Ok(()) => Ok(DirLock(file)),
        Err(TryLockError::WouldBlock) => Err(StateError::InUse { dir: dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(StateError::Io { action: "lock", path: dir.to_owned(), source }),
    }
}

fn open_dir(dir: &Path) -> Result<File, StateError> {
    File::open(dir).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => DbError::Missing { dir: dir.to_owned() }.into(),
        _ => StateError::Io { action: "open", path: dir.to_owned(), source },
    })
}

fn append(audit: &Audit, now: SystemTime, events: &[Event]) -> Result<(), StateError> {
    let written = audit.append(unix(now), events);
    written.map_err(|source| StateError::Audit { path: audit.path().to_owned(), source })
}

/// The systemd credential when there is one, else the file beside the database.
pub(crate) fn kek_path(dir: &Path) -> PathBuf {
    let credential = std::env::var_os("CREDENTIALS_DIRECTORY").map(|found| Path::new(&found).join(CREDENTIAL));
    credential.filter(|path| path.exists()).unwrap_or_else(|| dir.join("kek"))
}

fn load_or_create_kek(dir: &Path) -> Result<Kek, StateError> {
    let path = kek_path(dir);
    Ok(if path.exists() { Kek::load(&path)? } else { Kek::create(&path)? })
}

pub(crate) fn prepare_dir(dir: &Path) -> Result<(), StateError> {
    let io = |action| move |source| StateError::Io { action, path: dir.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io("create"))?;
    let mode = fs::metadata(dir).map_err(io("read"))?.permissions().mode() & 0o777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    // An empty directory was made for us, by systemd or by hand; one with content may be anything, even /tmp.
    if fs::read_dir(dir).map_err(io("read"))?.next().is_some() {
        return Err(StateError::Open { dir: dir.to_owned(), mode });
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(io("chmod"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain() -> TrustDomain {
        "prod.example.org".parse().unwrap()
    }

    #[test]
    fn init_makes_a_private_pki_once() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("pki");
        let made = init(&dir, &domain(), None, SystemTime::now()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        for file in ["pki.db", "kek", "recovery.key", "audit.jsonl"] {
            assert_eq!(mode(&dir.join(file)), 0o600, "{file}");
        }
        let pem = fs::read_to_string(&made.recovery_key).unwrap();
        let public = KeyPair::from_pem(&pem).unwrap().subject_public_key_info();
        assert_eq!(sha256(&public), made.recovery_key_id);
        let state = StateDir::open(&dir).unwrap();
        assert_eq!(state.latest_bundle().unwrap().digest(), made.bundle_digest);
        let again = init(&dir, &domain(), None, SystemTime::now()).unwrap_err();
        assert!(matches!(again, StateError::Initialised { .. }), "{again}");
        assert!(made.recovery_key.exists(), "a refused init must not take the recovery key away");
    }

    #[test]
    fn a_directory_without_a_pki_says_what_to_run() {
        let parent = tempfile::tempdir().unwrap();
        let error = StateDir::open(parent.path()).err().unwrap().to_string();
        assert!(error.contains("meshd-pki init"), "{error}");
    }

    #[test]
    fn what_a_lost_database_has_left_makes_no_new_pki() {
        let parent = tempfile::tempdir().unwrap();
        init(parent.path(), &domain(), None, SystemTime::now()).unwrap();
        fs::write(parent.path().join("authorities.json"), "{}").unwrap();
        fs::remove_file(parent.path().join("pki.db")).unwrap();
        let error = init(parent.path(), &domain(), None, SystemTime::now()).unwrap_err();
        assert!(matches!(error, StateError::Remains { .. }), "{error}");
    }

    #[test]
    fn a_shared_directory_with_content_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        fs::set_permissions(parent.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(parent.path().join("somebody-elses"), "x").unwrap();
        let error = init(parent.path(), &domain(), None, SystemTime::now()).unwrap_err();
        assert!(matches!(error, StateError::Open { mode: 0o755, .. }), "{error}");
    }

    #[test]
    fn the_key_in_the_database_is_not_readable_without_the_wrapping_key() {
        let parent = tempfile::tempdir().unwrap();
        init(parent.path(), &domain(), None, SystemTime::now()).unwrap();
        let state = StateDir::open(parent.path()).unwrap();
        let trust = state.database.read(trust::trust).unwrap();
        let root = trust.active().unwrap();
        let wrapped = root.wrapped_key.clone();
        let key = state.kek().unwrap().unwrap(&root.id, &wrapped).unwrap();
        KeyPair::try_from(key.as_slice()).unwrap();
        assert!(KeyPair::try_from(wrapped.as_slice()).is_err());
        fs::remove_file(parent.path().join("kek")).unwrap();
        assert!(state.kek().err().unwrap().to_string().contains("backup"));
    }
}
