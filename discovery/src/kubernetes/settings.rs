//! Where the API server is and how to be admitted: a kubeconfig, or what a pod finds in itself. Read anew for each
//! connection, and tokens for each request, so that renewed ones are used.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use data_encoding::BASE64;
use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::Deserialize;

use crate::tls::{self, Identity, MaterialError};

/// Where a pod has its own credentials.
const IN_CLUSTER: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const HTTPS: u16 = 443;
const HTTP2: &[&[u8]] = &[b"h2"];

#[derive(Debug, thiserror::Error)]
pub(super) enum SettingsError {
    #[error(
        "no kubeconfig is given, and this is no pod (KUBERNETES_SERVICE_HOST is not set); write `kubeconfig = \
         \"/etc/meshd/kubeconfig\"`"
    )]
    NotInCluster,
    #[error("`context` chooses in a kubeconfig, and none is given; add `kubeconfig`, or remove it")]
    ContextAlone,
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("{}: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{}: there is no {what} `{name}`; there are: {known}", path.display())]
    Missing { path: PathBuf, what: &'static str, name: String, known: String },
    #[error("{}: {what} `{name}`: {reason}", path.display())]
    Entry { path: PathBuf, what: &'static str, name: String, reason: String },
    #[error("TLS to the API server is not possible with this material: {0}")]
    Tls(#[from] rustls::Error),
}

impl SettingsError {
    /// Somebody may still write the file: a token that is fetched at boot, an authority that is being replaced.
    pub(super) fn may_pass(&self) -> bool {
        matches!(self, SettingsError::Unreadable { .. })
    }
}

/// What `[[source]]` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    pub kubeconfig: Option<PathBuf>,
    /// The kubeconfig's own choice, unless told otherwise.
    pub context: Option<String>,
}

/// Everything a connection needs; with a secret, so it is not to be shown.
#[derive(Clone)]
pub(super) struct Access {
    /// `https://10.0.0.1:6443`
    pub(super) server: String,
    /// `10.0.0.1:6443`
    pub(super) address: String,
    /// In front of every path, without a slash at its end.
    pub(super) base: String,
    /// Whose certificate it shows.
    pub(super) name: String,
    pub(super) tls: Arc<ClientConfig>,
    pub(super) token: Option<Token>,
}

#[derive(Clone)]
pub(super) enum Token {
    Text(String),
    File(PathBuf),
}

impl Token {
    pub(super) fn read(&self) -> Result<String, SettingsError> {
        match self {
            Token::Text(text) => Ok(text.clone()),
            Token::File(path) => {
                let text = fs::read_to_string(path).map_err(|error| unreadable(path, error))?;
                Ok(text.trim().to_owned())
            }
        }
    }
}

impl Access {
    /// What shows who we are, for messages.
    pub(super) fn credential(&self) -> String {
        match &self.token {
            Some(Token::File(path)) => format!("the token in {}", path.display()),
            Some(Token::Text(_)) => "the token of the kubeconfig".to_owned(),
            None => "the client certificate of the kubeconfig".to_owned(),
        }
    }
}

fn unreadable(path: &Path, source: io::Error) -> SettingsError {
    SettingsError::Unreadable { path: path.to_owned(), source }
}

impl Settings {
    /// Reads all it names.
    pub(super) fn access(&self) -> Result<Access, SettingsError> {
        let access = match (&self.kubeconfig, &self.context) {
            (Some(path), context) => from_kubeconfig(path, context.as_deref()),
            (None, Some(_)) => Err(SettingsError::ContextAlone),
            (None, None) => in_cluster(|name| std::env::var(name).ok(), Path::new(IN_CLUSTER)),
        }?;
        // A token that cannot be read is told at once.
        access.token.as_ref().map(Token::read).transpose()?;
        Ok(access)
    }
}

fn in_cluster(variable: impl Fn(&str) -> Option<String>, directory: &Path) -> Result<Access, SettingsError> {
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let host = variable("KUBERNETES_SERVICE_HOST").ok_or(SettingsError::NotInCluster)?;
    let port = variable("KUBERNETES_SERVICE_PORT").unwrap_or(HTTPS.to_string());
    let bare = host.trim_matches(['[', ']']).to_owned();
    let address = if bare.contains(':') { format!("[{bare}]:{port}") } else { format!("{bare}:{port}") };
    Ok(Access {
        server: format!("https://{address}"),
        address,
        base: String::new(),
        name: bare,
        tls: tls::client(certificates(&Material::File(directory.join("ca.crt")))?, None, HTTP2)?,
        token: Some(Token::File(directory.join("token"))),
    })
}

// As kubectl knows it; what has no meaning for us is passed over.

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Kubeconfig {
    #[serde(default)]
    current_context: String,
    #[serde(default)]
    clusters: Vec<NamedCluster>,
    #[serde(default)]
    users: Vec<NamedUser>,
    #[serde(default)]
    contexts: Vec<NamedContext>,
}

#[derive(Deserialize)]
struct NamedCluster {
    name: String,
    cluster: Cluster,
}

#[derive(Deserialize)]
struct NamedUser {
    name: String,
    user: User,
}

#[derive(Deserialize)]
struct NamedContext {
    name: String,
    context: Context,
}

#[derive(Deserialize)]
struct Context {
    cluster: String,
    user: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    tls_server_name: Option<String>,
    insecure_skip_tls_verify: Option<bool>,
    proxy_url: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct User {
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
    username: Option<String>,
    r#as: Option<Anything>,
    as_groups: Option<Anything>,
    as_uid: Option<Anything>,
    as_user_extra: Option<Anything>,
    exec: Option<Anything>,
    auth_provider: Option<Anything>,
}

/// What is only told to be there.
struct Anything;

impl<'de> Deserialize<'de> for Anything {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Anything, D::Error> {
        serde::de::IgnoredAny::deserialize(deserializer).map(|_| Anything)
    }
}

/// PEM, in a file or in the kubeconfig.
enum Material {
    File(PathBuf),
    /// Where it stands, and what it is.
    Inline(PathBuf, Vec<u8>),
}

/// One entry of a kubeconfig, for what is wrong with it.
struct At<'a> {
    path: &'a Path,
    what: &'static str,
    name: &'a str,
}

impl At<'_> {
    fn refuse(&self, reason: impl Into<String>) -> SettingsError {
        let (path, name) = (self.path.to_owned(), self.name.to_owned());
        SettingsError::Entry { path, what: self.what, name, reason: reason.into() }
    }

    /// Paths in a kubeconfig begin where it lies.
    fn file(&self, path: &Path) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("")).join(path)
    }

    /// kubectl, too, takes the data where both are given.
    fn material(
        &self,
        field: &str,
        file: Option<&PathBuf>,
        data: Option<&String>,
    ) -> Result<Option<Material>, SettingsError> {
        match (data, file) {
            (Some(data), _) => {
                let compact: String = data.split_whitespace().collect();
                let bytes = BASE64.decode(compact.as_bytes());
                let bytes = bytes.map_err(|error| self.refuse(format!("{field}-data is no base64: {error}")))?;
                Ok(Some(Material::Inline(self.path.to_owned(), bytes)))
            }
            (None, Some(file)) => Ok(Some(Material::File(self.file(file)))),
            (None, None) => Ok(None),
        }
    }
}

