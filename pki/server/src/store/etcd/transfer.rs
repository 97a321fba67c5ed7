//! All records at once, from one engine to another.

use meshd_etcd::api::TxnRequest;
use meshd_etcd::{Client, Prefix, absent, delete, none_changed_since, put};

use super::cache::{LEADER, LIVE, RECORDS, Snapshot, TIP};
use super::config::EtcdConfig;
use crate::store::DbError;

/// Written last: an upload that was cut short is no PKI.
const LAST: &str = "trust";
const BATCH: usize = 50;
/// etcd takes requests of 1.5 MiB; one record may have some 400 KB.
const BATCH_BYTES: usize = 512 * 1024;

pub(crate) type Record = (String, Vec<u8>);

/// A connection for moving records while nobody serves them.
pub(crate) struct Transfer {
    runtime: tokio::runtime::Runtime,
    client: Client,
    base: String,
}

impl Transfer {
    pub(crate) fn new(config: &EtcdConfig) -> Result<Transfer, DbError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| DbError::Etcd(error.to_string()))?;
        Ok(Transfer { runtime, client: Client::new(config.settings())?, base: config.base()? })
    }

    fn snapshot(&self) -> Result<Snapshot, DbError> {
        let listed = self.runtime.block_on(self.client.list(&Prefix::new(self.base.clone())))?;
        Ok(Snapshot::from_list(&self.base, listed))
    }

    /// Replicas that run now.
    pub(crate) fn live(&self) -> Result<Vec<String>, DbError> {
        Ok(self.snapshot()?.below(LIVE).map(|(key, _)| key[LIVE.len()..].to_owned()).collect())
    }

    pub(crate) fn records(&self) -> Result<Vec<Record>, DbError> {
        self.records_at().map(|(records, _)| records)
    }

    /// With the revision at which they are so.
    pub(crate) fn records_at(&self) -> Result<(Vec<Record>, i64), DbError> {
        let snapshot = self.snapshot()?;
        let records = snapshot.below(RECORDS);
        let records = records.map(|(key, value)| (key[RECORDS.len()..].to_owned(), value.bytes.clone())).collect();
        Ok((records, snapshot.revision))
    }

    /// Makes it no PKI any more, unless a server has started or somebody changed something since this revision. Whether
    /// it did.
    pub(crate) fn close(&self, revision: i64) -> Result<bool, DbError> {
        let below = |prefix: &str| Prefix::new(format!("{}{prefix}", self.base));
        let mut compare: Vec<_> = [TIP, LIVE].map(|prefix| none_changed_since(&below(prefix), revision)).to_vec();
        compare.push(absent(format!("{}{LEADER}", self.base)));
        let success = vec![delete(format!("{}{RECORDS}{LAST}", self.base))];
        let request = TxnRequest { compare, success, failure: Vec::new() };
        Ok(self.runtime.block_on(self.client.txn(request))?.succeeded)
    }

    /// Refuses where there is a PKI already. What an upload that was cut short left is overwritten.
    pub(crate) fn upload(&self, records: &[(String, Vec<u8>)]) -> Result<(), DbError> {
        let trust = format!("{}{RECORDS}{LAST}", self.base);
        let (last, rest): (Vec<_>, Vec<_>) = records.iter().partition(|(key, _)| key == LAST);
        for batch in batches(&rest).into_iter().chain([last.as_slice()]) {
            let puts = batch.iter().map(|(key, value)| put(format!("{}{RECORDS}{key}", self.base), value.clone(), 0));
            let request =
                TxnRequest { compare: vec![absent(trust.clone())], success: puts.collect(), failure: Vec::new() };
            if !self.runtime.block_on(self.client.txn(request))?.succeeded {
                return Err(DbError::Etcd(format!("{trust} is there already; another PKI uses it")));
            }
        }
        Ok(())
    }

    /// Removes every record, the one first without which the rest is no PKI.
    pub(crate) fn clear(&self) -> Result<(), DbError> {
        let remove = |operation| TxnRequest { success: vec![operation], ..TxnRequest::default() };
        let trust = remove(delete(format!("{}{RECORDS}{LAST}", self.base)));
        self.runtime.block_on(self.client.txn(trust))?;
        let prefix = Prefix::new(self.base.clone());
        let range = meshd_etcd::api::DeleteRangeRequest { key: prefix.key, range_end: prefix.end };
        let all = meshd_etcd::api::request_op::Request::RequestDeleteRange(range);
        let all = meshd_etcd::api::RequestOp { request: Some(all) };
        self.runtime.block_on(self.client.txn(remove(all)))?;
        Ok(())
    }
}

/// At most `BATCH` records, and as many bytes as `BATCH_BYTES` unless one record alone has more.
fn batches<'a>(mut rest: &'a [&'a Record]) -> Vec<&'a [&'a Record]> {
    let mut batches = Vec::new();
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |(key, value): &Record| {
            bytes += key.len() + value.len();
            bytes <= BATCH_BYTES
        };
        let count = rest.iter().copied().take(BATCH).map(fits).take_while(|fits| *fits).count().max(1);
        let (batch, others) = rest.split_at(count);
        batches.push(batch);
        rest = others;
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(values: &[usize]) -> Vec<usize> {
        let records: Vec<Record> = values.iter().map(|bytes| ("k".to_owned(), vec![0; *bytes])).collect();
        let records: Vec<&Record> = records.iter().collect();
        batches(&records).iter().map(|batch| batch.len()).collect()
    }

    #[test]
    fn what_is_sent_at_once_is_below_what_etcd_takes_in_records_and_in_bytes() {
        assert_eq!(sizes(&[]), Vec::<usize>::new());
        assert_eq!(sizes(&[10; 120]), [50, 50, 20]);
        assert_eq!(sizes(&[54_000; 40]), [9, 9, 9, 9, 4]);
        assert_eq!(sizes(&[10, 600_000, 10, 10]), [1, 1, 2]);
    }
}
