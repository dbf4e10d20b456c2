//! A typed, current copy of all objects of a kind: listed once, then kept by a watch. Readers never wait; listeners are
//! told every change, and are told to look at everything when they fell behind.
//!
//! A writer that must see its own write first waits with [`Cache::wait_for`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use super::client::Object;
use crate::store::{Event, ListQuery, Store, StoreError, WatchItem};

/// Changes a listener may be behind before it has to look at everything.
const LISTENER_BUFFER: usize = 4_096;
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
    /// Forgets what has happened so far, for a listener that is about to look at everything.
    pub fn skip(&mut self) {
        self.receiver = self.receiver.resubscribe();
    }

    /// The next change; pends for ever once the cache has stopped.
    pub async fn next(&mut self) -> Heard<T> {
        match self.receiver.recv().await {
            Ok(change) => Heard::Change(change),
            Err(broadcast::error::RecvError::Lagged(_)) => Heard::Everything,
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}

type Id = (String, String);

/// Objects by identity, and identities by the uid of what controls them (empty: nothing does).
struct Objects<T> {
    by_id: BTreeMap<Id, Arc<T>>,
    by_controller: HashMap<String, BTreeSet<Id>>,
}

impl<T: Object> Objects<T> {
    fn new() -> Self {
        Objects { by_id: BTreeMap::new(), by_controller: HashMap::new() }
    }

    fn insert(&mut self, id: Id, object: Arc<T>) -> Option<Arc<T>> {
        let old = self.remove(&id);
        self.by_controller.entry(controller(&*object)).or_default().insert(id.clone());
        self.by_id.insert(id, object);
        old
    }

    fn remove(&mut self, id: &Id) -> Option<Arc<T>> {
        let old = self.by_id.remove(id)?;
        let controller = controller(&*old);
        if let Some(ids) = self.by_controller.get_mut(&controller) {
            ids.remove(id);
            if ids.is_empty() {
                self.by_controller.remove(&controller);
            }
        }
        Some(old)
    }
}

fn controller<T: Object>(object: &T) -> String {
    let owners = object.meta().owner_references.iter().flatten();
    owners.filter(|owner| owner.controller == Some(true)).map(|owner| owner.uid.clone()).next().unwrap_or_default()
}

/// All objects of one kind, by namespace and name.
pub struct Cache<T> {
    objects: RwLock<Objects<T>>,
    revision: watch::Sender<Option<u64>>,
    changes: broadcast::Sender<Change<T>>,
}

impl<T: Object> Cache<T> {
    /// Starts keeping the copy, until `stop`.
    pub fn start(store: Arc<dyn Store>, stop: CancellationToken) -> Arc<Self> {
        let cache = Arc::new(Cache {
            objects: RwLock::new(Objects::new()),
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
        self.read().by_id.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// All objects.
    pub fn all(&self) -> Vec<Arc<T>> {
        self.read().by_id.values().cloned().collect()
    }

    /// The objects of one namespace.
    pub fn in_namespace(&self, namespace: &str) -> Vec<Arc<T>> {
        let objects = self.read();
        let from = Bound::Included((namespace.to_owned(), String::new()));
        let range = objects.by_id.range((from, Bound::Unbounded));
        range.take_while(|((ns, _), _)| ns == namespace).map(|(_, object)| object.clone()).collect()
    }

    /// The objects that the owner of this uid controls; with an empty uid, those that nothing controls.
    pub fn controlled_by(&self, uid: &str) -> Vec<Arc<T>> {
        let objects = self.read();
        let ids = objects.by_controller.get(uid).into_iter().flatten();
        ids.filter_map(|id| objects.by_id.get(id).cloned()).collect()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.read().by_id.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.read().by_id.is_empty()
    }

    /// Hears every later change.
    pub fn listen(&self) -> Listener<T> {
        Listener { receiver: self.changes.subscribe() }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Objects<T>> {
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

    fn replace(&self, fresh: BTreeMap<Id, Arc<T>>) {
        let mut next = Objects::new();
        for (id, object) in &fresh {
            next.insert(id.clone(), object.clone());
        }
        let before = {
            let mut objects = self.objects.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *objects, next).by_id
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
