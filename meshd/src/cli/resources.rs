//! `meshd get`, `apply` and `delete`: documents in the backends that meshd.toml names. The daemon takes no part: who may
//! do what is up to the backend and the credentials shown to it.

mod shown;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use meshd::config::Config;
use meshd::durable;
use meshd_discovery::SourceConfig;
use meshd_discovery::write::{self, Applying, By, Kind, Manifest, Outcome, ResourceName, Store, StoreError, Stored};
use meshd_identity::TrustDomain;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{on_runtime, trust_domain, validate};

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shown {
    #[default]
    Table,
    Yaml,
    Json,
}

const GET_HELP: &str = "\
Without --source all sources of meshd.toml are asked. `-o yaml` is what `apply` takes, with the version it was read at \
(metadata.resourceVersion): applied again after somebody else changed the document, it is refused.

Examples:
  meshd get meshservices -n shop
  meshd get msvc payments.shop --source etcd -o yaml > payments.yaml

Exit codes: 0; 1 where there is no such document, or a source did not answer; 2 for a wrong command line.";

const APPLY_HELP: &str = "\
Documents are read as hosts read them; if hosts would refuse one, with its file, line and field, none is written. Each is \
written by itself, over the version that was there when it was looked at: what somebody else changed meanwhile is a \
conflict, and says by whom. --source may be left out where one source has authority for the namespace.

Examples:
  meshd apply -f payments.yaml --dry-run
  meshd apply -f resources/ --source consul --token-file /root/consul.token
  meshd get msvc payments.shop -o yaml | sed 's/weight: 100/weight: 50/' | meshd apply -f -

Exit codes: 0 if all are written, or were so already; 1 if any is not; 2 for a wrong command line.";

const DELETE_HELP: &str = "\
Hosts believe a deletion at once as long as more than half of what the source says stays; otherwise after a minute, or with \
`meshd endpoints --accept SOURCE` on the host.

Examples:
  meshd delete msvc payments -n shop
  meshd delete -f payments.yaml --source kubernetes --kubeconfig ~/.kube/config

Exit codes: 0; 1 where it was not there, or not deleted; 2 for a wrong command line.";

#[derive(clap::Args)]
#[command(after_help = GET_HELP)]
pub(crate) struct GetArgs {
    /// As kubectl knows it: MeshService, meshservices, msvc; httproute, servicepolicy, and so on.
    kind: String,
    /// `payments.shop`, or `payments` with --namespace. All of them if left out.
    name: Option<String>,
    /// Only those of this namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Of all namespaces, which is so without --namespace, too.
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
    #[command(flatten)]
    access: Access,
    #[arg(short, long, value_enum, default_value_t)]
    output: Shown,
}

#[derive(clap::Args)]
#[command(after_help = APPLY_HELP)]
pub(crate) struct ApplyArgs {
    /// A file of YAML documents, a directory of such, or - for what comes in.
    #[arg(short, long = "filename", value_name = "FILE", required = true, num_args = 1..)]
    file: Vec<PathBuf>,
    #[command(flatten)]
    access: Access,
    #[command(flatten)]
    how: How,
    /// Of the mesh the documents are for, where this host has not joined it.
    #[arg(long, value_name = "NAME")]
    trust_domain: Option<TrustDomain>,
}

#[derive(clap::Args)]
#[command(after_help = DELETE_HELP)]
pub(crate) struct DeleteArgs {
    /// As kubectl knows it: MeshService, meshservices, msvc; httproute, servicepolicy, and so on.
    #[arg(required_unless_present = "file")]
    kind: Option<String>,
    /// `payments.shop`, or `payments` with --namespace.
    #[arg(required_unless_present = "file")]
    name: Option<String>,
    /// That the name is of.
    #[arg(short, long)]
    namespace: Option<String>,
    /// What these documents name, instead of kind and name.
    #[arg(short, long = "filename", value_name = "FILE", num_args = 1.., conflicts_with_all = ["kind", "name", "namespace"])]
    file: Vec<PathBuf>,
    #[command(flatten)]
    access: Access,
    #[command(flatten)]
    how: How,
    /// Of the mesh the documents are for, where this host has not joined it.
    #[arg(long, value_name = "NAME")]
    trust_domain: Option<TrustDomain>,
}

