//! The one writer: takes every transaction that waits, applies them one after the other in one engine transaction,
//! commits once (one sync), publishes, answers. So an answer means durable, and many writers share a sync.
//!
//! It also deletes what has outlived its time to live and forgets old history, in small portions between groups.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use redb::{Database, ReadableTable, Table, WriteTransaction};
use tokio::sync::{mpsc, oneshot};

use super::embedded::{
    EXPIRY, LOG, META, META_COMPACTED, META_REVISION, VERSIONS, Version, decode_log, encode_log, newest, tried,
    version_key,
};
use super::hub::Hub;
use super::{Event, Op, StoreError, Txn, TxnOutcome};
use crate::histogram::Histogram;

/// Most transactions that share one sync: bounds the latency of the first.
const GROUP: usize = 512;
/// History kept: five minutes, and never more than this many revisions.
const KEEP: Duration = Duration::from_secs(300);
const KEEP_REVISIONS: u64 = 200_000;
/// At least this much is kept, however old: a quiet store does not send its watchers to list again.
const KEEP_AT_LEAST: u64 = 10_000;
/// How often the writer looks at clocks.
const HOUSEKEEPING: Duration = Duration::from_secs(5);
/// Log records forgotten per portion.
const PRUNE_CHUNK: usize = 2_000;
/// Keys expired per portion.
const EXPIRE_CHUNK: usize = 1_000;

/// Upper bounds of a commit's duration, in seconds: from a sync that a cache takes to a disk that is in trouble.
const COMMIT_BUCKETS_S: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// How long commits took.
#[derive(Debug)]
pub(super) struct Commits(Mutex<Histogram>);

impl Commits {
    /// None yet.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Commits(Mutex::new(Histogram::new(COMMIT_BUCKETS_S))))
    }

    /// As of now.
    pub(super) fn histogram(&self) -> Histogram {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn observe(&self, took: Duration) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).observe(took);
    }
}

/// What the writer is asked.
pub(super) enum Request {
    /// A transaction.
    Txn(Txn, oneshot::Sender<Result<TxnOutcome, StoreError>>),
    /// Forget history before a revision.
    Compact(u64, oneshot::Sender<Result<(), StoreError>>),
}

type Answer = (oneshot::Sender<Result<TxnOutcome, StoreError>>, TxnOutcome);

/// The writer's own state.
pub(super) struct Writer {
    db: Arc<Database>,
    hub: Arc<Hub>,
    commits: Arc<Commits>,
    compacted: u64,
    /// There may be log records at or before `compacted`.
    pruning: bool,
    /// (when, revision) samples, to know which revision was current [`KEEP`] ago.
    samples: VecDeque<(Instant, u64)>,
}

impl Writer {
    /// A writer over an opened database.
    pub(super) fn new(db: Arc<Database>, hub: Arc<Hub>, commits: Arc<Commits>, compacted: u64) -> Self {
        Writer { db, hub, commits, compacted, pruning: compacted > 0, samples: VecDeque::new() }
    }

