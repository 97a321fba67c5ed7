//! The newest deny set this host has seen, in a file of its own beside the identity directory: a host whose identity is
//! restored from a snapshot does not forget whom it refuses, and a PKI restored from a backup is told.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use data_encoding::HEXLOWER;
use meshd_identity::signed::{self, VerifyingKey};
use meshd_identity::statements::{DenySet, Whom};
use meshd_identity::{Bundle, SpiffeId, TrustDomain, sha256};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::reply::{ReplyError, problem};

const SCHEMA: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Document {
    schema: u32,
    set: DenySet,
    /// As the PKI signed it, for a PKI that has lost it.
    jws: String,
}

pub(crate) struct Denials {
    file: PathBuf,
    jws: String,
    publish: watch::Sender<Arc<DenySet>>,
}

impl Denials {
    /// Beside the identity directory, under its name.
    pub(crate) fn open(identity_dir: &Path, domain: &TrustDomain) -> Denials {
        let file = identity_dir.with_added_extension("deny");
        let (set, jws) = read(&file).unwrap_or_else(|error| {
            // What is lost here the PKI sends again, unless it has lost it as well.
            if error.kind() != io::ErrorKind::NotFound {
                tracing::error!(file = %file.display(), %error, "the deny set on disk is unusable; asking the PKI for it");
            }
            (DenySet { trust_domain: domain.clone(), sequence: 0, entries: Vec::new() }, String::new())
        });
        Denials { file, jws, publish: watch::Sender::new(Arc::new(set)) }
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Arc<DenySet>> {
        self.publish.subscribe()
    }

    pub(crate) fn sequence(&self) -> u64 {
        self.publish.borrow().sequence
    }

    pub(crate) fn name(&self, id: &SpiffeId) -> bool {
        self.publish.borrow().entries.iter().any(|entry| matches!(&entry.whom, Whom::Identity(denied) if denied == id))
    }

    pub(crate) fn jws(&self) -> &str {
        &self.jws
    }

    /// Puts a newer set in force that a root of the bundle has signed. In force even when the disk is full.
    pub(crate) fn accept(&mut self, jws: &str, bundle: &Bundle) -> Result<(), ReplyError> {
        if !jws.is_empty() && jws == self.jws {
            return Ok(());
        }
        let keys: Vec<VerifyingKey> =
            bundle.roots.iter().filter_map(|root| VerifyingKey::from_certificate(root)).collect();
        let set: DenySet = signed::verify(jws, &keys).map_err(|error| problem(format!("its deny set: {error}")))?;
        let held = self.sequence();
        if set.trust_domain != bundle.trust_domain {
            return Err(problem(format!("its deny set is of `{}`", set.trust_domain)));
        }
        if set.sequence <= held {
            let sequence = set.sequence;
            return Err(problem(format!("its deny set has sequence {sequence}, this host already holds {held}")));
        }
        tracing::warn!(sequence = set.sequence, entries = set.entries.len(), "a new deny set is in force");
        jws.clone_into(&mut self.jws);
        let document = Document { schema: SCHEMA, set, jws: jws.to_owned() };
        if let Err(error) = write(&self.file, &document) {
            tracing::error!(file = %self.file.display(), %error, "the deny set is in force but not on disk");
        }
        self.publish.send_replace(Arc::new(document.set));
        Ok(())
    }
}

fn read(file: &Path) -> io::Result<(DenySet, String)> {
    let bad = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
    let content = fs::read_to_string(file)?;
    let (sum, body) = content.split_once('\n').ok_or_else(|| bad("no checksum"))?;
    if sum != HEXLOWER.encode(&sha256(body.as_bytes())) {
        return Err(bad("the checksum does not match"));
    }
    let document: Document = serde_json::from_str(body)?;
    match document.schema {
        SCHEMA => Ok((document.set, document.jws)),
        _ => Err(bad("it was written by a newer meshd")),
    }
}

fn write(file: &Path, document: &Document) -> io::Result<()> {
    let body = serde_json::to_string(document)?;
    let temporary = file.with_added_extension("tmp");
    let mut options = OpenOptions::new();
    let mut out = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    out.write_all(format!("{}\n{body}", HEXLOWER.encode(&sha256(body.as_bytes()))).as_bytes())?;
    out.sync_all()?;
    fs::rename(&temporary, file)?;
    File::open(file.parent().unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
pub(crate) mod tests {
    use meshd_identity::statements::Denied;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    fn domain() -> TrustDomain {
        "prod.example.org".parse().unwrap()
    }

    pub(crate) fn authority() -> (KeyPair, Bundle) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().to_vec();
        (key, Bundle::new(domain(), 1, 300, vec![root]).unwrap())
    }

    pub(crate) fn set(sequence: u64) -> DenySet {
        let entries = vec![Denied { whom: Whom::Serial(format!("{sequence:02x}")), until: 1_900_000_000 }];
        DenySet { trust_domain: domain(), sequence, entries }
    }

    pub(crate) fn sign(key: &KeyPair, set: &DenySet) -> String {
        signed::sign(&key.serialize_der(), set).unwrap()
    }

    #[test]
    fn what_is_in_force_survives_a_restart_and_nothing_older_comes_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let identity = dir.path().join("identity");
        let (key, bundle) = authority();
        let mut denials = Denials::open(&identity, &domain());
        assert_eq!(denials.sequence(), 0);
        let jws = sign(&key, &set(7));
        denials.accept(&jws, &bundle).unwrap();
        let mut denials = Denials::open(&identity, &domain());
        assert_eq!(**denials.watch().borrow(), set(7));
        assert_eq!(denials.jws(), jws);
        for sequence in [6, 7] {
            let error = denials.accept(&sign(&key, &set(sequence)), &bundle).unwrap_err().to_string();
            assert!(error.contains("already holds 7"), "{error}");
        }
        denials.accept(&sign(&key, &set(8)), &bundle).unwrap();
        assert_eq!(Denials::open(&identity, &domain()).sequence(), 8);
    }

    #[test]
    fn sets_of_strangers_and_of_other_domains_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let ((key, bundle), (stranger, _)) = (authority(), authority());
        let mut denials = Denials::open(&dir.path().join("identity"), &domain());
        assert!(denials.accept(&sign(&stranger, &set(7)), &bundle).unwrap_err().to_string().contains("signature"));
        let foreign = DenySet { trust_domain: "other".parse().unwrap(), ..set(7) };
        assert!(denials.accept(&sign(&key, &foreign), &bundle).unwrap_err().to_string().contains("`other`"));
        assert!(denials.accept("", &bundle).is_err());
        assert_eq!(denials.sequence(), 0);
    }

    #[test]
    fn a_damaged_file_is_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let identity = dir.path().join("identity");
        let (key, bundle) = authority();
        Denials::open(&identity, &domain()).accept(&sign(&key, &set(7)), &bundle).unwrap();
        let file = dir.path().join("identity.deny");
        let whole = fs::read_to_string(&file).unwrap();
        fs::write(&file, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(Denials::open(&identity, &domain()).sequence(), 0);
    }
}
