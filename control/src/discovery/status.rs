//! Writes the routes' statuses: accepted, resolved, in force and where, and what callers without a sidecar follow.

use super::{Programmed, Published, Shared};
use crate::{
    api::kinds,
    compile::{ParentStatus, RouteStatus, Verdict},
    store::{Op, Store, StoreError, Txn, TxnOutcome},
};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use sluice_model::{Name, Revision, RouteKind};
use std::{sync::Arc, time::Duration};

pub const CONTROLLER: &str = "sluice.dev/control";
/// Of the members that are missing, this many are named.
const NAMED: usize = 5;

/// For ever: after every change of the published state or of an acknowledgement.
pub async fn run(store: Arc<dyn Store>, shared: Arc<Shared>) {
    let mut published = shared.published.clone();
    loop {
        let current = published.borrow_and_update().clone();
        for route in current.routes.iter() {
            if let Err(error) = write(&store, &shared, &current, route).await {
                tracing::warn!(route = %route.name, %error, "status not written, trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
                shared.acknowledged.notify_one();
            }
        }
        tokio::select! {
            () = shared.acknowledged.notified() => {}
            changed = published.changed() => if changed.is_err() { return },
        }
    }
}

async fn write(
    store: &Arc<dyn Store>,
    shared: &Shared,
    current: &Published,
    route: &RouteStatus,
) -> Result<(), StoreError> {
    let (version, plural) = match route.kind {
        RouteKind::Http => ("v1", "httproutes"),
        RouteKind::Tcp => ("v1alpha2", "tcproutes"),
    };
    let kind = kinds::find("gateway.networking.k8s.io", version, plural).expect("routes are in the table of kinds");
    let key = kind.key(&route.name.namespace, &route.name.name);
    loop {
        let Some(kv) = store.get(&key).await? else { return Ok(()) };
        let Ok(mut object) = serde_json::from_slice::<Value>(&kv.value) else { return Ok(()) };
        // A newer generation is being compiled: its own turn will write.
        if object["metadata"]["generation"].as_i64().unwrap_or(0) != route.generation {
            return Ok(());
        }
        let parents = parents(shared, current, route, &object["status"]["parents"]);
        if object["status"]["parents"] == parents {
            return Ok(());
        }
        object["status"]["parents"] = parents;
        let value = serde_json::to_vec(&object).expect("JSON serializes");
        let txn = Txn::new().when(key.clone(), kv.mod_revision).then(Op::put(key.clone(), value));
        if let TxnOutcome::Committed { .. } = store.txn(txn).await? {
            shared.observe(current, route);
            return Ok(());
        }
    }
}

/// Ours anew; entries of other controllers stay.
fn parents(shared: &Shared, current: &Published, route: &RouteStatus, old: &Value) -> Value {
    let foreign = old.as_array().into_iter().flatten().filter(|p| p["controllerName"] != CONTROLLER).cloned();
    let ours = route.parents.iter().enumerate().map(|(i, p)| {
        let before = old
            .as_array()
            .into_iter()
            .flatten()
            .find(|o| o["controllerName"] == CONTROLLER && o["parentRef"] == parent_ref(p));
        let compiled = if i == 0 { route.name.name.clone() } else { format!("{}.{i}", route.name.name) };
        let name = Name::new(route.name.namespace.clone(), compiled);
        let programmed = programmed(shared, current, &name, p);
        json!({
            "controllerName": CONTROLLER,
            "parentRef": parent_ref(p),
            "conditions": conditions(route, p, programmed, before),
        })
    });
    foreign.chain(ours).collect()
}

fn parent_ref(p: &ParentStatus) -> Value {
    let mut r = json!({"group": "", "kind": "Service", "name": p.service});
    if let Some(n) = &p.namespace {
        r["namespace"] = n.as_str().into();
    }
    if let Some(n) = p.port {
        r["port"] = n.into();
    }
    r
}

fn programmed(shared: &Shared, current: &Published, name: &Name, p: &ParentStatus) -> Option<Programmed> {
    p.accepted.as_ref().ok()?;
    let (_, required, _) = current.since.get(name)?;
    let tracker = shared.tracker.lock().expect("no holder panics");
    let ready = current.snapshot.nodes().filter(|n| n.ready).map(|n| n.name.name.as_str());
    Some(tracker.programmed(name, *required, ready))
}

/// Status, reason, message.
type Words = (&'static str, &'static str, String);

fn conditions(route: &RouteStatus, p: &ParentStatus, programmed: Option<Programmed>, before: Option<&Value>) -> Value {
    let verdict = |v: &Verdict, good: &'static str| -> Words {
        match v {
            Ok(()) => ("True", good, String::new()),
            Err((reason, message)) => ("False", reason, message.clone()),
        }
    };
    let fallback = match p.unmeshed_rule {
        Some(i) => (
            "True",
            "RouteWeights",
            format!("callers without a sidecar follow the weights of rule {i}, per connection"),
        ),
        None => (
            "False",
            "ServiceEndpoints",
            "callers without a sidecar use the service's own endpoints: no rule takes every request".into(),
        ),
    };
    let all = [
        ("Accepted", verdict(&p.accepted, "Accepted")),
        ("ResolvedRefs", verdict(&p.resolved, "ResolvedRefs")),
        ("Programmed", in_force(programmed)),
        ("UnmeshedFallback", fallback),
    ];
    all.into_iter().map(|(type_, words)| condition(type_, words, route.generation, before)).collect()
}

