//! Follows the objects that matter to the data plane and publishes a new snapshot whenever their compilation changed.

use crate::{
    api::kinds,
    compile::{Objects, RouteStatus, compile},
    store::{Event, ListQuery, Store, StoreError, WatchItem},
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use sluice_model::{Name, Revision, Snapshot};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::watch, time::Instant};

/// Changes that come together are compiled together, at most this long after the first.
const GATHER: Duration = Duration::from_millis(4);

/// One compiled state.
#[derive(Clone, Default)]
pub struct Published {
    pub epoch: String,
    pub snapshot: Arc<Snapshot>,
    pub routes: Arc<Vec<RouteStatus>>,
    /// Of each route: the generation compiled, the snapshot revision that first had it, and when that was published.
    pub since: Arc<HashMap<Name, (i64, Revision, Instant)>>,
}

struct Prefixes {
    services: String,
    slices: String,
    pods: String,
    nodes: String,
    http_routes: String,
    tcp_routes: String,
}

impl Prefixes {
    fn new() -> Self {
        let p = |group, version, plural| {
            kinds::find(group, version, plural).expect("the table of kinds has what the data plane needs").prefix(None)
        };
        Self {
            services: p("", "v1", "services"),
            slices: p("discovery.k8s.io", "v1", "endpointslices"),
            pods: p("", "v1", "pods"),
            nodes: p("", "v1", "nodes"),
            http_routes: p("gateway.networking.k8s.io", "v1", "httproutes"),
            tcp_routes: p("gateway.networking.k8s.io", "v1alpha2", "tcproutes"),
        }
    }

    fn all(&self) -> [&str; 6] {
        [&self.services, &self.slices, &self.pods, &self.nodes, &self.http_routes, &self.tcp_routes].map(String::as_str)
    }

    /// Takes one key's new value into `o`; false when the key is of no interest.
    fn apply(&self, o: &mut Objects, key: &str, value: Option<&Value>) -> bool {
        if let Some(n) = name(key, &self.services) {
            set(&mut o.services, n, value)
        } else if let Some(n) = name(key, &self.slices) {
            set(&mut o.slices, n, value)
        } else if let Some(n) = name(key, &self.pods) {
            set(&mut o.pods, n, value)
        } else if let Some(n) = name(key, &self.nodes) {
            set(&mut o.nodes, n, value)
        } else if let Some(n) = name(key, &self.http_routes) {
            set(&mut o.http_routes, n, value)
        } else if let Some(n) = name(key, &self.tcp_routes) {
            set(&mut o.tcp_routes, n, value)
        } else {
            return false;
        }
        true
    }
}

fn name(key: &str, prefix: &str) -> Option<Name> {
    let rest = key.strip_prefix(prefix)?;
    Some(match rest.split_once('/') {
        Some((ns, n)) => Name::new(ns, n),
        None => Name::cluster(rest),
    })
}

fn set<T: DeserializeOwned>(map: &mut BTreeMap<Name, Arc<T>>, name: Name, value: Option<&Value>) {
    match value.map(T::deserialize) {
        Some(Ok(object)) => {
            map.insert(name, Arc::new(object));
        }
        Some(Err(error)) => {
            // The API validates before it stores: this is an object of a newer version. Its last good form stays.
            tracing::warn!(%name, %error, "stored object is not readable");
        }
        None => {
            map.remove(&name);
        }
    }
}

/// For ever: publishes into `out`. A lost watch starts over with a list.
pub async fn run(store: Arc<dyn Store>, trust_domain: String, out: watch::Sender<Published>) {
    let prefixes = Prefixes::new();
    loop {
        if let Err(error) = follow(&store, &prefixes, &trust_domain, &out).await {
            tracing::warn!(%error, "feed interrupted, listing again");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

async fn follow(
    store: &Arc<dyn Store>,
    prefixes: &Prefixes,
    trust_domain: &str,
    out: &watch::Sender<Published>,
) -> Result<(), StoreError> {
    let mut objects = Objects::default();
    let mut revision = None;
    for prefix in prefixes.all() {
        let query = ListQuery { prefix: prefix.to_owned(), revision, ..ListQuery::default() };
        let listing = store.list(query).await?;
        revision = Some(listing.revision);
        for kv in listing.items {
            let value = serde_json::from_slice::<Value>(&kv.value).ok();
            prefixes.apply(&mut objects, &kv.key, value.as_ref());
        }
    }
    let mut revision = revision.unwrap_or(0);
    let mut watch = store.watch("/registry/", revision).await?;
    publish(store.epoch(), &objects, revision, trust_domain, out);
    loop {
        let Some(first) = watch.next().await else { return Ok(()) };
        let mut dirty = take(prefixes, &mut objects, &mut revision, first?);
        let until = Instant::now() + GATHER;
        while dirty {
            match tokio::time::timeout_at(until, watch.next()).await {
                Ok(Some(item)) => {
                    take(prefixes, &mut objects, &mut revision, item?);
                }
                Ok(None) => return Ok(()),
                Err(_) => {
                    publish(store.epoch(), &objects, revision, trust_domain, out);
                    dirty = false;
                }
            }
        }
    }
}

fn take(prefixes: &Prefixes, objects: &mut Objects, revision: &mut u64, item: WatchItem) -> bool {
    match item {
        WatchItem::Event(e) => {
            *revision = (*revision).max(e.revision);
            apply(prefixes, objects, &e)
        }
        WatchItem::Progress(r) => {
            *revision = (*revision).max(r);
            false
        }
    }
}

fn apply(prefixes: &Prefixes, objects: &mut Objects, e: &Event) -> bool {
    prefixes.apply(objects, &e.key, e.json().as_deref())
}

fn publish(epoch: &str, objects: &Objects, revision: u64, trust_domain: &str, out: &watch::Sender<Published>) {
    let compiled = compile(objects, trust_domain);
    out.send_if_modified(|p| {
        let next = Snapshot::new(Revision(revision), compiled.resources);
        let fresh = p.epoch != epoch;
        let delta = p.snapshot.diff(&next);
        let changed = fresh || !delta.is_empty();
        if changed {
            // Unchanged resources stay shared with the snapshots that streams still hold.
            let base = if fresh { Snapshot::default() } else { (*p.snapshot).clone() };
            p.snapshot = Arc::new(base.apply(&base.diff(&next), Revision(revision)));
            p.since = Arc::new(since(p, fresh));
            epoch.clone_into(&mut p.epoch);
        }
        let statuses = *p.routes != compiled.routes;
        if statuses {
            p.routes = Arc::new(compiled.routes);
        }
        changed || statuses
    });
}

fn since(p: &Published, fresh: bool) -> HashMap<Name, (i64, Revision, Instant)> {
    let now = Instant::now();
    p.snapshot
        .routes()
        .map(|r| {
            let known = p.since.get(&r.name).filter(|(g, ..)| !fresh && *g == r.generation).copied();
            (r.name.clone(), known.unwrap_or((r.generation, p.snapshot.revision, now)))
        })
        .collect()
}