#[derive(clap::Args)]
struct How {
    /// Check everything, ask the backend, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Also over what somebody else has changed since, or owns.
    #[arg(long)]
    force: bool,
}

/// Which backend, and as whom, where the daemon's own credentials only read.
#[derive(clap::Args)]
struct Access {
    /// The `name` of a [[source]] in meshd.toml.
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// What the backend's certificate chains to (etcd, Consul).
    #[arg(long, value_name = "FILE", help_heading = "Credentials")]
    ca: Option<PathBuf>,
    /// A client certificate (etcd, Consul).
    #[arg(long, value_name = "FILE", requires = "key", help_heading = "Credentials")]
    cert: Option<PathBuf>,
    /// Its private key.
    #[arg(long, value_name = "FILE", requires = "cert", help_heading = "Credentials")]
    key: Option<PathBuf>,
    /// The SecretID of a token, alone in a file (Consul).
    #[arg(long, value_name = "FILE", help_heading = "Credentials")]
    token_file: Option<PathBuf>,
    /// A user of etcd.
    #[arg(long, value_name = "NAME", requires = "password_file", help_heading = "Credentials")]
    username: Option<String>,
    /// The password of that user, alone in a file.
    #[arg(long, value_name = "FILE", requires = "username", help_heading = "Credentials")]
    password_file: Option<PathBuf>,
    /// Where a cluster is, and who we are there (Kubernetes).
    #[arg(long, value_name = "FILE", help_heading = "Credentials")]
    kubeconfig: Option<PathBuf>,
    /// Which context of it.
    #[arg(long, value_name = "NAME", help_heading = "Credentials")]
    context: Option<String>,
}

impl Access {
    fn shows_credentials(&self) -> bool {
        let files = [&self.ca, &self.cert, &self.key, &self.token_file, &self.password_file, &self.kubeconfig];
        files.iter().any(|given| given.is_some()) || self.username.is_some() || self.context.is_some()
    }

    /// The source with what is shown here instead of the daemon's.
    fn of(&self, source: &SourceConfig) -> SourceConfig {
        let mut shown = source.clone();
        let over = |given: &Option<PathBuf>, own: &mut Option<PathBuf>| {
            if given.is_some() {
                own.clone_from(given);
            }
        };
        over(&self.ca, &mut shown.ca);
        over(&self.cert, &mut shown.cert);
        over(&self.key, &mut shown.key);
        over(&self.token_file, &mut shown.token_file);
        over(&self.password_file, &mut shown.password_file);
        if self.username.is_some() {
            shown.user.clone_from(&self.username);
            // A user's certificate would be another user.
            (shown.cert, shown.key) = (self.cert.clone(), self.key.clone());
        } else if self.cert.is_some() {
            (shown.user, shown.password_file) = (None, None);
        }
        if self.kubeconfig.is_some() || self.context.is_some() {
            over(&self.kubeconfig, &mut shown.kubeconfig);
            shown.context.clone_from(&self.context);
        }
        shown
    }
}

/// The sources of meshd.toml, of which those that are used are opened, once.
struct Backends<'a> {
    sources: &'a [SourceConfig],
    access: &'a Access,
    open: BTreeMap<String, Box<dyn Store>>,
}