fn in_force(p: Option<Programmed>) -> Words {
    match p {
        Some(Programmed::InForce { agents, sidecars }) => {
            ("True", "Acknowledged", format!("in force at {agents} nodes and {sidecars} sidecars"))
        }
        Some(Programmed::Waiting { missing }) => {
            let more = missing.len().saturating_sub(NAMED);
            let named = missing[..missing.len().min(NAMED)].join(", ");
            let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
            ("Unknown", "Pending", format!("waiting for {named}{tail}"))
        }
        Some(Programmed::Refused { who, why }) => ("False", "Refused", format!("{who}: {why}")),
        None => ("False", "NotCompiled", "the route is not accepted".into()),
    }
}

fn condition(type_: &str, (status, reason, message): Words, generation: i64, before: Option<&Value>) -> Value {
    let old = before
        .and_then(|b| b["conditions"].as_array())
        .and_then(|c| c.iter().find(|c| c["type"] == type_ && c["status"] == status));
    let since = old
        .map(|c| c["lastTransitionTime"].clone())
        .unwrap_or_else(|| json!(Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()));
    json!({
        "type": type_, "status": status, "reason": reason, "message": message,
        "observedGeneration": generation, "lastTransitionTime": since,
    })
}

impl Shared {
    /// Counts how long a change took from its publication to the last acknowledgement.
    fn observe(&self, current: &Published, route: &RouteStatus) {
        let Some((generation, required, published)) = current.since.get(&route.name).copied() else { return };
        let tracker = self.tracker.lock().expect("no holder panics");
        let ready = current.snapshot.nodes().filter(|n| n.ready).map(|n| n.name.name.as_str());
        if !matches!(tracker.programmed(&route.name, required, ready), Programmed::InForce { .. }) {
            return;
        }
        drop(tracker);
        let mut seen = self.observed.lock().expect("no holder panics");
        if seen.insert(route.name.clone(), (generation, required)) != Some((generation, required)) {
            let took = published.elapsed();
            self.acknowledge_ms.lock().expect("no holder panics").push(took);
            tracing::info!(route = %route.name, generation, ms = took.as_millis() as u64, "in force everywhere");
        }
    }
}

/// What has been reported as in force: generation and revision.
pub type Observed = std::collections::HashMap<Name, (i64, Revision)>;
