//! `meshd validate`: documents looked at offline, as the daemon would.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, ensure};
use meshd_discovery::resources::{Finding, Severity, Text, validate};
use meshd_identity::TrustDomain;
use serde_json::json;

use super::Output;

/// A file is read in one piece by the daemon, too, and no larger.
const MOST_BYTES: u64 = 8 * 1024 * 1024;

#[derive(clap::Args)]
pub(crate) struct Validate {
    /// Files, directories (their *.yaml and *.yml), or `-` for what is piped in.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Exit code 1 with warnings, too.
    #[arg(long)]
    strict: bool,
    /// Whose short identities (`ns/shop/sa/web`) these are. Makes no difference to what is valid.
    #[arg(long, default_value = "example.org", value_name = "NAME")]
    trust_domain: TrustDomain,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

pub(crate) fn run(args: &Validate) -> anyhow::Result<ExitCode> {
    let mut texts = Vec::new();
    for path in &args.files {
        texts.extend(read(path)?);
    }
    let (findings, documents) = validate(&texts, &args.trust_domain);
    let count = |severity| findings.iter().filter(|found: &&Finding| found.severity == severity).count();
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
    match args.output {
        Output::Table => {
            findings.iter().for_each(|found| println!("{found}"));
            println!("{documents} documents: {errors} errors, {warnings} warnings");
        }
        Output::Json => {
            let all = json!({ "documents": documents, "errors": errors, "warnings": warnings, "findings": findings });
            println!("{}", serde_json::to_string_pretty(&all)?);
        }
    }
    let bad = errors > 0 || (args.strict && warnings > 0);
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<Text>> {
    if path == Path::new("-") {
        return Ok(vec![text("standard input", std::io::stdin())?]);
    }
    if !path.is_dir() {
        return Ok(vec![read_file(path)?]);
    }
    let entries = std::fs::read_dir(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let entries = entries.with_context(|| format!("cannot read directory {}", path.display()))?;
    let mut files: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).filter(|file| is_meant(file)).collect();
    files.sort();
    ensure!(!files.is_empty(), "{} holds no *.yaml or *.yml; name the directory with the documents", path.display());
    files.iter().map(|file| read_file(file)).collect()
}

/// As the files source has it.
fn is_meant(file: &Path) -> bool {
    let hidden = file.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden && file.extension().is_some_and(|extension| extension == "yaml" || extension == "yml")
}

fn read_file(path: &Path) -> anyhow::Result<Text> {
    let file = std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    text(&path.display().to_string(), file)
}

fn text(name: &str, from: impl Read) -> anyhow::Result<Text> {
    let mut bytes = Vec::new();
    from.take(MOST_BYTES + 1).read_to_end(&mut bytes).with_context(|| format!("cannot read {name}"))?;
    ensure!(bytes.len() as u64 <= MOST_BYTES, "{name} has more than {MOST_BYTES} bytes; split it");
    let text = String::from_utf8(bytes).with_context(|| format!("{name} is not UTF-8; save it as UTF-8"))?;
    Ok(Text { file: name.to_owned(), text })
}