    /// Works until every sender is gone.
    pub(super) fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = runtime.expect("a timer needs no resource that can be missing");
        let mut due = Instant::now() + HOUSEKEEPING;
        loop {
            let wait = due.saturating_duration_since(Instant::now());
            let mut group = Vec::new();
            let received =
                runtime.block_on(async { tokio::time::timeout(wait, requests.recv_many(&mut group, GROUP)).await });
            match received {
                Ok(0) => return,
                Ok(_) => {
                    if let Err(error) = self.handle(group) {
                        // The engine answers nothing more after a failed write; the next start reads what was synced.
                        tracing::error!(%error, "the store cannot be written, no more writes are taken");
                        return;
                    }
                }
                Err(_) => {}
            }
            if Instant::now() >= due {
                self.housekeeping();
                due = Instant::now() + if self.pruning { Duration::from_millis(50) } else { HOUSEKEEPING };
            }
        }
    }

    /// The engine's error, if it failed; every request has its answer in any case.
    fn handle(&mut self, group: Vec<Request>) -> Result<(), StoreError> {
        let mut txns = Vec::with_capacity(group.len());
        for request in group {
            match request {
                Request::Txn(txn, answer) => txns.push((txn, answer)),
                Request::Compact(revision, answer) => {
                    // A caller that has gone away does not need its answer.
                    drop(answer.send(self.compact(revision)));
                }
            }
        }
        if txns.is_empty() {
            return Ok(());
        }
        let (requests, answers): (Vec<Txn>, Vec<_>) = txns.into_iter().unzip();
        match self.commit(&requests) {
            Ok(outcomes) => answers.into_iter().zip(outcomes).for_each(reply),
            Err(error) => {
                answers.into_iter().for_each(|answer| drop(answer.send(Err(error.clone()))));
                return if matches!(error, StoreError::Engine { .. }) { Err(error) } else { Ok(()) };
            }
        }
        Ok(())
    }

    /// Applies the transactions in order, commits once, publishes.
    fn commit(&mut self, txns: &[Txn]) -> Result<Vec<TxnOutcome>, StoreError> {
        let began = Instant::now();
        let write = tried!("write", self.db.begin_write());
        let mut events = Vec::new();
        let mut outcomes = Vec::with_capacity(txns.len());
        let revision;
        {
            let mut batch = Batch::open(&write)?;
            let before = batch.revision;
            for txn in txns {
                outcomes.push(batch.apply(txn, &mut events)?);
            }
            revision = batch.revision;
            if revision != before {
                tried!("write", batch.meta.insert(META_REVISION, revision));
            }
        }
        if events.is_empty() {
            tried!("write", write.abort());
        } else {
            tried!("commit", write.commit());
            self.commits.observe(began.elapsed());
            self.hub.publish(revision, &events);
        }
        Ok(outcomes)
    }

    fn housekeeping(&mut self) {
        let current = self.hub.published();
        let now = Instant::now();
        self.samples.push_back((now, current));
        let mut target = current.saturating_sub(KEEP_REVISIONS);
        while let Some((when, revision)) = self.samples.front()
            && now.duration_since(*when) > KEEP
        {
            target = target.max((*revision).min(current.saturating_sub(KEEP_AT_LEAST)));
            self.samples.pop_front();
        }
        let done = self.expire().and_then(|()| if target > self.compacted { self.compact(target) } else { Ok(()) });
        let pruned = done.and_then(|()| if self.pruning { self.prune() } else { Ok(()) });
        if let Err(error) = pruned {
            tracing::warn!(%error, "store housekeeping failed; it is tried again");
        }
    }

    /// Deletes keys whose time has come and which were not put again since.
    fn expire(&mut self) -> Result<(), StoreError> {
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let read = tried!("expiry", redb::ReadableDatabase::begin_read(&*self.db));
        let table = tried!("expiry", read.open_table(EXPIRY));
        let mut due = Vec::new();
        for entry in tried!("expiry", table.range(..(now_s, &[][..]))) {
            let (id, revision) = tried!("expiry", entry);
            let (second, key) = id.value();
            due.push((second, key.to_vec(), revision.value()));
            if due.len() >= EXPIRE_CHUNK {
                break;
            }
        }
        if due.is_empty() {
            return Ok(());
        }
        let txns: Vec<Txn> = due.iter().filter_map(|(_, key, revision)| expiry_txn(key, *revision)).collect();
        self.commit(&txns)?;
        let write = tried!("expiry", self.db.begin_write());
        {
            let mut table = tried!("expiry", write.open_table(EXPIRY));
            for (second, key, _) in &due {
                tried!("expiry", table.remove((*second, key.as_slice())));
            }
        }
        tried!("expiry", write.commit());
        Ok(())
    }

    fn compact(&mut self, revision: u64) -> Result<(), StoreError> {
        let current = self.hub.published();
        if revision > current {
            return Err(StoreError::Future { requested: revision, current });
        }
        if revision <= self.compacted {
            return Ok(());
        }
        let write = tried!("compaction", self.db.begin_write());
        tried!("compaction", tried!("compaction", write.open_table(META)).insert(META_COMPACTED, revision));
        tried!("compaction", write.commit());
        (self.compacted, self.pruning) = (revision, true);
        self.prune()
    }

    /// Removes one portion of log records at or before the compacted revision and the versions they replaced.
    fn prune(&mut self) -> Result<(), StoreError> {
        let write = tried!("compaction", self.db.begin_write());
        let mut removed = 0;
        {
            let mut log = tried!("compaction", write.open_table(LOG));
            let mut versions = tried!("compaction", write.open_table(VERSIONS));
            let mut portion = Vec::new();
            for entry in tried!("compaction", log.range(..=(self.compacted, u32::MAX))).take(PRUNE_CHUNK) {
                let (id, raw) = tried!("compaction", entry);
                portion.push((id.value(), decode_log(raw.value())));
            }
            for (id, record) in portion {
                if let Some((previous, key)) = record {
                    forget(&mut versions, key.as_bytes(), previous, id.0)?;
                }
                tried!("compaction", log.remove(id));
                removed += 1;
            }
        }
        tried!("compaction", write.commit());
        self.pruning = removed == PRUNE_CHUNK;
        Ok(())
    }
}

