//! The embedded backend on redb: one file, nothing to install. Versions are kept by (key, revision) beside a log of
//! events by revision; [`super::writer`] is the only writer, reads use snapshots and never wait for it.
//!
//! Tables: `versions` key NUL revision → header + value; `log` (revision, n) → key and the revision before;
//! `expiry` (second, key) → revision; `meta`.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use redb::{Builder, Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use tokio::sync::{mpsc, oneshot};

use super::hub::{Hub, Watch};
use super::writer::{Commits, Request, Writer};
use super::{Counters, Event, KeyValue, ListQuery, Listing, MAX_VALUE_BYTES, Op, Store, StoreError, Txn, TxnOutcome};

pub(super) const VERSIONS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("versions");
pub(super) const LOG: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("log");
pub(super) const EXPIRY: TableDefinition<'_, (u64, &[u8]), u64> = TableDefinition::new("expiry");
pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const NAMES: TableDefinition<'_, &str, &str> = TableDefinition::new("names");

pub(super) const META_REVISION: &str = "revision";
pub(super) const META_COMPACTED: &str = "compacted";

/// Page cache of the engine. Listing 50,000 pods reads each page once; this keeps what is hot.
const CACHE_BYTES: usize = 64 * 1024 * 1024;
/// Transactions waiting for the writer before senders wait in turn.
const QUEUE: usize = 4_096;

pub(super) fn engine(operation: &'static str) -> impl Fn(redb::Error) -> StoreError {
    move |error| StoreError::Engine { operation, cause: error.to_string() }
}

/// Shorthand: any error of the engine as ours.
macro_rules! tried {
    ($operation:expr, $call:expr) => {
        $call.map_err(|e| $crate::store::embedded::engine($operation)(redb::Error::from(e)))?
    };
}
pub(super) use tried;

/// What is kept of one version of one key.
pub(super) struct Version {
    pub(super) create_revision: u64,
    pub(super) deleted: bool,
    pub(super) value: Bytes,
}

impl Version {
    const HEADER: usize = 9;

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::HEADER + self.value.len());
        out.extend_from_slice(&self.create_revision.to_be_bytes());
        out.push(u8::from(self.deleted));
        out.extend_from_slice(&self.value);
        out
    }

    pub(super) fn decode(raw: &[u8]) -> Option<Self> {
        let (header, value) = raw.split_at_checked(Self::HEADER)?;
        let create_revision = u64::from_be_bytes(header[..8].try_into().ok()?);
        Some(Version { create_revision, deleted: header[8] != 0, value: Bytes::copy_from_slice(value) })
    }
}

/// `key NUL revision`: versions of a key lie together, oldest first. Keys hold no NUL.
pub(super) fn version_key(key: &[u8], revision: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(key.len() + 9);
    out.extend_from_slice(key);
    out.push(0);
    out.extend_from_slice(&revision.to_be_bytes());
    out
}

fn split_version_key(raw: &[u8]) -> Option<(&[u8], u64)> {
    let (key, rest) = raw.split_at_checked(raw.len().checked_sub(9)?)?;
    Some((key, u64::from_be_bytes(rest[1..].try_into().ok()?)))
}

/// The newest version of `key` at or before `revision`, tombstones included.
pub(super) fn newest(
    table: &impl ReadableTable<&'static [u8], &'static [u8]>,
    key: &[u8],
    revision: u64,
) -> Result<Option<(u64, Version)>, StoreError> {
    let (low, high) = (version_key(key, 0), version_key(key, revision));
    let mut range = tried!("read of a key", table.range::<&[u8]>(low.as_slice()..=high.as_slice()));
    let Some(entry) = range.next_back() else { return Ok(None) };
    let (raw, value) = tried!("read of a key", entry);
    let split = split_version_key(raw.value()).map(|(_, revision)| revision);
    Ok(split.zip(Version::decode(value.value())))
}

/// A log record: revision of the version before (0: none), then the key.
pub(super) fn encode_log(previous: u64, key: &str) -> Vec<u8> {
    let mut out = previous.to_be_bytes().to_vec();
    out.extend_from_slice(key.as_bytes());
    out
}

pub(super) fn decode_log(raw: &[u8]) -> Option<(u64, String)> {
    let (previous, key) = raw.split_at_checked(8)?;
    Some((u64::from_be_bytes(previous.try_into().ok()?), String::from_utf8(key.to_vec()).ok()?))
}

/// Reads of the database; cheap to clone.
#[derive(Clone)]
pub(super) struct Reader {
    db: Arc<Database>,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reader")
    }
}

impl Reader {
    fn meta(&self, name: &str) -> Result<u64, StoreError> {
        let read = tried!("read", self.db.begin_read());
        let table = tried!("read", read.open_table(META));
        Ok(tried!("read", table.get(name)).map_or(0, |guard| guard.value()))
    }

    fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        let read = tried!("read of a key", self.db.begin_read());
        let table = tried!("read of a key", read.open_table(VERSIONS));
        let found = newest(&table, key.as_bytes(), u64::MAX)?;
        Ok(found.filter(|(_, version)| !version.deleted).map(|(mod_revision, version)| KeyValue {
            key: key.to_owned(),
            value: version.value,
            create_revision: version.create_revision,
            mod_revision,
        }))
    }

    fn list(&self, query: &ListQuery) -> Result<Listing, StoreError> {
        let read = tried!("list", self.db.begin_read());
        let meta = tried!("list", read.open_table(META));
        let current = tried!("list", meta.get(META_REVISION)).map_or(0, |guard| guard.value());
        let compacted = tried!("list", meta.get(META_COMPACTED)).map_or(0, |guard| guard.value());
        let revision = query.revision.unwrap_or(current);
        if revision > current {
            return Err(StoreError::Future { requested: revision, current });
        }
        if revision < compacted {
            return Err(StoreError::Compacted { requested: revision, compacted });
        }
        let table = tried!("list", read.open_table(VERSIONS));
        let mut page = Page { limit: query.limit, items: Vec::new(), remaining: 0, pending: None };
        let start = match &query.after {
            Some(after) => version_key(after.as_bytes(), u64::MAX),
            None => query.prefix.clone().into_bytes(),
        };
        for entry in tried!("list", table.range::<&[u8]>(start.as_slice()..)) {
            let (raw, value) = tried!("list", entry);
            let Some((key, at)) = split_version_key(raw.value()) else { continue };
            if !key.starts_with(query.prefix.as_bytes()) {
                if key < query.prefix.as_bytes() {
                    continue;
                }
                break;
            }
            if query.after.as_ref().is_none_or(|after| key > after.as_bytes()) && at <= revision {
                page.see(key, at, value.value());
            }
        }
        page.flush();
        Ok(Listing { more: page.remaining > 0, remaining: page.remaining, items: page.items, revision })
    }

    /// Events with `after < revision <= until` and the prefix, at most about `limit`; and up to which revision they
    /// are complete.
    pub(super) fn log(
        &self,
        prefix: &str,
        after: u64,
        until: u64,
        limit: usize,
    ) -> Result<(Vec<Arc<Event>>, u64), StoreError> {
        let read = tried!("read of the log", self.db.begin_read());
        // In the same view of the database as the log: what was compacted in it was also pruned in it at most so far.
        let meta = tried!("read of the log", read.open_table(META));
        let compacted = tried!("read of the log", meta.get(META_COMPACTED)).map_or(0, |guard| guard.value());
        if after < compacted {
            return Err(StoreError::Compacted { requested: after, compacted });
        }
        let log = tried!("read of the log", read.open_table(LOG));
        let versions = tried!("read of the log", read.open_table(VERSIONS));
        let (mut events, mut position) = (Vec::new(), after);
        for entry in tried!("read of the log", log.range((after + 1, 0)..=(until, u32::MAX))) {
            let (id, raw) = tried!("read of the log", entry);
            let (revision, _) = id.value();
            // A transaction is taken whole: stop only between two revisions.
            if events.len() >= limit && revision > position {
                return Ok((events, position));
            }
            position = revision;
            let Some((previous, key)) = decode_log(raw.value()) else { continue };
            if key.starts_with(prefix) {
                let now = read_version(&versions, &key, revision)?;
                let before = if previous == 0 { None } else { read_version(&versions, &key, previous)? };
                events.push(Arc::new(Event::new(key, now, before, revision)));
            }
        }
        Ok((events, until))
    }
}

fn read_version(
    table: &impl ReadableTable<&'static [u8], &'static [u8]>,
    key: &str,
    revision: u64,
) -> Result<Option<Bytes>, StoreError> {
    let raw = tried!("read of a version", table.get(version_key(key.as_bytes(), revision).as_slice()));
    let version = raw.and_then(|guard| Version::decode(guard.value()));
    Ok(version.filter(|version| !version.deleted).map(|version| version.value))
}

/// Picks, per key, the newest version seen; keys come in order, versions oldest first.
struct Page {
    limit: usize,
    items: Vec<KeyValue>,
    remaining: usize,
    pending: Option<(Vec<u8>, u64, Option<Version>)>,
}

impl Page {
    fn see(&mut self, key: &[u8], revision: u64, raw: &[u8]) {
        if self.pending.as_ref().is_some_and(|(pending, _, _)| pending != key) {
            self.flush();
        }
        // Past the limit only the count matters; a value is not copied for it.
        let full = self.limit > 0 && self.items.len() >= self.limit;
        let deleted = raw.get(8).is_none_or(|flag| *flag != 0);
        let version = if full {
            (!deleted).then(|| Version { create_revision: 0, deleted, value: Bytes::new() })
        } else {
            Version::decode(raw).filter(|version| !version.deleted)
        };
        match &mut self.pending {
            Some(pending) => (pending.1, pending.2) = (revision, version),
            None => self.pending = Some((key.to_vec(), revision, version)),
        }
    }