impl<'a> Backends<'a> {
    fn of(config: &'a Config, access: &'a Access) -> Backends<'a> {
        Backends { sources: &config.sources, access, open: BTreeMap::new() }
    }

    fn named(&self, name: &str) -> anyhow::Result<&'a SourceConfig> {
        let found = self.sources.iter().find(|source| source.name() == name);
        found.with_context(|| format!("meshd.toml has no [[source]] `{name}`; it has {}", names(self.sources)))
    }

    /// All that may be asked.
    fn readable(&self) -> anyhow::Result<Vec<&'a SourceConfig>> {
        if let Some(name) = &self.access.source {
            return Ok(vec![self.named(name)?]);
        }
        ensure!(
            self.sources.len() == 1 || !self.access.shows_credentials(),
            "credentials of which source? say --source with one of {}",
            names(self.sources)
        );
        Ok(self.sources.iter().collect())
    }

    /// The one that documents of a kind and namespace belong in.
    fn writable(&self, kind: Kind, namespace: &str) -> anyhow::Result<&'a SourceConfig> {
        let believes = |source: &&SourceConfig| source.is_believed_about(kind, namespace);
        let believed: Vec<&SourceConfig> = self.sources.iter().filter(believes).collect();
        let what = format!("{} of namespace `{namespace}`", kind.plural());
        let chosen = match (&self.access.source, believed.as_slice(), self.sources) {
            (Some(name), ..) => self.named(name)?,
            (None, [only], _) => *only,
            (None, [], [only]) => only,
            (None, [], several) => {
                bail!("no source is believed about {what} here; say --source with one of {}", names(several))
            }
            (None, several, _) => {
                let names = names(several.iter().copied());
                bail!("several sources are believed about {what}; say --source with one of {names}")
            }
        };
        if !chosen.is_believed_about(kind, namespace) {
            let key = match kind {
                Kind::MeshService => "authority",
                kind if kind.is_route() => "provides.routes",
                _ => "provides.policies",
            };
            eprintln!("meshd: this host does not believe source {} about {what}: see its `{key}`", chosen.name());
        }
        Ok(chosen)
    }

    fn open(&mut self, source: &SourceConfig) -> anyhow::Result<&dyn Store> {
        let name = source.name().to_owned();
        if !self.open.contains_key(&name) {
            // Nothing is checked by it here; documents were, before.
            let nowhere: TrustDomain = "nowhere.invalid".parse()?;
            let store = self.access.of(source).store(&nowhere, |path, text| durable::replace(path, text))?;
            self.open.insert(name.clone(), store);
        }
        self.open.get(&name).map(|store| &**store).context("a source that was just opened")
    }
}

fn names<'s>(sources: impl IntoIterator<Item = &'s SourceConfig>) -> String {
    sources.into_iter().map(|source| format!("`{}`", source.name())).collect::<Vec<_>>().join(", ")
}

/// A document, and the source that has it.
struct Found {
    source: String,
    stored: Stored,
}

pub(crate) fn get(config: &Config, args: &GetArgs) -> anyhow::Result<ExitCode> {
    on_runtime(get_now(config, args))
}