fn from_kubeconfig(path: &Path, context: Option<&str>) -> Result<Access, SettingsError> {
    let text = fs::read_to_string(path).map_err(|error| {
        // As much a mistake in meshd.toml as anything in there.
        SettingsError::File { path: path.to_owned(), reason: error.to_string() }
    })?;
    let config: Kubeconfig = serde_saphyr::from_str(&text).map_err(|error| {
        let reason = format!("is no kubeconfig: {}", crate::yaml::printable(&error.to_string()));
        SettingsError::File { path: path.to_owned(), reason }
    })?;
    let names = |all: Vec<&String>| all.into_iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let missing = |what, name: &str, all| {
        let (path, name) = (path.to_owned(), name.to_owned());
        SettingsError::Missing { path, what, name, known: names(all) }
    };
    let wanted = context.unwrap_or(&config.current_context);
    let found = config.contexts.iter().find(|known| known.name == wanted);
    let known = || config.contexts.iter().map(|known| &known.name).collect();
    let context = &found.ok_or_else(|| missing("context", wanted, known()))?.context;
    let found = config.clusters.iter().find(|known| known.name == context.cluster);
    let known = || config.clusters.iter().map(|known| &known.name).collect();
    let cluster = &found.ok_or_else(|| missing("cluster", &context.cluster, known()))?.cluster;
    let found = config.users.iter().find(|known| known.name == context.user);
    let known = || config.users.iter().map(|known| &known.name).collect();
    let user = &found.ok_or_else(|| missing("user", &context.user, known()))?.user;
    let at_cluster = At { path, what: "cluster", name: &context.cluster };
    let (identity, token) = credentials(user, &At { path, what: "user", name: &context.user })?;
    reach(cluster, &at_cluster, identity, token)
}

