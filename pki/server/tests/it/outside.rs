//! Roots of authorities outside, on their way in and out: nobody loses a root that somebody still hangs on.

use meshd_identity::{Bundle, root_id, roots_of};
use meshd_pki::upstream::commands::{UpstreamError, import};
use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::authority::taint;
use crate::operation::{DAY, Desk, HOUR};
use crate::support::domain;
use crate::upstream::{Offline, Says, pem_of, renew};

impl Desk {
    fn bring(&self, offline: &Offline, key: &KeyPair) -> Result<String, UpstreamError> {
        let chain = offline.sign(key, Says::usual(self.now(), 365));
        import(self.dir(), chain.as_bytes(), Some(key.serialize_pem().as_bytes()), self.now())?;
        Ok(chain)
    }

    fn bundle(&self) -> Bundle {
        Bundle::from_jwks(domain(), &self.pki().bundle(&[]).unwrap().jwks).unwrap()
    }

    fn holds(&self, offline: &Offline) -> bool {
        self.bundle().roots.iter().any(|root| pem_of(root) == offline.certificate)
    }

    /// The host tells what it hangs on as `meshd` does.
    fn tell(&self, chain: &[Vec<u8>]) {
        let bundle = self.bundle();
        let under = roots_of(&chain[1], bundle.roots.iter().map(Vec::as_slice));
        let ids: Vec<String> = under.into_iter().map(root_id).collect();
        assert_eq!(ids.len(), 1);
        self.report(&chain[0], &[ids[0].as_str()]);
    }

    /// A host that does what it should: `chain` is that of the end.
    fn live(&self, chain: &mut Vec<Vec<u8>>, days: u64) {
        for _ in 0..days * 3 {
            self.pass(8 * HOUR);
            *chain = renew(self, chain);
            self.tell(chain);
        }
    }
}

fn id_of(offline: &Offline) -> String {
    root_id(&CertificateDer::from_pem_slice(offline.certificate.as_bytes()).unwrap())
}

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

#[test]
fn a_tainted_root_from_outside_stays_while_a_host_hangs_on_it() {
    let desk = Desk::new();
    let mut chain = desk.enrol("web");
    let (first, second) = (Offline::new(desk.now(), "first"), Offline::new(desk.now(), "second"));
    desk.bring(&first, &key()).unwrap();
    desk.live(&mut chain, 3);
    assert_eq!(desk.root("active").unwrap(), id_of(&first));
    let old = chain.clone();
    desk.done(taint(&id_of(&first)));
    desk.bring(&second, &key()).unwrap();
    desk.tell(&chain);
    desk.pass(60);
    assert_eq!(desk.root("active").unwrap(), id_of(&second));
    for _ in 0..3 {
        desk.pass(60);
        desk.tell(&old);
        assert!(desk.holds(&first), "a host still hangs on it");
    }
    chain = renew(&desk, &old);
    desk.tell(&chain);
    desk.pass(60);
    assert!(!desk.holds(&first), "nobody hangs on it");
    let again = desk.bring(&first, &key()).unwrap_err();
    assert!(matches!(&again, UpstreamError::Tainted { .. }), "{again}");
}

#[test]
fn a_root_left_by_an_intermediate_that_kept_its_key_stays_as_long_as_its_leaves_and_the_hold() {
    let desk = Desk::new();
    let mut chain = desk.enrol("web");
    let (first, second) = (Offline::new(desk.now(), "first"), Offline::new(desk.now(), "second"));
    let same = key();
    desk.bring(&first, &same).unwrap();
    desk.live(&mut chain, 40);
    let given = desk.bring(&second, &same).unwrap();
    desk.live(&mut chain, 2);
    assert!(given.contains(&pem_of(&chain[1])), "it signs under the second root now");
    assert!(desk.holds(&first), "what it signed under the first root is good for a day, and the hold for 30 days");
    desk.live(&mut chain, 25);
    assert!(desk.holds(&first));
    desk.live(&mut chain, 8);
    assert!(!desk.holds(&first));
}

#[test]
fn a_root_certified_again_with_its_key_takes_the_place_of_the_first() {
    let desk = Desk::new();
    let mut chain = desk.enrol("web");
    let first = Offline::new(desk.now(), "company");
    let old = first.certificate.clone();
    desk.bring(&first, &key()).unwrap();
    desk.live(&mut chain, 3);
    desk.pass(HOUR);
    let renewed = first.again(desk.now(), "company");
    assert_ne!(old, renewed.certificate);
    let given = desk.bring(&renewed, &key()).unwrap();
    desk.live(&mut chain, 3);
    let roots = desk.list().authorities.into_iter().filter(|one| one.kind == "root");
    let active: Vec<String> = roots.filter(|one| one.state == "active").map(|one| one.id).collect();
    assert_eq!(active, [id_of(&renewed)]);
    assert!(given.contains(&pem_of(&chain[1])), "the intermediate under it is used");
    let next = desk.bring(&renewed, &key()).unwrap();
    desk.pki().refresh().unwrap();
    chain = renew(&desk, &chain);
    assert!(next.contains(&pem_of(&chain[1])), "and so is every further one");
    desk.live(&mut chain, 35);
    assert!(desk.holds(&renewed), "the one in use stays");
    assert!(!desk.bundle().roots.iter().any(|root| pem_of(root) == old), "the first has gone");
}
