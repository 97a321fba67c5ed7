//! The Unix socket of the Admin API. The kernel says who calls.

use std::ffi::CString;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::service::{AdminService, Local};
use super::{Actor, Role, user};
use crate::pki::Pki;

/// An operator has one; a script a few.
const MAX_CONNECTIONS: usize = 64;
/// Of users other than root and the PKI's own: whatever they do, those two get through.
const MAX_OTHERS: usize = 32;
/// Others ask one thing and go.
const OTHERS_DEADLINE: Duration = Duration::from_secs(30);

/// Who may read through the socket besides root and the PKI's own user, who may do everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Readers {
    users: Vec<Uid>,
    groups: Vec<Gid>,
}

impl Readers {
    /// Reads `alice`, `1000`, `group:ops` or `group:1000`.
    pub fn parse(names: &[String]) -> Result<Readers, String> {
        let mut readers = Readers::default();
        for name in names {
            let unknown = |what: &str| format!("there is no {what} `{name}`; give a user, a uid or group:NAME");
            match name.strip_prefix("group:") {
                Some(group) => {
                    let by_name = || Group::from_name(group).ok().flatten().map(|group| group.gid);
                    let found = group.parse().ok().map(Gid::from_raw).or_else(by_name);
                    readers.groups.push(found.ok_or_else(|| unknown("group"))?);
                }
                None => {
                    let by_name = || User::from_name(name).ok().flatten().map(|user| user.uid);
                    let found = name.parse().ok().map(Uid::from_raw).or_else(by_name);
                    readers.users.push(found.ok_or_else(|| unknown("user"))?);
                }
            }
        }
        Ok(readers)
    }

    fn is_empty(&self) -> bool {
        self.users.is_empty() && self.groups.is_empty()
    }

    /// What the user may do, `own` being whom the PKI runs as.
    fn role(&self, uid: Uid, gid: Gid, own: Uid) -> Option<Role> {
        if uid.is_root() || uid == own {
            return Some(Role::Admin);
        }
        let in_group = || groups(uid, gid).iter().any(|group| self.groups.contains(group));
        (self.users.contains(&uid) || in_group()).then_some(Role::Read)
    }
}

fn groups(uid: Uid, gid: Gid) -> Vec<Gid> {
    let name = User::from_uid(uid).ok().flatten().and_then(|user| CString::new(user.name).ok());
    name.and_then(|name| getgrouplist(&name, gid).ok()).unwrap_or_else(|| vec![gid])
}

/// Binds the socket, in the place of one that a killed server left: whoever calls holds the lock of the state directory.
pub fn bind(path: &Path, readers: &Readers) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    // Who may do what is judged per caller; the mode only keeps others from trying.
    let mode = if readers.is_empty() { 0o600 } else { 0o666 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// Serves until it is dropped.
pub async fn serve_socket(pki: Arc<Pki>, listener: UnixListener, readers: Readers) {
    let router = Router::new().route_service("/meshd.pki.admin.v1.Admin/{method}", AdminService::server(pki));
    let (mut connections, mut others) = (JoinSet::new(), JoinSet::new());
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            Some(_) = others.join_next() => {}
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    let is_own = is_own(&stream);
                    let connection = connection(router.clone(), stream, readers.clone());
                    if is_own {
                        connections.spawn(connection);
                    } else if others.len() < MAX_OTHERS {
                        others.spawn(async move { _ = timeout(OTHERS_DEADLINE, connection).await });
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the admin socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
}

fn is_own(stream: &UnixStream) -> bool {
    let uid = stream.peer_cred().map(|caller| Uid::from_raw(caller.uid()));
    uid.is_ok_and(|uid| uid.is_root() || uid == Uid::effective())
}

async fn connection(router: Router, stream: UnixStream, readers: Readers) {
    let caller = match stream.peer_cred() {
        Ok(caller) => caller,
        Err(error) => {
            tracing::warn!(%error, "the kernel does not say who uses the admin socket");
            return;
        }
    };
    let (uid, gid) = (Uid::from_raw(caller.uid()), Gid::from_raw(caller.gid()));
    // Groups may be kept by a directory service that answers slowly.
    let looked_up = tokio::task::spawn_blocking(move || match readers.role(uid, gid, Uid::effective()) {
        Some(role) => Local::Known(Actor { name: user(uid), role }),
        None => Local::Stranger(user(uid)),
    });
    let Ok(local) = looked_up.await else { return };
    let service = TowerToHyperService::new(router.layer(axum::Extension(local)));
    let served = Builder::new(TokioExecutor::new()).http2_only().serve_connection(TokioIo::new(stream), service).await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection to the admin socket ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_takes_the_place_of_one_that_was_left_and_of_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _guard = runtime.enter();
        let path = dir.path().join("admin.sock");
        drop(bind(&path, &Readers::default()).unwrap());
        drop(bind(&path, &Readers::default()).unwrap());
        let file = dir.path().join("meshd-pki.db");
        std::fs::write(&file, "precious").unwrap();
        assert!(bind(&file, &Readers::default()).unwrap_err().to_string().contains("no socket"));
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }

    #[test]
    fn root_and_the_pkis_own_user_do_everything_and_those_named_read() {
        let readers = Readers::parse(&["4001".to_owned(), "group:5001".to_owned()]).unwrap();
        let role = |uid, gid| readers.role(Uid::from_raw(uid), Gid::from_raw(gid), Uid::from_raw(3001));
        assert_eq!(role(0, 0), Some(Role::Admin));
        assert_eq!(role(3001, 3001), Some(Role::Admin));
        assert_eq!(role(4001, 4001), Some(Role::Read));
        assert_eq!(role(4002, 5001), Some(Role::Read));
        assert_eq!(role(4002, 4002), None);
        assert_eq!(Readers::default().role(Uid::from_raw(4001), Gid::from_raw(4001), Uid::from_raw(3001)), None);
        assert_eq!(Readers::parse(&["root".to_owned()]).unwrap().users, [Uid::from_raw(0)]);
        assert!(Readers::parse(&["group:no-such-group".to_owned()]).unwrap_err().contains("no group"));
        assert!(Readers::parse(&["no-such-user".to_owned()]).unwrap_err().contains("no user"));
    }
}