fn reply((answer, outcome): (oneshot::Sender<Result<TxnOutcome, StoreError>>, TxnOutcome)) {
    let (answer, outcome): Answer = (answer, outcome);
    // A caller that has gone away does not need its answer.
    drop(answer.send(Ok(outcome)));
}

fn expiry_txn(key: &[u8], revision: u64) -> Option<Txn> {
    let key = std::str::from_utf8(key).ok()?;
    Some(Txn::new().when(key, revision).then(Op::delete(key)))
}

/// Drops the version that the record at `revision` replaced, and the record's own if it is a tombstone.
fn forget(
    versions: &mut Table<'_, &'static [u8], &'static [u8]>,
    key: &[u8],
    previous: u64,
    revision: u64,
) -> Result<(), StoreError> {
    if previous > 0 {
        tried!("compaction", versions.remove(version_key(key, previous).as_slice()));
    }
    let own = version_key(key, revision);
    let raw = tried!("compaction", versions.get(own.as_slice()));
    let tombstone = raw.and_then(|guard| Version::decode(guard.value())).is_some_and(|version| version.deleted);
    if tombstone {
        tried!("compaction", versions.remove(own.as_slice()));
    }
    Ok(())
}

/// The tables of one engine transaction.
struct Batch<'t> {
    versions: Table<'t, &'static [u8], &'static [u8]>,
    log: Table<'t, (u64, u32), &'static [u8]>,
    expiry: Table<'t, (u64, &'static [u8]), u64>,
    meta: Table<'t, &'static str, u64>,
    revision: u64,
}

impl<'t> Batch<'t> {
    fn open(write: &'t WriteTransaction) -> Result<Self, StoreError> {
        let meta = tried!("write", write.open_table(META));
        let revision = tried!("write", meta.get(META_REVISION)).map_or(0, |guard| guard.value());
        Ok(Batch {
            versions: tried!("write", write.open_table(VERSIONS)),
            log: tried!("write", write.open_table(LOG)),
            expiry: tried!("write", write.open_table(EXPIRY)),
            meta,
            revision,
        })
    }

    fn apply(&mut self, txn: &Txn, events: &mut Vec<Arc<Event>>) -> Result<TxnOutcome, StoreError> {
        for compare in &txn.compare {
            let found = newest(&self.versions, compare.key.as_bytes(), u64::MAX)?;
            let mod_revision = found.filter(|(_, version)| !version.deleted).map_or(0, |(revision, _)| revision);
            if mod_revision != compare.mod_revision {
                return Ok(TxnOutcome::Conflict { key: compare.key.clone(), mod_revision });
            }
        }
        let revision = self.revision + 1;
        let mut written = 0;
        for op in &txn.ops {
            if let Some(event) = self.write(op, revision, written)? {
                events.push(Arc::new(event));
                written += 1;
            }
        }
        if written > 0 {
            self.revision = revision;
        }
        Ok(TxnOutcome::Committed { revision: self.revision })
    }

    fn write(&mut self, op: &Op, revision: u64, index: u32) -> Result<Option<Event>, StoreError> {
        let key = op.key();
        let found = newest(&self.versions, key.as_bytes(), u64::MAX)?;
        let previous = found.filter(|(_, version)| !version.deleted);
        let (value, ttl_s) = match op {
            Op::Delete { .. } if previous.is_none() => return Ok(None),
            Op::Delete { .. } => (None, None),
            Op::Put { value, ttl_s, .. } => (Some(value.clone()), *ttl_s),
        };
        let create_revision = previous.as_ref().map_or(revision, |(_, version)| version.create_revision);
        let version =
            Version { create_revision, deleted: value.is_none(), value: value.clone().unwrap_or_else(Bytes::new) };
        let encoded = version.encode();
        tried!("write", self.versions.insert(version_key(key.as_bytes(), revision).as_slice(), encoded.as_slice()));
        let before = previous.as_ref().map_or(0, |(before, _)| *before);
        tried!("write", self.log.insert((revision, index), encode_log(before, key).as_slice()));
        if let Some(ttl_s) = ttl_s {
            let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            tried!("write", self.expiry.insert((now_s + ttl_s, key.as_bytes()), revision));
        }
        Ok(Some(Event::new(key.to_owned(), value, previous.map(|(_, version)| version.value), revision)))
    }
}