    fn flush(&mut self) {
        let Some((key, mod_revision, Some(version))) = self.pending.take() else { return };
        if self.limit > 0 && self.items.len() >= self.limit {
            self.remaining += 1;
            return;
        }
        let Ok(key) = String::from_utf8(key) else { return };
        let create_revision = version.create_revision;
        self.items.push(KeyValue { key, value: version.value, create_revision, mod_revision });
    }
}

/// The embedded store. Dropping it stops the writer after what was queued.
pub struct EmbeddedStore {
    epoch: String,
    reader: Reader,
    hub: Arc<Hub>,
    commits: Arc<Commits>,
    queue: Option<mpsc::Sender<Request>>,
    writer: Option<std::thread::JoinHandle<()>>,
}

impl EmbeddedStore {
    /// Opens the file, or makes it.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let db = tried!("open", Builder::new().set_cache_size(CACHE_BYTES).create(path));
        Self::start(db)
    }

    /// The same on any medium; tests use one that loses what was not synced.
    pub fn with_backend(backend: impl StorageBackend) -> Result<Self, StoreError> {
        let db = tried!("open", Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(backend));
        Self::start(db)
    }

    fn start(db: Database) -> Result<Self, StoreError> {
        let epoch = prepare(&db)?;
        let reader = Reader { db: Arc::new(db) };
        let hub = Arc::new(Hub::at(reader.meta(META_REVISION)?));
        let (queue, requests) = mpsc::channel(QUEUE);
        let commits = Commits::new();
        let writer = Writer::new(reader.db.clone(), hub.clone(), commits.clone(), reader.meta(META_COMPACTED)?);
        let spawned = std::thread::Builder::new().name("store-writer".to_owned()).spawn(move || writer.run(requests));
        let writer = spawned.map_err(|e| StoreError::Engine { operation: "start", cause: e.to_string() })?;
        Ok(EmbeddedStore { epoch, reader, hub, commits, queue: Some(queue), writer: Some(writer) })
    }

    async fn send<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let gone = |_| StoreError::Engine { operation: "write", cause: "the writer has stopped".to_owned() };
        let queue = self.queue.as_ref().expect("the queue lives as long as the store");
        queue.send(make(answer)).await.map_err(|_| gone(()))?;
        answered.await.map_err(|_| gone(()))
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(writer) = self.writer.take() {
            // The file must be free when drop returns; a writer that panicked has nothing left to say.
            drop(writer.join());
        }
    }
}

/// Makes the tables and the epoch if they are not there.
fn prepare(db: &Database) -> Result<String, StoreError> {
    let write = tried!("open", db.begin_write());
    let epoch;
    {
        tried!("open", write.open_table(VERSIONS));
        tried!("open", write.open_table(LOG));
        tried!("open", write.open_table(EXPIRY));
        tried!("open", write.open_table(META));
        let mut names = tried!("open", write.open_table(NAMES));
        let known = tried!("open", names.get("epoch")).map(|guard| guard.value().to_owned());
        epoch = known.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        tried!("open", names.insert("epoch", epoch.as_str()));
    }
    tried!("open", write.commit());
    Ok(epoch)
}

#[async_trait]
impl Store for EmbeddedStore {
    fn epoch(&self) -> &str {
        &self.epoch
    }

    fn revision(&self) -> u64 {
        self.hub.published()
    }

    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        self.reader.get(key)
    }

    async fn list(&self, query: ListQuery) -> Result<Listing, StoreError> {
        let reader = self.reader.clone();
        let joined = tokio::task::spawn_blocking(move || reader.list(&query)).await;
        joined.map_err(|e| StoreError::Engine { operation: "list", cause: e.to_string() })?
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        for op in &txn.ops {
            if let Op::Put { key, value, .. } = op
                && value.len() > MAX_VALUE_BYTES
            {
                return Err(StoreError::TooLarge { key: key.clone(), size: value.len() });
            }
        }
        self.send(|answer| Request::Txn(txn, answer)).await?
    }

    async fn watch(&self, prefix: &str, after_revision: u64) -> Result<Watch, StoreError> {
        let (compacted, current) = (self.reader.meta(META_COMPACTED)?, self.revision());
        if after_revision < compacted {
            return Err(StoreError::Compacted { requested: after_revision, compacted });
        }
        if after_revision > current {
            return Err(StoreError::Future { requested: after_revision, current });
        }
        Ok(self.hub.subscribe(prefix, after_revision, self.reader.clone()))
    }

    async fn failed(&self) {
        self.queue.as_ref().expect("the queue lives as long as the store").closed().await;
    }

    fn counters(&self) -> Counters {
        let watches = u64::try_from(self.hub.watchers()).unwrap_or(u64::MAX);
        Counters { watches, commits: self.commits.histogram() }
    }

    fn request_progress(&self) {
        self.hub.progress();
    }

    async fn compact(&self, revision: u64) -> Result<(), StoreError> {
        self.send(|answer| Request::Compact(revision, answer)).await?
    }
}
