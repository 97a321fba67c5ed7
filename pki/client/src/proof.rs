//! What a host shows to become a member: a join token, the certificate its machine has already, or its pod's token.

use std::path::Path;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use meshd_identity::statements::{machine_challenge, machine_message};
use meshd_identity::{JoinToken, TrustDomain, sha256};
use meshd_pki_api::v1;
use meshd_pki_api::v1::enroll_request::Attestation;
use rustls::SignatureScheme;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::SigningKey;
use tonic::Status;

use crate::connect::{PkiClient, call};

/// The PKI accepts no longer chains.
const MOST_CERTIFICATES: usize = 4;
/// Strongest first; RSA with PSS before PKCS #1.
const SCHEMES: [SignatureScheme; 6] = [
    SignatureScheme::ED25519,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::RSA_PSS_SHA512,
    SignatureScheme::RSA_PSS_SHA256,
    SignatureScheme::RSA_PKCS1_SHA256,
];

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ProofError(String);

/// What proves that this machine may be a host.
pub enum Proof {
    JoinToken(JoinToken),
    Machine(MachineCertificate),
    /// A projected service account token of Kubernetes.
    Kubernetes(String),
}

/// A certificate with its key, as another authority gave it to this machine.
pub struct MachineCertificate {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<dyn SigningKey>,
}

impl MachineCertificate {
    /// From PEM files: the leaf with its intermediates, and its key.
    pub fn read(certificate: &Path, key: &Path) -> Result<MachineCertificate, ProofError> {
        let wrong = |path: &Path, why: &dyn std::fmt::Display| ProofError(format!("{}: {why}", path.display()));
        let chain = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let chain = chain.map_err(|error| wrong(certificate, &error))?;
        if !(1..=MOST_CERTIFICATES).contains(&chain.len()) {
            let count = chain.len();
            let why =
                format!("{count} certificates; give the machine's and its intermediates, {MOST_CERTIFICATES} at most");
            return Err(wrong(certificate, &why));
        }
        let der = PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(key, &error))?;
        let key = any_supported_type(&der).map_err(|error| wrong(key, &error))?;
        Ok(MachineCertificate { chain, key })
    }

    async fn proof(
        &self,
        pki: &mut PkiClient,
        domain: &TrustDomain,
        csr: &[u8],
    ) -> Result<v1::MachineCertificateProof, Status> {
        let leaf = self.chain.first().map_or(&[][..], |leaf| leaf);
        let nonce = call(pki.challenge(v1::ChallengeRequest { host_id: machine_challenge(leaf) })).await?.nonce;
        let unusable = || Status::invalid_argument("the key of the machine certificate cannot sign; use P-256 or RSA");
        let signer = self.key.choose_scheme(&SCHEMES).ok_or_else(unusable)?;
        let signature = signer.sign(&machine_message(domain, &nonce, csr)).map_err(|_| unusable())?;
        let chain = self.chain.iter().map(|certificate| certificate.to_vec()).collect();
        Ok(v1::MachineCertificateProof { chain, nonce, signature, scheme: u16::from(signer.scheme()).into() })
    }
}

impl Proof {
    /// Tells proofs apart: a key drawn for one is not used with another.
    pub(crate) fn id(&self) -> String {
        match self {
            Proof::JoinToken(token) => token.id.clone(),
            Proof::Machine(machine) => {
                format!("x509pop-{}", HEXLOWER.encode(&sha256(machine.chain.first().map_or(&[], |leaf| leaf))))
            }
            Proof::Kubernetes(_) => "kubernetes".to_owned(),
        }
    }

    pub(crate) async fn attestation(
        &self,
        pki: &mut PkiClient,
        domain: &TrustDomain,
        csr: &[u8],
    ) -> Result<Attestation, Status> {
        Ok(match self {
            Proof::JoinToken(token) => {
                let proof = v1::JoinTokenProof { id: token.id.clone(), secret: token.secret.0.to_vec() };
                Attestation::JoinToken(proof)
            }
            Proof::Machine(machine) => Attestation::MachineCertificate(machine.proof(pki, domain, csr).await?),
            Proof::Kubernetes(token) => Attestation::KubernetesToken(v1::KubernetesTokenProof { token: token.clone() }),
        })
    }
}
