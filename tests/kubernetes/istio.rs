//! Istio's own client for certificates, unmodified (its agent's secret manager), with our PKI as its authority.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use meshd_tests::plan::{PKI_PORT, Plan};
use meshd_tests::process::{Process, Program};
use meshd_tests::servers;
use meshd_tests::wait::{until, until_some};

use crate::{Bed, DEADLINE};

const CHECKOUT: (&str, &str) = ("shop", "checkout");
const FOR_ISTIO: &str = "istio-ca";
const GOT: &str = "got default";

/// Where an agent on web has its files, and how it proves who it is.
struct Agent<'a> {
    bed: &'a Bed,
    directory: PathBuf,
}

impl<'a> Agent<'a> {
    fn of(bed: &'a Bed, name: &str) -> Result<Self> {
        let directory = bed.mesh.host("web").directory().join(name);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("ca.pem"), bed.mesh.roots()?.concat())?;
        Ok(Self { bed, directory })
    }

    fn start(&self, options: &[&str]) -> Result<Process> {
        let web = self.bed.mesh.host("web");
        let authority = format!("{}:{PKI_PORT}", self.bed.mesh.pki_host().address());
        let program = Program::new(servers::istio_client()?).args(["-ca", &authority, "-trust-domain", "demo.example"]);
        let program = program.args(["-namespace", CHECKOUT.0, "-account", CHECKOUT.1]);
        let program = program.arg("-root").arg(self.directory.join("ca.pem")).arg("-output").arg(&self.directory);
        web.spawn(&program.args(options))
    }

    /// With what a kubelet would mount for the pod.
    fn start_with_token(&self, audience: &str, options: &[&str]) -> Result<Process> {
        let token = self.directory.join("token");
        let cluster = &self.bed.cluster;
        fs::write(&token, cluster.token(CHECKOUT, audience, None)?)?;
        self.start(&[&["-token", &token.display().to_string()], options].concat())
    }

    fn openssl(&self, line: &str) -> Result<String> {
        let script = format!("cd \"$1\"; openssl {line}");
        let program = Program::new("sh").args(["-euc", &script, "sh"]).arg(&self.directory);
        self.bed.mesh.host("web").run(&program)?.expect_success(line)
    }

    fn serial(&self) -> Result<String> {
        self.openssl("x509 -noout -serial -in cert-chain.pem")
    }

    /// The chain ends at the mesh's root, names the account, and belongs to the key.
    fn holds_its_identity(&self) -> Result<()> {
        for purpose in ["sslclient", "sslserver"] {
            self.openssl(&format!(
                "verify -x509_strict -purpose {purpose} -CAfile ca.pem -untrusted cert-chain.pem cert-chain.pem"
            ))?;
        }
        let name = self.openssl("x509 -noout -ext subjectAltName -in cert-chain.pem")?;
        ensure!(name.contains(&format!("URI:{}", self.bed.mesh.spiffe_id("checkout"))), "{name}");
        let certified = self.openssl("x509 -noout -pubkey -in cert-chain.pem")?;
        ensure!(certified == self.openssl("pkey -pubout -in key.pem")?, "the certificate is over another key");
        let believed = fs::read_to_string(self.directory.join("root-cert.pem"))?;
        ensure!(believed == self.bed.mesh.roots()?.concat(), "it believes\n{believed}");
        Ok(())
    }
}

/// A PKI that gives service accounts of the shop their certificates, and the next one for the one before.
fn bed(leaf_ttl: Option<&'static str>) -> Result<Bed> {
    let bed = Bed::make_with(Plan { leaf_ttl, ..Plan::shop_with_one_server() }, |pki| {
        let address = pki.address();
        format!(
            "[istio]\nclusters = [\"prod\"]\nnamespaces = [\"{}\"]\nrenew_by_certificate = true\nnames = [\"{address}\"]\n",
            CHECKOUT.0
        )
    })?;
    bed.cluster.create_service_account(CHECKOUT.0, CHECKOUT.1)?;
    has_keys_of_cluster(&bed)?;
    Ok(bed)
}

/// The PKI has just started.
fn has_keys_of_cluster(bed: &Bed) -> Result<()> {
    let early = Agent::of(bed, "early")?;
    let told = || early.start_with_token("nobody", &[])?.finish(DEADLINE);
    until_some(DEADLINE, "the cluster's keys at the PKI", || {
        Some(told()).filter(|told| !told.as_ref().is_ok_and(|it| it.stdout.contains("knows: none")))
    })?
    .map(drop)
}

#[test]
fn istios_own_client_gets_its_identity_by_a_token_and_renews_it_by_the_certificate_alone() -> Result<()> {
    let bed = bed(Some("20"))?;
    let agent = Agent::of(&bed, "agent")?;
    let mut by_token = agent.start_with_token(FOR_ISTIO, &[])?;
    let got = |agent: &Process| agent.stdout().lines().filter(|line| line.starts_with(GOT)).count();
    until(DEADLINE, "two certificates by token", || got(&by_token) >= 2).with_context(|| by_token.output())?;
    by_token.stop()?;
    agent.holds_its_identity().with_context(|| by_token.output())?;

    let before = agent.serial()?;
    let provisioned = agent.directory.display().to_string();
    let mut by_certificate = agent.start(&["-provisioned", &provisioned])?;
    until(DEADLINE, "two certificates by certificate", || got(&by_certificate) >= 2)
        .with_context(|| by_certificate.output())?;
    by_certificate.stop()?;
    agent.holds_its_identity().with_context(|| by_certificate.output())?;
    ensure!(agent.serial()? != before, "no other certificate than before");
    Ok(())
}

#[test]
fn istios_own_client_is_told_why_it_gets_nothing() -> Result<()> {
    let bed = bed(None)?;
    let refused = |client: Process, why: &str| -> Result<()> {
        let finished = client.finish(DEADLINE)?;
        ensure!(!finished.success() && finished.stdout.contains(why), "not `{why}`: {finished:?}");
        Ok(())
    };
    refused(Agent::of(&bed, "nobody")?.start(&[])?, "show a Kubernetes token for `istio-ca` as bearer")?;
    refused(Agent::of(&bed, "other")?.start_with_token("vault", &[])?, "is for `vault`, not for `istio-ca`")?;
    // What its agent does unless told otherwise.
    refused(Agent::of(&bed, "rsa")?.start_with_token(FOR_ISTIO, &["-ecc", ""])?, "not P-256")
}
