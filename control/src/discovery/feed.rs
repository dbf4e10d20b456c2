//! Follows the objects that matter to the data plane and publishes a new snapshot whenever their compilation changed.

use super::Counters;
use crate::{
    api::kinds,
    compile::{ClassStatus, GatewayStatus, Objects, PolicyStatus, RouteStatus, compile},
    gateway, own,
    pool::Pool,
    store::{ListQuery, Store, StoreError, Watch, WatchItem},
};
use k8s_openapi::api::core::v1::Namespace;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sluice_model::{Name, Revision, Snapshot};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// Changes that come together are compiled together: what comes within this time of the first, and what had queued up.
const GATHER: Duration = Duration::from_millis(4);
/// Most changes compiled together: as many as a watch keeps. Under a stream that never pauses, snapshots still come out.
const MAX_BATCH: usize = 32_768;
/// So many changes are read without a pause for the thread's other work.
const YIELD_AFTER: usize = 128;

/// One compiled state.
#[derive(Clone, Default)]
pub struct Published {
    pub epoch: String,
    pub snapshot: Arc<Snapshot>,
    pub routes: Arc<Vec<RouteStatus>>,
    pub policies: Arc<Vec<PolicyStatus>>,
    pub gateways: Arc<Vec<GatewayStatus>>,
    pub classes: Arc<Vec<ClassStatus>>,
    /// Of each route: the generation compiled, the snapshot revision that first had it, and when the change was made.
    pub since: Arc<HashMap<Name, (i64, Revision, Instant)>>,
}