fn credentials(user: &User, at: &At<'_>) -> Result<(Option<Identity>, Option<Token>), SettingsError> {
    let acts_as = "meshd would read with more rights than the user it names";
    let foreign = [
        ("exec", user.exec.is_some(), "meshd runs no credential plugins"),
        ("auth-provider", user.auth_provider.is_some(), "Kubernetes dropped these plugins"),
        ("username", user.username.is_some(), "Kubernetes dropped passwords"),
        ("as", user.r#as.is_some(), acts_as),
        ("as-groups", user.as_groups.is_some(), acts_as),
        ("as-uid", user.as_uid.is_some(), acts_as),
        ("as-user-extra", user.as_user_extra.is_some(), acts_as),
    ];
    if let Some((field, _, why)) = foreign.into_iter().find(|(_, given, _)| *given) {
        let reason = format!("`{field}` is not supported: {why}; use a client certificate, `token` or `tokenFile`");
        return Err(at.refuse(reason));
    }
    let file = |name| user.token_file.as_deref().map(|path| at.file(path)).map(name);
    let token = file(Token::File).or_else(|| user.token.clone().map(Token::Text));
    let certificate =
        at.material("client-certificate", user.client_certificate.as_ref(), user.client_certificate_data.as_ref())?;
    let key = at.material("client-key", user.client_key.as_ref(), user.client_key_data.as_ref())?;
    let identity = match (certificate, key) {
        (Some(certificate), Some(key)) => Some((certificates(&certificate)?, private_key(&key)?)),
        (None, None) => None,
        _ => return Err(at.refuse("client-certificate and client-key go together; give both or neither")),
    };
    if identity.is_none() && token.is_none() {
        return Err(at.refuse("no credential; give client-certificate and client-key, `token` or `tokenFile`"));
    }
    Ok((identity, token))
}

fn reach(
    cluster: &Cluster,
    at: &At<'_>,
    identity: Option<Identity>,
    token: Option<Token>,
) -> Result<Access, SettingsError> {
    if cluster.insecure_skip_tls_verify == Some(true) {
        return Err(at.refuse("insecure-skip-tls-verify is not supported: whoever answers would say who may serve"));
    }
    if cluster.proxy_url.is_some() {
        return Err(at.refuse("proxy-url is not supported; name an address this host reaches itself"));
    }
    let authority = at.material(
        "certificate-authority",
        cluster.certificate_authority.as_ref(),
        cluster.certificate_authority_data.as_ref(),
    )?;
    let authority = authority.ok_or_else(|| {
        at.refuse(
            "no certificate-authority; give what the API server's certificate chains to (no public ones are taken)",
        )
    })?;
    let uri: http::Uri = cluster.server.parse().map_err(|_| not_https(cluster, at))?;
    let host = uri.host().filter(|_| uri.scheme_str() == Some("https")).ok_or_else(|| not_https(cluster, at))?;
    let address = format!("{host}:{}", uri.port_u16().unwrap_or(HTTPS));
    Ok(Access {
        server: format!("https://{address}"),
        base: uri.path().trim_end_matches('/').to_owned(),
        name: cluster.tls_server_name.clone().unwrap_or(host.trim_matches(['[', ']']).to_owned()),
        address,
        tls: tls::client(certificates(&authority)?, identity, HTTP2)?,
        token,
    })
}

fn not_https(cluster: &Cluster, at: &At<'_>) -> SettingsError {
    at.refuse(format!("server `{}` is no https://HOST:PORT", crate::yaml::printable(&cluster.server)))
}

impl Material {
    fn place(&self) -> &Path {
        match self {
            Material::File(path) | Material::Inline(path, _) => path,
        }
    }

    fn refuse(&self, error: MaterialError) -> SettingsError {
        match error {
            MaterialError::Unreadable(error) => unreadable(self.place(), error),
            error => SettingsError::File { path: self.place().to_owned(), reason: error.to_string() },
        }
    }
}

fn certificates(material: &Material) -> Result<Vec<CertificateDer<'static>>, SettingsError> {
    let found = match material {
        Material::File(path) => tls::certificates_of(path),
        Material::Inline(_, bytes) => tls::certificates_in(bytes),
    };
    found.map_err(|error| material.refuse(error))
}

fn private_key(material: &Material) -> Result<PrivateKeyDer<'static>, SettingsError> {
    let key = match material {
        Material::File(path) => tls::key_of(path),
        Material::Inline(_, bytes) => tls::key_in(bytes),
    };
    key.map_err(|error| material.refuse(error))
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
