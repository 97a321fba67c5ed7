use super::*;

/// A certificate and its key, PEM.
fn material() -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["cluster".to_owned()]).unwrap().self_signed(&key).unwrap();
    (certificate.pem(), key.serialize_pem())
}

struct Directory(tempfile::TempDir);

impl Directory {
    fn new() -> Directory {
        let directory = Directory(tempfile::tempdir().unwrap());
        let (certificate, key) = material();
        directory.write("ca.pem", &certificate);
        directory.write("me.pem", &certificate);
        directory.write("me.key", &key);
        directory.write("token", "abc\n");
        directory
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.path().join(name), text).unwrap();
    }

    /// What comes of a kubeconfig with such a cluster and user.
    fn access(&self, cluster: &str, user: &str, context: Option<&str>) -> Result<Access, String> {
        self.write(
            "config",
            &format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: main\npreferences: {{}}\n\
                 clusters: [{{ name: prod, cluster: {cluster} }}]\nusers: [{{ name: me, user: {user} }}]\n\
                 contexts:\n- {{ name: main, context: {{ cluster: prod, user: me, namespace: x }} }}\n\
                 - {{ name: lost, context: {{ cluster: none, user: me }} }}\n"
            ),
        );
        let settings = Settings { kubeconfig: Some(self.0.path().join("config")), context: context.map(str::to_owned) };
        settings.access().map_err(|error| error.to_string())
    }
}

const CLUSTER: &str = "{ server: 'https://10.0.0.1:6443/clusters/a/', certificate-authority: ca.pem }";

#[test]
fn a_kubeconfig_names_server_authority_and_credential_with_paths_beside_it() {
    let directory = Directory::new();
    let access = directory.access(CLUSTER, "{ tokenFile: token }", None).unwrap();
    assert_eq!((access.address.as_str(), access.name.as_str()), ("10.0.0.1:6443", "10.0.0.1"));
    assert_eq!((access.server.as_str(), access.base.as_str()), ("https://10.0.0.1:6443", "/clusters/a"));
    directory.write("token", "renewed");
    assert_eq!(access.token.unwrap().read().unwrap(), "renewed");
    let access = directory.access(CLUSTER, "{ client-certificate: me.pem, client-key: me.key }", Some("main")).unwrap();
    assert!(access.token.is_none() && access.tls.client_auth_cert_resolver.has_certs());
}

#[test]
fn data_inside_counts_as_well_and_a_server_may_have_another_name() {
    let directory = Directory::new();
    let data = BASE64.encode(fs::read_to_string(directory.0.path().join("ca.pem")).unwrap().as_bytes());
    let cluster = format!(
        "{{ server: 'https://[2001:db8::1]', certificate-authority-data: {data}, tls-server-name: kubernetes }}"
    );
    let access = directory.access(&cluster, "{ token: secret }", None).unwrap();
    assert_eq!((access.address.as_str(), access.name.as_str()), ("[2001:db8::1]:443", "kubernetes"));
}

#[test]
fn what_is_wrong_names_the_file_the_entry_and_what_to_do() {
    let directory = Directory::new();
    let token = "{ token: secret }";
    for (cluster, user, context, expected) in [
        (CLUSTER, token, Some("test"), "there is no context `test`; there are: `main`, `lost`"),
        (CLUSTER, token, Some("lost"), "there is no cluster `none`; there are: `prod`"),
        (CLUSTER, "{}", None, "user `me`: no credential"),
        (CLUSTER, "{ exec: { command: aws } }", None, "`exec` is not supported: meshd runs no credential plugins"),
        (CLUSTER, "{ token: secret, as: reader }", None, "`as` is not supported"),
        (CLUSTER, "{ token: secret, as-groups: [readers] }", None, "`as-groups` is not supported"),
        (CLUSTER, "{ client-certificate: me.pem }", None, "go together"),
        (CLUSTER, "{ tokenFile: missing }", None, "missing: "),
        (CLUSTER, "{ client-certificate: me.pem, client-key: token }", None, "token: "),
        ("{ server: 'http://10.0.0.1', certificate-authority: ca.pem }", token, None, "is no https://HOST:PORT"),
        ("{ server: 'https://10.0.0.1' }", token, None, "no certificate-authority"),
        ("{ server: 'https://10.0.0.1', certificate-authority-data: '*' }", token, None, "is no base64"),
        ("{ server: 'https://10.0.0.1', insecure-skip-tls-verify: true }", token, None, "insecure-skip-tls-verify"),
        ("[]", token, None, "is no kubeconfig"),
    ] {
        let error = directory.access(cluster, user, context).err().unwrap();
        assert!(error.contains(expected) && error.contains(directory.0.path().to_str().unwrap()), "{error}");
    }
}

#[test]
fn a_context_without_kubeconfig_is_refused() {
    let settings = Settings { kubeconfig: None, context: Some("x".to_owned()) };
    assert!(matches!(settings.access(), Err(SettingsError::ContextAlone)));
}

#[test]
fn a_pod_finds_everything_in_itself() {
    let directory = Directory::new();
    fs::copy(directory.0.path().join("ca.pem"), directory.0.path().join("ca.crt")).unwrap();
    let access = |host: &'static str| {
        let variable = move |name: &str| match name {
            "KUBERNETES_SERVICE_HOST" => Some(host.to_owned()),
            "KUBERNETES_SERVICE_PORT" => Some("6443".to_owned()),
            _ => None,
        };
        in_cluster(variable, directory.0.path())
    };
    let v4 = access("10.96.0.1").unwrap();
    assert_eq!((v4.server.as_str(), v4.name.as_str()), ("https://10.96.0.1:6443", "10.96.0.1"));
    assert_eq!(v4.token.unwrap().read().unwrap(), "abc");
    let v6 = access("fd00::1").unwrap();
    assert_eq!((v6.server.as_str(), v6.name.as_str()), ("https://[fd00::1]:6443", "fd00::1"));
    assert!(matches!(access(""), Err(SettingsError::NotInCluster)));
}

/// A host that boots before its token was fetched has a mesh all the same.
#[test]
fn what_is_not_there_yet_may_come_and_what_is_wrong_stays_wrong() {
    let may_pass = |break_it: &dyn Fn(&Directory)| {
        let directory = Directory::new();
        directory.access(CLUSTER, "{ tokenFile: token }", None).unwrap();
        break_it(&directory);
        let settings = Settings { kubeconfig: Some(directory.0.path().join("config")), context: None };
        settings.access().err().expect("an error").may_pass()
    };
    for file in ["token", "ca.pem"] {
        assert!(may_pass(&|directory| fs::remove_file(directory.0.path().join(file)).unwrap()), "{file}");
    }
    assert!(!may_pass(&|directory| fs::remove_file(directory.0.path().join("config")).unwrap()));
    assert!(!may_pass(&|directory| directory.write("ca.pem", "no certificate")));
    assert!(!may_pass(&|directory| directory.write("config", "clusters: 7")));
}
