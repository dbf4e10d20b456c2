//! The object store: etcd's semantics behind one trait. Every key has the revision of its last change; a transaction
//! compares such revisions and then writes several keys under one new revision; lists are consistent at a revision;
//! watches replay from a revision.
//!
//! It knows nothing of Kubernetes: keys are strings, values are bytes. The embedded backend is [`embedded`]; another
//! engine joins by implementing [`Store`].

pub mod embedded;
mod hub;
mod writer;

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::Value;

use crate::histogram::Histogram;

pub use embedded::EmbeddedStore;
pub use hub::Watch;

/// Longest value accepted: the API refuses bodies over 3 MB, and etcd has a limit of the same order.
pub const MAX_VALUE_BYTES: usize = 4 * 1024 * 1024;

/// Why the store did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The history before `compacted` is gone.
    #[error("read of revision {requested}: it is compacted, the oldest kept is {compacted}; list again")]
    Compacted {
        /// The revision asked for.
        requested: u64,
        /// The oldest revision still readable.
        compacted: u64,
    },
    /// The revision has not happened yet in this history.
    #[error("read of revision {requested}: the store is at {current}")]
    Future {
        /// The revision asked for.
        requested: u64,
        /// The store's revision.
        current: u64,
    },
    /// A watcher did not keep up and its buffer was full.
    #[error("watch of {prefix}: the watcher was too slow and lost events; list again")]
    Lagged {
        /// What was watched.
        prefix: String,
    },
    /// A value is larger than [`MAX_VALUE_BYTES`].
    #[error("write of {key}: {size} bytes are more than the limit of {MAX_VALUE_BYTES}")]
    TooLarge {
        /// The key of the value.
        key: String,
        /// Its size.
        size: usize,
    },
    /// The engine failed; whether a write in flight took effect is unknown.
    #[error("{operation} in the store: {cause}")]
    Engine {
        /// What was tried.
        operation: &'static str,
        /// The engine's own words.
        cause: String,
    },
}

/// One key's value as of some revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The whole key.
    pub key: String,
    /// The bytes last put.
    pub value: Bytes,
    /// Revision of the put that made the key.
    pub create_revision: u64,
    /// Revision of the last put.
    pub mod_revision: u64,
}

/// A condition of a transaction: the key's last change is `mod_revision`; 0 = the key does not exist.
#[derive(Debug, Clone)]
pub struct Compare {
    /// The key.
    pub key: String,
    /// Its expected revision.
    pub mod_revision: u64,
}

/// A write of a transaction.
#[derive(Debug, Clone)]
pub enum Op {
    /// Make or replace a key. With `ttl_s` the store deletes it after that many seconds unless it was put again;
    /// on an engine with leases this is a lease.
    Put {
        /// The key.
        key: String,
        /// Its new value.
        value: Bytes,
        /// Seconds to live.
        ttl_s: Option<u64>,
    },
    /// Remove a key; nothing happens if it is not there.
    Delete {
        /// The key.
        key: String,
    },
}

impl Op {
    /// A put without a time to live.
    pub fn put(key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        Op::Put { key: key.into(), value: value.into(), ttl_s: None }
    }

    /// A delete.
    pub fn delete(key: impl Into<String>) -> Self {
        Op::Delete { key: key.into() }
    }

    /// The key written.
    pub fn key(&self) -> &str {
        match self {
            Op::Put { key, .. } | Op::Delete { key } => key,
        }
    }
}

/// All conditions hold → all writes happen under one revision; else nothing happens. A key may be written once.
#[derive(Debug, Clone, Default)]
pub struct Txn {
    /// Conditions, all of which must hold.
    pub compare: Vec<Compare>,
    /// Writes.
    pub ops: Vec<Op>,
}

impl Txn {
    /// An empty transaction.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the condition that `key` was last changed at `mod_revision` (0: absent).
    #[must_use]
    pub fn when(mut self, key: impl Into<String>, mod_revision: u64) -> Self {
        self.compare.push(Compare { key: key.into(), mod_revision });
        self
    }

