//! Entries with terms, as the command line makes them: for one host or for all with some labels, for some processes only.

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::audit::Event;
use crate::commands::{CommandError, refuse_unknown, workload};
use crate::labels::{Label, label_map};
use crate::state_dir::StateDir;
use crate::store::grants::{self, LabelEntry, Terms};
use crate::times::unix;

/// Who may hold an identity.
#[derive(Debug, Clone, Copy)]
pub enum Parent<'a> {
    Host(&'a str),
    /// All hosts that have all of these.
    Labels(&'a [Label]),
}

pub struct EntryRequest<'a> {
    pub parent: Parent<'a>,
    pub identity: &'a str,
    pub selectors: &'a [String],
    pub ttl: Option<Duration>,
}

/// Makes an entry, or changes its terms.
pub fn put_entry(dir: &Path, asked: &EntryRequest<'_>, now: SystemTime) -> Result<(), CommandError> {
    put_entry_in(&StateDir::open(dir)?, asked, now, None)
}

pub(crate) fn put_entry_in(
    state: &StateDir,
    asked: &EntryRequest<'_>,
    now: SystemTime,
    by: Option<String>,
) -> Result<(), CommandError> {
    let id = workload(&state.trust_domain, asked.identity)?;
    asked.selectors.iter().try_for_each(|selector| check_selector(selector))?;
    if asked.selectors.len() > 1 {
        return Err(CommandError::Selectors);
    }
    let terms = Terms { selectors: asked.selectors.to_vec(), ttl_s: asked.ttl.map(|ttl| ttl.as_secs().max(2)) };
    let mut event = Event { event: "entry_add", result: "ok", identity: Some(id.to_string()), by, ..Event::default() };
    let mut detail = String::new();
    if let Parent::Labels(labels) = asked.parent {
        _ = write!(detail, "hosts with {}; ", grants::labels_text(&label_map(labels)?));
    }
    _ = write!(detail, "selectors: {}", terms.selectors.join(" "));
    event.detail = Some(detail);
    state.change(now, |records, told| -> Result<(), CommandError> {
        let (terms, mut event) = (terms.clone(), event.clone());
        match asked.parent {
            Parent::Host(host) => {
                refuse_unknown(records, host, unix(now))?;
                grants::put_entry(records, host, id.as_str(), terms, unix(now))?;
                event.host = Some(host.to_owned());
            }
            Parent::Labels(labels) => {
                let (labels, spiffe_id) = (label_map(labels)?, id.to_string());
                grants::put_label_entry(records, &LabelEntry { labels, spiffe_id, created_at: unix(now), terms })?;
            }
        }
        told.push(event);
        Ok(())
    })
}

/// Takes an identity away from all hosts with exactly these labels named.
pub fn remove_label_entry(dir: &Path, labels: &[Label], identity: &str, now: SystemTime) -> Result<(), CommandError> {
    remove_label_entry_in(&StateDir::open(dir)?, labels, identity, now, None)
}

pub(crate) fn remove_label_entry_in(
    state: &StateDir,
    labels: &[Label],
    identity: &str,
    now: SystemTime,
    by: Option<String>,
) -> Result<(), CommandError> {
    let id = workload(&state.trust_domain, identity)?;
    let labels = label_map(labels)?;
    let parent = grants::labels_text(&labels);
    state.change(now, |records, told| -> Result<(), CommandError> {
        if !grants::delete_label_entry(records, &labels, id.as_str())? {
            return Err(CommandError::NoEntry { host: parent.clone(), identity: id.short().to_owned() });
        }
        let (identity, detail) = (Some(id.to_string()), Some(format!("hosts with {parent}")));
        let by = by.clone();
        told.push(Event { event: "entry_remove", result: "ok", identity, detail, by, ..Event::default() });
        Ok(())
    })
}

/// What hosts can attest: a unit by its name, a user by its number.
fn check_selector(text: &str) -> Result<(), CommandError> {
    let is_good = match text.split_once(':') {
        Some(("systemd", rest)) => rest.strip_prefix("unit:").is_some_and(is_unit),
        Some(("unix", rest)) => rest.strip_prefix("uid:").is_some_and(|uid| uid.parse::<u32>().is_ok()),
        _ => false,
    };
    if is_good { Ok(()) } else { Err(CommandError::Selector(text.escape_debug().to_string())) }
}

fn is_unit(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    name.contains('.') && name.len() < 256 && !name.ends_with(".slice") && name.bytes().all(is_allowed)
}
