//! Keys that need a look, each at most once, some not before a time. A key being worked on is not given out again until
//! it is done; a key that failed comes back after a pause that grows.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use crate::api::status::ApiError;

/// Namespace and name.
pub(super) type Key = (String, String);

/// Keys worked on at a time.
const WORKERS: usize = 16;
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Inner {
    due: BTreeMap<Key, Instant>,
    active: BTreeSet<Key>,
    failures: HashMap<Key, u32>,
}

/// The queue.
#[derive(Default)]
pub(super) struct Queue {
    inner: Mutex<Inner>,
    changed: Notify,
}

impl Queue {
    /// A new queue.
    pub(super) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Look at it now.
    pub(super) fn add(&self, key: Key) {
        self.add_at(key, Instant::now());
    }

    /// Look at it later; an earlier appointment stays.
    pub(super) fn add_after(&self, key: Key, pause: Duration) {
        self.add_at(key, Instant::now() + pause);
    }

    fn add_at(&self, key: Key, when: Instant) {
        let mut inner = self.lock();
        let due = inner.due.entry(key).or_insert(when);
        *due = when.min(*due);
        drop(inner);
        self.changed.notify_one();
    }

    async fn next(&self) -> Key {
        loop {
            let next_due = {
                let mut inner = self.lock();
                let now = Instant::now();
                let ready = inner.due.iter().find(|(key, due)| **due <= now && !inner.active.contains(*key));
                if let Some(key) = ready.map(|(key, _)| key.clone()) {
                    inner.due.remove(&key);
                    inner.active.insert(key.clone());
                    return key;
                }
                let waiting = inner.due.iter().filter(|(key, _)| !inner.active.contains(*key));
                waiting.map(|(_, due)| *due).min()
            };
            let pause = next_due.unwrap_or_else(|| Instant::now() + LONGEST_PAUSE);
            tokio::select! {
                () = self.changed.notified() => {}
                () = tokio::time::sleep_until(pause) => {}
            }
        }
    }

    fn done(&self, key: &Key, failed: bool) {
        let mut inner = self.lock();
        inner.active.remove(key);
        if failed {
            let failures = inner.failures.entry(key.clone()).or_default();
            *failures = failures.saturating_add(1);
            let pause = FIRST_PAUSE.saturating_mul(1 << (*failures).min(12)).min(LONGEST_PAUSE);
            let when = Instant::now() + pause;
            inner.due.entry(key.clone()).or_insert(when);
        } else {
            inner.failures.remove(key);
        }
        drop(inner);
        self.changed.notify_one();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on keys for ever.
    pub(super) async fn run<F>(self: Arc<Self>, name: &'static str, reconcile: impl Fn(Key) -> F)
    where
        F: Future<Output = Result<(), ApiError>> + Send + 'static,
    {
        let slots = Arc::new(Semaphore::new(WORKERS));
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            let key = self.next().await;
            let (work, queue) = (reconcile(key.clone()), self.clone());
            tokio::spawn(async move {
                let result = work.await;
                match &result {
                    Ok(()) => {}
                    // Somebody was faster; the next look sees it.
                    Err(error) if error.is_conflict() || error.is_not_found() => {
                        tracing::debug!(controller = name, key = ?key, %error, "again");
                    }
                    Err(error) => tracing::warn!(controller = name, key = ?key, %error, "failed; tried again later"),
                }
                queue.done(&key, result.is_err());
                drop(slot);
            });
        }
    }
}
