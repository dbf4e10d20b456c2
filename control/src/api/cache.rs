//! A typed, current copy of all objects of a kind: listed once, then kept by a watch. Readers never wait; listeners are
//! told every change, and are told to look at everything when they fell behind.
//!
//! A writer that must see its own write first waits with [`Cache::wait_for`].

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use super::client::Object;
use crate::store::{Event, ListQuery, Store, StoreError, WatchItem};

/// Changes a listener may be behind before it has to look at everything.
const LISTENER_BUFFER: usize = 16_384;
/// Pause before listing again after the store failed.
const RETRY: Duration = Duration::from_millis(200);

/// One change of one object.
#[derive(Debug)]
pub struct Change<T> {
    /// As it was; `None` = new.
    pub old: Option<Arc<T>>,
    /// As it is; `None` = gone.
    pub new: Option<Arc<T>>,
}

impl<T> Clone for Change<T> {
    fn clone(&self) -> Self {
        Change { old: self.old.clone(), new: self.new.clone() }
    }
}

impl<T> Change<T> {
    /// The object, as last known.
    pub fn object(&self) -> &Arc<T> {
        self.new.as_ref().or(self.old.as_ref()).expect("a change has a before or an after")
    }
}

/// What a listener gets.
#[derive(Debug)]
pub enum Heard<T> {
    /// A change.
    Change(Change<T>),
    /// Too many changes to tell: look at everything.
    Everything,
}

/// A listener.
pub struct Listener<T> {
    receiver: broadcast::Receiver<Change<T>>,
}

impl<T: Object> Listener<T> {
    /// The next change; pends for ever once the cache has stopped.
    pub async fn next(&mut self) -> Heard<T> {
        match self.receiver.recv().await {
            Ok(change) => Heard::Change(change),
            Err(broadcast::error::RecvError::Lagged(_)) => Heard::Everything,
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}

/// All objects of one kind, by namespace and name.
pub struct Cache<T> {
    objects: RwLock<BTreeMap<(String, String), Arc<T>>>,
    revision: watch::Sender<Option<u64>>,
    changes: broadcast::Sender<Change<T>>,
}

impl<T: Object> Cache<T> {
    /// Starts keeping the copy, until `stop`.
    pub fn start(store: Arc<dyn Store>, stop: CancellationToken) -> Arc<Self> {
        let cache = Arc::new(Cache {
            objects: RwLock::new(BTreeMap::new()),
            revision: watch::Sender::new(None),
            changes: broadcast::Sender::new(LISTENER_BUFFER),
        });
        let keeper = cache.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = keeper.keep(store) => {}
            }
        });
        cache
    }

    /// Waits until the first list is in.
    pub async fn synced(&self) {
        self.wait_for(0).await;
    }

    /// Waits until the copy holds everything up to a revision that changed an object of this kind.
    pub async fn wait_for(&self, revision: u64) {
        let mut seen = self.revision.subscribe();
        // The sender lives as long as `self`.
        let _ = seen.wait_for(|at| at.is_some_and(|at| at >= revision)).await;
    }

    /// The revision up to which changes are in; `None` before the first list.
    pub fn revision(&self) -> Option<u64> {
        *self.revision.borrow()
    }

    /// One object.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<T>> {
        self.read().get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// All objects.
    pub fn all(&self) -> Vec<Arc<T>> {
        self.read().values().cloned().collect()
    }

    /// The objects of one namespace.
    pub fn in_namespace(&self, namespace: &str) -> Vec<Arc<T>> {
        let objects = self.read();
        let from = Bound::Included((namespace.to_owned(), String::new()));
        let range = objects.range((from, Bound::Unbounded));
        range.take_while(|((ns, _), _)| ns == namespace).map(|(_, object)| object.clone()).collect()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.read().len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.read().is_empty()
    }

    /// Hears every later change.
    pub fn listen(&self) -> Listener<T> {
        Listener { receiver: self.changes.subscribe() }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<(String, String), Arc<T>>> {
        self.objects.read().unwrap_or_else(PoisonError::into_inner)
    }

    async fn keep(&self, store: Arc<dyn Store>) {
        loop {
            if let Err(error) = self.list_and_watch(&store).await {
                tracing::warn!(kind = T::PLURAL, %error, "cache lists again");
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    async fn list_and_watch(&self, store: &Arc<dyn Store>) -> Result<(), StoreError> {
        let prefix = T::kind().prefix(None);
        let listing = store.list(ListQuery { prefix: prefix.clone(), ..ListQuery::default() }).await?;
        let mut fresh = BTreeMap::new();
        for item in &listing.items {
            if let Some(object) = parse::<T>(&item.value, item.mod_revision) {
                fresh.insert(identity(&object), Arc::new(object));
            }
        }
        self.replace(fresh);
        self.revision.send_replace(Some(listing.revision));
        let mut watch = store.watch(&prefix, listing.revision).await?;
        while let Some(item) = watch.next().await {
            match item? {
                WatchItem::Event(event) => self.apply(&event),
                WatchItem::Progress(revision) => {
                    self.revision.send_replace(Some(revision));
                }
            }
        }
        Ok(())
    }

    fn replace(&self, fresh: BTreeMap<(String, String), Arc<T>>) {
        let before = {
            let mut objects = self.objects.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *objects, fresh.clone())
        };
        for (id, new) in &fresh {
            let old = before.get(id);
            if old.is_none_or(|old| old.revision() != new.revision()) {
                self.tell(old.cloned(), Some(new.clone()));
            }
        }
        for (id, old) in before {
            if !fresh.contains_key(&id) {
                self.tell(Some(old), None);
            }
        }
    }

    fn apply(&self, event: &Event) {
        let new = event.value.as_ref().and_then(|value| parse::<T>(value, event.revision)).map(Arc::new);
        let id = new.as_deref().map(identity).or_else(|| split_key::<T>(&event.key));
        if let Some(id) = id {
            let old = {
                let mut objects = self.objects.write().unwrap_or_else(PoisonError::into_inner);
                match &new {
                    Some(new) => objects.insert(id, new.clone()),
                    None => objects.remove(&id),
                }
            };
            if old.is_some() || new.is_some() {
                self.tell(old, new);
            }
        }
        self.revision.send_replace(Some(event.revision));
    }

    fn tell(&self, old: Option<Arc<T>>, new: Option<Arc<T>>) {
        // Nobody may be listening.
        let _ = self.changes.send(Change { old, new });
    }
}

fn identity<T: Object>(object: &T) -> (String, String) {
    (object.namespace().to_owned(), object.name().to_owned())
}

fn split_key<T: Object>(key: &str) -> Option<(String, String)> {
    let rest = key.strip_prefix(&T::kind().prefix(None))?;
    let (namespace, name) = rest.rsplit_once('/').unwrap_or(("", rest));
    Some((namespace.to_owned(), name.to_owned()))
}

fn parse<T: Object>(value: &[u8], revision: u64) -> Option<T> {
    match serde_json::from_slice::<T>(value) {
        Ok(mut object) => {
            object.meta_mut().resource_version = Some(revision.to_string());
            Some(object)
        }
        Err(error) => {
            tracing::error!(kind = T::PLURAL, revision, %error, "a stored object does not parse; it is left out");
            None
        }
    }
}