    /// Adds a write.
    #[must_use]
    pub fn then(mut self, op: Op) -> Self {
        self.ops.push(op);
        self
    }
}

/// What became of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TxnOutcome {
    /// Durable at this revision.
    Committed {
        /// The revision of all its writes.
        revision: u64,
    },
    /// A condition did not hold; the key and the revision it really has.
    Conflict {
        /// The first key whose condition failed.
        key: String,
        /// Its revision, 0 if absent.
        mod_revision: u64,
    },
}

/// What to list.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    /// Keys that begin with this.
    pub prefix: String,
    /// Start after this key (for the next page).
    pub after: Option<String>,
    /// At this revision; `None` = the latest.
    pub revision: Option<u64>,
    /// At most this many; 0 = all.
    pub limit: usize,
}

/// The answer to a [`ListQuery`].
#[derive(Debug, Clone)]
pub struct Listing {
    /// In key order.
    pub items: Vec<KeyValue>,
    /// The revision at which all of them are.
    pub revision: u64,
    /// There are more after the last one.
    pub more: bool,
    /// How many more, when `more`.
    pub remaining: usize,
}

/// One change of one key.
#[derive(Debug)]
pub struct Event {
    /// The key.
    pub key: String,
    /// The new value; `None` = deleted.
    pub value: Option<Bytes>,
    /// The value before; `None` = the key was not there.
    pub previous: Option<Bytes>,
    /// Revision of the change.
    pub revision: u64,
    /// When it was made, or read from the log by a watch that starts in the past.
    pub at: Instant,
    decoded: OnceLock<Option<Arc<Value>>>,
    decoded_previous: OnceLock<Option<Arc<Value>>>,
}

impl Event {
    fn new(key: String, value: Option<Bytes>, previous: Option<Bytes>, revision: u64) -> Self {
        let (decoded, decoded_previous) = (OnceLock::new(), OnceLock::new());
        Event { key, value, previous, revision, at: Instant::now(), decoded, decoded_previous }
    }

    /// The new value as JSON, parsed once for all watchers.
    pub fn json(&self) -> Option<Arc<Value>> {
        self.decoded.get_or_init(|| parse(self.value.as_ref())).clone()
    }

    /// The value before as JSON, parsed once for all watchers.
    pub fn previous_json(&self) -> Option<Arc<Value>> {
        self.decoded_previous.get_or_init(|| parse(self.previous.as_ref())).clone()
    }
}

fn parse(value: Option<&Bytes>) -> Option<Arc<Value>> {
    value.and_then(|bytes| serde_json::from_slice(bytes).ok()).map(Arc::new)
}

/// What a watch yields.
#[derive(Debug, Clone)]
pub enum WatchItem {
    /// A change.
    Event(Arc<Event>),
    /// Everything up to and including this revision has been yielded.
    Progress(u64),
}

/// What a store counts, as of now.
#[derive(Debug, Clone)]
pub struct Counters {
    /// Running watches.
    pub watches: u64,
    /// How long commits took; one may carry many transactions.
    pub commits: Histogram,
}

/// A revisioned key-value store.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Names this history: a store made anew has another one, and revisions of two epochs do not compare.
    fn epoch(&self) -> &str;

    /// The latest revision.
    fn revision(&self) -> u64;

    /// The latest value of a key.
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError>;

    /// Keys by prefix, consistent at one revision.
    async fn list(&self, query: ListQuery) -> Result<Listing, StoreError>;

    /// Compare and write. An answer of `Committed` is durable.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError>;

    /// All changes after `revision` of keys that begin with `prefix`, in order.
    async fn watch(&self, prefix: &str, after_revision: u64) -> Result<Watch, StoreError>;

    /// What it has counted.
    fn counters(&self) -> Counters;

    /// Comes when the store takes no writes any more: the process should end and start anew.
    async fn failed(&self);

    /// Asks for a [`WatchItem::Progress`] on every watch.
    fn request_progress(&self);

    /// Forgets history before `revision`: reads and watches from before it fail afterwards.
    async fn compact(&self, revision: u64) -> Result<(), StoreError>;
}