async fn get_now(config: &Config, args: &GetArgs) -> anyhow::Result<ExitCode> {
    let kind = write::kind_named(&args.kind).map_err(anyhow::Error::msg)?;
    let one = args.name.as_deref().map(|name| ResourceName::new(kind, name, args.namespace.as_deref()));
    let one = one.transpose().map_err(anyhow::Error::msg)?;
    let mut backends = Backends::of(config, &args.access);
    let (mut found, mut complete) = (Vec::new(), true);
    let sources = backends.readable()?;
    let several = sources.len() > 1;
    for source in sources {
        let store = backends.open(source)?;
        let read = match &one {
            Some(one) => store.get(one).await.map(|stored| stored.into_iter().collect()),
            None => store.list(kind, args.namespace.as_deref()).await,
        };
        match read {
            Ok(all) => found.extend(all.into_iter().map(|stored| Found { source: source.name().to_owned(), stored })),
            // What does not know the kind has none.
            Err(StoreError::Absent(_)) if several => {}
            Err(error) => {
                complete = false;
                eprintln!("meshd: {error}");
            }
        }
    }
    if let Some(one) = &one
        && found.is_empty()
        && complete
    {
        bail!("there is no {one}; `meshd get {}` lists what there is", kind.plural());
    }
    print!("{}", shown::show(&found, args.output)?);
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub(crate) fn apply(config: &Config, args: &ApplyArgs) -> anyhow::Result<ExitCode> {
    on_runtime(apply_now(config, args))
}

async fn apply_now(config: &Config, args: &ApplyArgs) -> anyhow::Result<ExitCode> {
    let manifests = manifests(config, &args.file, args.trust_domain.as_ref())?;
    let mut backends = Backends::of(config, &args.access);
    // Nothing is written before it is known where everything goes.
    let planned = manifests
        .iter()
        .map(|manifest| Ok((manifest, backends.writable(manifest.resource.kind, &manifest.resource.namespace)?)));
    let planned = planned.collect::<anyhow::Result<Vec<_>>>()?;
    let how = args.how.applying()?;
    let mut all_well = true;
    for (manifest, source) in planned {
        let store = backends.open(source)?;
        match write::apply(store, manifest, &how).await {
            Ok(outcome) => println!("{}", told(manifest, &outcome, source.name(), how.dry_run)),
            Err(error) => {
                all_well = false;
                eprintln!("meshd: {}: {error}", manifest.origin);
            }
        }
    }
    Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn told(manifest: &Manifest, outcome: &Outcome, source: &str, dry_run: bool) -> String {
    let done = match outcome {
        Outcome::Created => "created",
        Outcome::Changed { .. } => "changed",
        Outcome::Unchanged => "unchanged",
    };
    let replaced = match outcome {
        Outcome::Changed { replaced: Some(by) } => format!(", over what {by} wrote"),
        _ => String::new(),
    };
    let dry_run = if dry_run { " (dry run: nothing was written)" } else { "" };
    format!("{} {done} in {source}{replaced}{dry_run}", manifest.resource)
}

pub(crate) fn delete(config: &Config, args: &DeleteArgs) -> anyhow::Result<ExitCode> {
    on_runtime(delete_now(config, args))
}

async fn delete_now(config: &Config, args: &DeleteArgs) -> anyhow::Result<ExitCode> {
    let doomed: Vec<(ResourceName, Option<String>)> = match (&args.kind, &args.name) {
        (Some(kind), Some(name)) => {
            let kind = write::kind_named(kind).map_err(anyhow::Error::msg)?;
            let resource = ResourceName::new(kind, name, args.namespace.as_deref());
            vec![(resource.map_err(anyhow::Error::msg)?, None)]
        }
        _ => {
            let named = manifests(config, &args.file, args.trust_domain.as_ref())?.into_iter();
            named.map(|manifest| (manifest.resource, manifest.based_on)).collect()
        }
    };
    let mut backends = Backends::of(config, &args.access);
    let planned =
        doomed.iter().map(|(name, version)| Ok((name, version, backends.writable(name.kind, &name.namespace)?)));
    let planned = planned.collect::<anyhow::Result<Vec<_>>>()?;
    let how = args.how.applying()?;
    let mut all_well = true;
    for (resource, version, source) in planned {
        let store = backends.open(source)?;
        match write::delete(store, resource, version.as_deref(), &how).await {
            Ok(was) if how.dry_run => println!("{resource} would be deleted from {} ({})", source.name(), was.origin),
            Ok(was) => println!("{resource} deleted from {} ({})", source.name(), was.origin),
            Err(error) => {
                all_well = false;
                eprintln!("meshd: {error}");
            }
        }
    }
    Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All documents of all files; none if hosts would refuse any.
fn manifests(config: &Config, files: &[PathBuf], mesh: Option<&TrustDomain>) -> anyhow::Result<Vec<Manifest>> {
    let trust_domain = match mesh {
        Some(named) => named.clone(),
        None => trust_domain(config).context(
            "documents are checked for the mesh this host is in, which it does not tell; say --trust-domain NAME",
        )?,
    };
    let (mut manifests, mut problems) = (Vec::new(), Vec::new());
    for path in files {
        for text in validate::read(path)? {
            match write::read(&text.file, &text.text, &trust_domain) {
                Ok(found) => manifests.extend(found),
                Err(found) => problems.extend(found),
            }
        }
    }
    if !problems.is_empty() {
        bail!("nothing was changed, because hosts would refuse this:\n{}", problems.join("\n"));
    }
    Ok(manifests)
}

impl How {
    fn applying(&self) -> anyhow::Result<Applying> {
        Ok(Applying { by: by()?, force: self.force, dry_run: self.dry_run })
    }
}

/// Who asks for it, as far as this host knows, and now.
fn by() -> anyhow::Result<By> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let user = ["SUDO_USER", "USER", "LOGNAME"].into_iter().find_map(variable);
    let uid = nix::unistd::getuid();
    let known = || nix::unistd::User::from_uid(uid).ok().flatten().map(|user| user.name);
    let user = user.or_else(known).unwrap_or_else(|| format!("uid {uid}"));
    let host = nix::unistd::gethostname()?;
    let now = OffsetDateTime::now_utc().replace_nanosecond(0)?.format(&Rfc3339)?;
    Ok(By::new(&format!("{user}@{} {now}", host.to_string_lossy())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> SourceConfig {
        toml::from_str(text).unwrap()
    }

    fn access(source: Option<&str>) -> Access {
        Access {
            source: source.map(str::to_owned),
            ca: None,
            cert: None,
            key: None,
            token_file: None,
            username: None,
            password_file: None,
            kubeconfig: None,
            context: None,
        }
    }

    fn chosen(sources: &[SourceConfig], named: Option<&str>) -> Result<String, String> {
        let access = access(named);
        let backends = Backends { sources, access: &access, open: BTreeMap::new() };
        backends
            .writable(Kind::MeshService, "shop")
            .map(|source| source.name().to_owned())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_document_goes_where_it_is_believed_and_somebody_says_where_if_that_is_not_one_place() {
        let files = source("kind = \"files\"\nauthority = [\"shop\"]");
        let consul = source("kind = \"consul\"\nauthority = [\"*\"]");
        let silent = source("kind = \"kubernetes\"");
        assert_eq!(chosen(&[silent.clone(), files.clone()], None).unwrap(), "files");
        assert_eq!(chosen(std::slice::from_ref(&silent), None).unwrap(), "kubernetes");
        let both = [files, consul, silent];
        assert!(chosen(&both, None).unwrap_err().ends_with("say --source with one of `files`, `consul`"));
        assert_eq!(chosen(&both, Some("consul")).unwrap(), "consul");
        assert!(chosen(&both, Some("etcd")).unwrap_err().ends_with("it has `files`, `consul`, `kubernetes`"));
        assert!(chosen(&both[2..], Some("kubernetes")).is_ok());
    }

    #[test]
    fn credentials_shown_here_take_the_place_of_the_daemons() {
        let etcd = source("kind = \"etcd\"\nendpoints = [\"https://a:1\"]\nca = \"ca\"\ncert = \"c\"\nkey = \"k\"");
        let mut shown = access(None);
        (shown.username, shown.password_file) = (Some("admin".to_owned()), Some("password".into()));
        let with = shown.of(&etcd);
        assert_eq!((with.user.as_deref(), with.cert, with.ca), (Some("admin"), None, Some("ca".into())));
        let kubernetes = source("kind = \"kubernetes\"\nkubeconfig = \"/etc/a\"\ncontext = \"prod\"");
        let mut shown = access(None);
        shown.kubeconfig = Some("/root/.kube/config".into());
        assert_eq!(shown.of(&kubernetes).context, None, "a context of another file");
        let backends = [etcd, kubernetes];
        let several = Backends { sources: &backends, access: &shown, open: BTreeMap::new() };
        assert!(several.readable().unwrap_err().to_string().contains("credentials of which source"));
    }
}