struct Prefixes {
    services: String,
    slices: String,
    pods: String,
    nodes: String,
    http_routes: String,
    grpc_routes: String,
    tls_routes: String,
    tcp_routes: String,
    grants: String,
    backend_policies: String,
    access_policies: String,
    route_filters: String,
    gateway_classes: String,
    gateways: String,
    secrets: String,
    namespaces: String,
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
            grpc_routes: p("gateway.networking.k8s.io", "v1", "grpcroutes"),
            tls_routes: p("gateway.networking.k8s.io", "v1", "tlsroutes"),
            tcp_routes: p("gateway.networking.k8s.io", "v1alpha2", "tcproutes"),
            grants: p("gateway.networking.k8s.io", "v1", "referencegrants"),
            backend_policies: p(own::GROUP, own::VERSION, "backendpolicies"),
            access_policies: p(own::GROUP, own::VERSION, "accesspolicies"),
            route_filters: p(own::GROUP, own::VERSION, "routefilters"),
            gateway_classes: p("gateway.networking.k8s.io", "v1", "gatewayclasses"),
            gateways: p("gateway.networking.k8s.io", "v1", "gateways"),
            secrets: p("", "v1", "secrets"),
            namespaces: p("", "v1", "namespaces"),
        }
    }

    fn all(&self) -> [&str; 16] {
        [
            &self.services,
            &self.slices,
            &self.pods,
            &self.nodes,
            &self.http_routes,
            &self.grpc_routes,
            &self.tls_routes,
            &self.tcp_routes,
            &self.grants,
            &self.backend_policies,
            &self.access_policies,
            &self.route_filters,
            &self.gateway_classes,
            &self.gateways,
            &self.secrets,
            &self.namespaces,
        ]
        .map(String::as_str)
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
        } else if let Some(n) = name(key, &self.grpc_routes) {
            set(&mut o.grpc_routes, n, value)
        } else if let Some(n) = name(key, &self.tls_routes) {
            set(&mut o.tls_routes, n, value)
        } else if let Some(n) = name(key, &self.grants) {
            set(&mut o.grants, n, value)
        } else if let Some(n) = name(key, &self.backend_policies) {
            set(&mut o.backend_policies, n, value)
        } else if let Some(n) = name(key, &self.access_policies) {
            set(&mut o.access_policies, n, value)
        } else if let Some(n) = name(key, &self.route_filters) {
            set(&mut o.route_filters, n, value)
        } else if let Some(n) = name(key, &self.gateway_classes) {
            set(&mut o.gateway_classes, n, value)
        } else if let Some(n) = name(key, &self.gateways) {
            set(&mut o.gateways, n, value)
        } else if let Some(n) = name(key, &self.namespaces) {
            return set_labels(&mut o.namespaces, n, value);
        } else if let Some(n) = name(key, &self.secrets) {
            // Others are nobody's business here, and change nothing.
            let value = value.filter(|v| v["type"] == gateway::SECRET_TYPE);
            let concerns = value.is_some() || o.secrets.contains_key(&n);
            set(&mut o.secrets, n, value);
            return concerns;
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

/// Of namespaces only the labels matter; whether they have changed.
fn set_labels(map: &mut BTreeMap<Name, Arc<Namespace>>, name: Name, value: Option<&Value>) -> bool {
    let labels = |n: Option<&Arc<Namespace>>| n.and_then(|n| n.metadata.labels.clone());
    let before = labels(map.get(&name));
    set(map, name.clone(), value);
    labels(map.get(&name)) != before
}

/// For ever: publishes into `out`. A lost watch starts over with a list.
pub async fn run(
    store: Arc<dyn Store>,
    (trust_domain, pool): (String, Pool),
    out: watch::Sender<Published>,
    counters: Arc<Counters>,
) {
    let (prefixes, trust_domain, pool) = (Arc::new(Prefixes::new()), trust_domain.into(), Arc::new(pool));
    let feed = Feed { prefixes, store, trust_domain, pool, out, counters };
    loop {
        if let Err(error) = feed.follow().await {
            tracing::warn!(%error, "feed interrupted, listing again");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

struct Feed {
    store: Arc<dyn Store>,
    prefixes: Arc<Prefixes>,
    trust_domain: Arc<str>,
    pool: Arc<Pool>,
    out: watch::Sender<Published>,
    counters: Arc<Counters>,
}

/// The objects as of a revision.
#[derive(Default)]
struct State {
    objects: Objects,
    revision: u64,
    /// When the oldest change that is not published yet was made.
    changed: Option<Instant>,
}

impl Feed {
    async fn follow(&self) -> Result<(), StoreError> {
        let mut state = self.list().await?;
        let mut watch = self.store.watch("/registry/", state.revision).await?;
        loop {
            state = self.publish(state).await?;
            while state.changed.is_none() {
                let Some(item) = watch.next().await else { return Ok(()) };
                self.take(&mut state, item?);
            }
            if !self.gather(&mut state, &mut watch).await? {
                return Ok(());
            }
        }
    }

    async fn list(&self) -> Result<State, StoreError> {
        let (mut items, mut revision) = (vec![], None);
        for prefix in self.prefixes.all() {
            let query = ListQuery { prefix: prefix.to_owned(), revision, ..ListQuery::default() };
            let listing = self.store.list(query).await?;
            revision = Some(listing.revision);
            items.extend(listing.items);
        }
        let prefixes = self.prefixes.clone();
        off_the_runtime("read of the objects", move || {
            let mut state = State { revision: revision.unwrap_or(0), ..State::default() };
            for kv in items {
                let value = serde_json::from_slice::<Value>(&kv.value).ok();
                prefixes.apply(&mut state.objects, &kv.key, value.as_ref());
            }
            state
        })
        .await
    }

    /// Takes what has queued up, and what comes until [`GATHER`] after that began. False when the store has closed.
    async fn gather(&self, state: &mut State, watch: &mut Watch) -> Result<bool, StoreError> {
        let until = tokio::time::Instant::now() + GATHER;
        for taken in 1..=MAX_BATCH {
            // What is there already is taken even when the time is over: the runtime's budget would hide it.
            match tokio::time::timeout_at(until, tokio::task::unconstrained(watch.next())).await {
                Ok(Some(item)) => self.take(state, item?),
                Ok(None) => return Ok(false),
                Err(_) => break,
            }
            if taken % YIELD_AFTER == 0 {
                tokio::task::yield_now().await;
            }
        }
        Ok(true)
    }

    fn take(&self, state: &mut State, item: WatchItem) {
        match item {
            WatchItem::Event(e) => {
                state.revision = state.revision.max(e.revision);
                if self.prefixes.apply(&mut state.objects, &e.key, e.json().as_deref()) {
                    state.changed.get_or_insert(e.at);
                }
            }
            WatchItem::Progress(r) => state.revision = state.revision.max(r),
        }
    }

    /// Compiles on a thread where that may take its time; changes queue up in the watch meanwhile.
    async fn publish(&self, state: State) -> Result<State, StoreError> {
        let before = self.out.borrow().clone();
        let epoch = self.store.epoch().to_owned();
        let (trust_domain, pool) = (self.trust_domain.clone(), self.pool.clone());
        let began = Instant::now();
        let compiled = move || (next(before, &epoch, &state, &trust_domain, &pool), state);
        let (next, mut state) = off_the_runtime("compilation", compiled).await?;
        self.counters.compiled(began.elapsed());
        if let Some(next) = next {
            let moved = self.out.borrow().snapshot.revision != next.snapshot.revision;
            // Before anybody can acknowledge it. What is there at the start is no change.
            if let Some(changed) = state.changed.filter(|_| moved) {
                self.counters.lag().published(next.snapshot.revision, changed);
            }
            self.out.send_replace(next);
        }
        state.changed = None;
        Ok(state)
    }
}

async fn off_the_runtime<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, StoreError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| StoreError::Engine { operation, cause: e.to_string() })
}

/// What is to be published instead of `p`, if it differs.
fn next(mut p: Published, epoch: &str, state: &State, trust_domain: &str, pool: &Pool) -> Option<Published> {
    let compiled = compile(&state.objects, trust_domain, pool);
    let revision = Revision(state.revision);
    let next = Snapshot::new(revision, compiled.resources);
    let fresh = p.epoch != epoch;
    let changed = fresh || !p.snapshot.diff(&next).is_empty();
    if changed {
        // Unchanged resources stay shared with the snapshots that streams still hold.
        let base = if fresh { Snapshot::default() } else { (*p.snapshot).clone() };
        p.snapshot = Arc::new(base.apply(&base.diff(&next), revision));
        p.since = Arc::new(since(&p, fresh, state.changed.unwrap_or_else(Instant::now)));
        epoch.clone_into(&mut p.epoch);
    }
    let statuses = *p.routes != compiled.routes || *p.gateways != compiled.gateways || *p.classes != compiled.classes;
    let policies = *p.policies != compiled.policies;
    if statuses {
        p.routes = Arc::new(compiled.routes);
        p.gateways = Arc::new(compiled.gateways);
        p.classes = Arc::new(compiled.classes);
    }
    if policies {
        p.policies = Arc::new(compiled.policies);
    }
    (changed || statuses || policies).then_some(p)
}

fn since(p: &Published, fresh: bool, changed: Instant) -> HashMap<Name, (i64, Revision, Instant)> {
    p.snapshot
        .routes()
        .map(|r| {
            let known = p.since.get(&r.name).filter(|(g, ..)| !fresh && *g == r.generation).copied();
            (r.name.clone(), known.unwrap_or((r.generation, p.snapshot.revision, changed)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{EmbeddedStore, Op, Txn};
    use serde_json::json;

    fn service(index: usize) -> Op {
        let ip = format!("10.96.{}.{}", index / 250, index % 250 + 1);
        let service = json!({"metadata": {"name": format!("s{index}"), "namespace": "ns"},
            "spec": {"clusterIP": ip, "ports": [{"port": 80}]}});
        Op::put(format!("{}ns/s{index}", Prefixes::new().services), service.to_string())
    }

    /// A whole burst is one compilation, however long the reading takes, and its snapshot is the one of its last change.
    #[tokio::test]
    async fn what_has_queued_up_is_compiled_at_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&folder.path().join("store")).expect("opens"));
        let (out, published) = watch::channel(Published::default());
        let counters = Arc::new(Counters::default());
        let feed = Feed {
            prefixes: Arc::new(Prefixes::new()),
            store: store.clone(),
            trust_domain: "d".into(),
            pool: Arc::default(),
            out,
            counters: counters.clone(),
        };
        let mut state = feed.publish(feed.list().await.expect("lists")).await.expect("publishes");
        let mut watch = store.watch("/registry/", state.revision).await.expect("watches");
        let burst = (0..5_000).fold(Txn::new(), |txn, index| txn.then(service(index)));
        store.txn(burst).await.expect("commits");
        assert!(feed.gather(&mut state, &mut watch).await.expect("gathers"));
        feed.publish(state).await.expect("publishes");
        let seen = published.borrow().clone();
        assert_eq!(seen.snapshot.services().count(), 5_000);
        assert_eq!(seen.snapshot.revision, Revision(store.revision()));
        assert_eq!(counters.compilations(), 2, "the one at the start, and the one of the burst");
        assert!(!counters.lag().is_settled(), "nobody has acknowledged it");
    }
}
