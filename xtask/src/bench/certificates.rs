//! Certificates for HAProxy and Envoy, as strong as meshd's: P-256 from end to end.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use meshd_tests::command::run;

pub(crate) struct Certificates {
    directory: PathBuf,
}

impl Certificates {
    pub(crate) fn make(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let certificates = Self { directory: directory.to_owned() };
        certificates.make_authority()?;
        for name in ["near", "far"] {
            certificates.make_leaf(name)?;
        }
        Ok(certificates)
    }

    /// A configuration with its places filled in.
    pub(crate) fn fill(&self, template: &str, far: &str) -> String {
        template.replace("@CERTIFICATES@", &self.directory.display().to_string()).replace("@FAR@", far)
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    fn make_authority(&self) -> Result<()> {
        let (key, certificate) = (self.path("ca.key"), self.path("ca.pem"));
        let new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
        let files = ["-subj", "/CN=bench authority", "-keyout", &key, "-out", &certificate];
        run("openssl", &[&new[..], &files].concat())?;
        Ok(())
    }

    fn make_leaf(&self, name: &str) -> Result<()> {
        let file = |kind: &str| self.path(&format!("{name}.{kind}"));
        let (key, request, certificate, extensions) = (file("key"), file("csr"), file("pem"), file("ext"));
        let subject = format!("/CN={name}");
        let new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", &subject];
        run("openssl", &[&new[..], &["-keyout", &key, "-out", &request]].concat())?;
        fs::write(&extensions, format!("subjectAltName=DNS:{name}.bench.test\nkeyUsage=digitalSignature\n"))?;
        let (authority, authority_key) = (self.path("ca.pem"), self.path("ca.key"));
        let sign = ["x509", "-req", "-days", "1", "-CA", &authority, "-CAkey", &authority_key, "-CAcreateserial"];
        run("openssl", &[&sign[..], &["-in", &request, "-extfile", &extensions, "-out", &certificate]].concat())?;
        // HAProxy wants both in one file.
        let both = [&certificate, &key].map(fs::read_to_string).into_iter().collect::<Result<String, _>>();
        fs::write(file("both"), both.context("openssl wrote no key")?)?;
        Ok(())
    }
}
