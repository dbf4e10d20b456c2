//! Fan-out of committed changes to watchers. Each watcher has a bounded buffer; one that is full loses its watch, is
//! told so, and lists again: a slow reader costs memory once, never the others their time.
//!
//! A watch that starts in the past first reads the log, then its buffer: registration and publication are under one
//! lock, so nothing falls between the two and nothing comes twice.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use super::embedded::Reader;
use super::{Event, StoreError, WatchItem};

/// Changes a watcher may be behind before it is cut off. Pointers are buffered, the events are shared; but the slowest
/// watcher keeps them all alive, hence the bound on their bytes, too.
const BUFFER_EVENTS: usize = 32_768;
/// Bytes of values, old and new, that a watcher may be behind.
const BUFFER_BYTES: usize = 64 << 20;
/// Events read from the log at once when a watch starts in the past.
const LOG_CHUNK: usize = 1_000;

/// All live watchers and the last revision they were told.
#[derive(Debug, Default)]
pub(super) struct Hub {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    published: u64,
    subscribers: Vec<Subscriber>,
}

#[derive(Debug)]
struct Subscriber {
    prefix: String,
    sender: mpsc::Sender<WatchItem>,
    lagged: Arc<AtomicBool>,
    /// Bytes of what is in the buffer.
    behind: Arc<AtomicUsize>,
}

fn size(item: &WatchItem) -> usize {
    let WatchItem::Event(event) = item else { return 0 };
    event.value.as_ref().map_or(0, |v| v.len()) + event.previous.as_ref().map_or(0, |v| v.len())
}

impl Subscriber {
    /// False when the watcher is gone or must go.
    fn send(&self, item: WatchItem) -> bool {
        let size = size(&item);
        let before = self.behind.fetch_add(size, Ordering::AcqRel);
        // One event, however large, is always taken.
        if before > 0 && before + size > BUFFER_BYTES {
            self.lagged.store(true, Ordering::Release);
            return false;
        }
        match self.sender.try_send(item) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.lagged.store(true, Ordering::Release);
                false
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        }
    }
}

impl Hub {
    /// A hub whose watchers have seen everything up to `revision`.
    pub(super) fn at(revision: u64) -> Self {
        Hub { inner: Mutex::new(Inner { published: revision, subscribers: Vec::new() }) }
    }

    /// The last published revision.
    pub(super) fn published(&self) -> u64 {
        self.lock().published
    }

    /// Tells all watchers of a group of committed changes.
    pub(super) fn publish(&self, revision: u64, events: &[Arc<Event>]) {
        let mut inner = self.lock();
        inner.published = inner.published.max(revision);
        inner.subscribers.retain(|subscriber| {
            events
                .iter()
                .filter(|event| event.key.starts_with(&subscriber.prefix))
                .all(|event| subscriber.send(WatchItem::Event(event.clone())))
        });
    }

    /// Tells all watchers that they have seen everything so far.
    pub(super) fn progress(&self) {
        let mut inner = self.lock();
        let item = WatchItem::Progress(inner.published);
        inner.subscribers.retain(|subscriber| !subscriber.sender.is_closed() && subscriber.send(item.clone()));
    }

    /// How many watchers there are.
    pub(super) fn watchers(&self) -> usize {
        self.lock().subscribers.iter().filter(|subscriber| !subscriber.sender.is_closed()).count()
    }

    /// Starts a watch of changes after `after`; what is already published is read from the log.
    pub(super) fn subscribe(&self, prefix: &str, after: u64, reader: Reader) -> Watch {
        let (sender, receiver) = mpsc::channel(BUFFER_EVENTS);
        let (lagged, behind) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut inner = self.lock();
        let subscriber =
            Subscriber { prefix: prefix.to_owned(), sender, lagged: lagged.clone(), behind: behind.clone() };
        inner.subscribers.push(subscriber);
        let replay_until = inner.published;
        drop(inner);
        let prefix = prefix.to_owned();
        Watch {
            prefix,
            reader,
            position: after,
            replay_until,
            replay: VecDeque::new(),
            receiver,
            lagged,
            behind,
            done: false,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // A panic while holding the lock leaves a list of senders, which is always valid.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running watch. Dropping it ends it.
#[derive(Debug)]
pub struct Watch {
    prefix: String,
    reader: Reader,
    /// Everything up to here has been taken from the log.
    position: u64,
    /// The log is read up to here; later changes come through the buffer.
    replay_until: u64,
    replay: VecDeque<Arc<Event>>,
    receiver: mpsc::Receiver<WatchItem>,
    lagged: Arc<AtomicBool>,
    behind: Arc<AtomicUsize>,
    done: bool,
}

impl Watch {
    /// The next change; `None` when the store has closed. After an error the watch is over.
    pub async fn next(&mut self) -> Option<Result<WatchItem, StoreError>> {
        if self.done {
            return None;
        }
        loop {
            if let Some(event) = self.replay.pop_front() {
                return Some(Ok(WatchItem::Event(event)));
            }
            if self.position >= self.replay_until {
                break;
            }
            if let Err(error) = self.read_log().await {
                self.done = true;
                return Some(Err(error));
            }
        }
        let received = self.receiver.recv().await;
        self.behind.fetch_sub(received.as_ref().map_or(0, size), Ordering::AcqRel);
        match received {
            Some(WatchItem::Event(event)) if event.revision <= self.replay_until => Box::pin(self.next()).await,
            Some(item) => Some(Ok(item)),
            None => {
                self.done = true;
                let lagged = self.lagged.load(Ordering::Acquire);
                lagged.then(|| Err(StoreError::Lagged { prefix: self.prefix.clone() }))
            }
        }
    }

    async fn read_log(&mut self) -> Result<(), StoreError> {
        let (reader, prefix) = (self.reader.clone(), self.prefix.clone());
        let (after, until) = (self.position, self.replay_until);
        let read = move || reader.log(&prefix, after, until, LOG_CHUNK);
        let joined = tokio::task::spawn_blocking(read).await;
        let (events, position) =
            joined.map_err(|e| StoreError::Engine { operation: "read of the log", cause: e.to_string() })??;
        self.replay = events.into();
        self.position = position;
        Ok(())
    }
}
