//! The parts of transactions, by what they mean.

use crate::api::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::api::request_op::Request;
use crate::api::{Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp};

/// All keys that start so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefix {
    pub key: Vec<u8>,
    pub end: Vec<u8>,
}

impl Prefix {
    /// `key` must not be empty or end in the byte 255: text never does.
    pub fn new(key: impl Into<Vec<u8>>) -> Prefix {
        let key = key.into();
        let mut end = key.clone();
        if let Some(last) = end.last_mut() {
            *last = last.saturating_add(1);
        }
        Prefix { key, end }
    }
}

pub fn put(key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>, lease: i64) -> RequestOp {
    RequestOp { request: Some(Request::RequestPut(PutRequest { key: key.into(), value: value.into(), lease })) }
}

pub fn delete(key: impl Into<Vec<u8>>) -> RequestOp {
    let range = DeleteRangeRequest { key: key.into(), range_end: Vec::new() };
    RequestOp { request: Some(Request::RequestDeleteRange(range)) }
}

pub fn get(key: impl Into<Vec<u8>>) -> RequestOp {
    let range = RangeRequest { key: key.into(), ..RangeRequest::default() };
    RequestOp { request: Some(Request::RequestRange(range)) }
}

/// The key is as it was at this revision of its own.
pub fn unchanged(key: impl Into<Vec<u8>>, mod_revision: i64) -> Compare {
    compare(key.into(), CompareTarget::Mod, CompareResult::Equal, TargetUnion::ModRevision(mod_revision))
}

pub fn absent(key: impl Into<Vec<u8>>) -> Compare {
    unchanged(key, 0)
}

/// It is still the key that was created then, whatever happened to its value.
pub fn created_at(key: impl Into<Vec<u8>>, revision: i64) -> Compare {
    compare(key.into(), CompareTarget::Create, CompareResult::Equal, TargetUnion::CreateRevision(revision))
}

/// No key below the prefix was written after this revision. Deleted keys do not show.
pub fn none_changed_since(prefix: &Prefix, revision: i64) -> Compare {
    let target = TargetUnion::ModRevision(revision + 1);
    let compare = compare(prefix.key.clone(), CompareTarget::Mod, CompareResult::Less, target);
    Compare { range_end: prefix.end.clone(), ..compare }
}

fn compare(key: Vec<u8>, target: CompareTarget, result: CompareResult, union: TargetUnion) -> Compare {
    Compare { result: result.into(), target: target.into(), key, target_union: Some(union), range_end: Vec::new() }
}
