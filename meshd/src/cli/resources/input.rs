//! What documents are read from: files, directories, standard input.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

/// Standard input, as kubectl has it.
const STDIN: &str = "-";

pub(super) struct Text {
    /// For messages.
    pub(super) origin: String,
    pub(super) text: String,
}

pub(super) fn texts(files: &[PathBuf]) -> anyhow::Result<Vec<Text>> {
    let mut texts = Vec::new();
    for path in files {
        if path.as_os_str() == STDIN {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("standard input")?;
            texts.push(Text { origin: "stdin".to_owned(), text });
        } else if path.is_dir() {
            for file in documents_in(path)? {
                texts.push(read(&file)?);
            }
        } else {
            texts.push(read(path)?);
        }
    }
    Ok(texts)
}

fn read(path: &Path) -> anyhow::Result<Text> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Text { origin: path.display().to_string(), text })
}

/// In the order of their names; hidden ones are editors' and version control's.
fn documents_in(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let cannot = || format!("cannot read directory {}", directory.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(cannot)? {
        let path = entry.with_context(cannot)?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|end| end == "yaml" || end == "yml" || end == "json") {
            found.push(path);
        }
    }
    found.sort();
    ensure!(!found.is_empty(), "{} has no *.yaml, *.yml or *.json file", directory.display());
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_its_documents_in_order() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["b.yaml", "a.yml", "c.json", ".hidden.yaml", "notes.txt"] {
            fs::write(directory.path().join(name), name).unwrap();
        }
        let read = texts(&[directory.path().to_owned()]).unwrap();
        assert_eq!(read.iter().map(|text| &*text.text).collect::<Vec<_>>(), ["a.yml", "b.yaml", "c.json"]);
        let empty = tempfile::tempdir().unwrap();
        assert!(texts(&[empty.path().to_owned()]).is_err() && texts(&["/no/such".into()]).is_err());
    }
}
