//! Writes the routes' statuses: accepted, resolved, in force and where, and what callers without a sidecar follow; the
//! policies': accepted, and whom they reach; and those of gateways and their classes.

use super::{Programmed, Published, Shared};
use crate::{
    api::kinds,
    compile::{
        ClassStatus, GatewayStatus, ListenerStatus, ParentKind, ParentStatus, PolicyStatus, RouteStatus, Unmeshed,
        Verdict,
    },
    gateway::CONTROLLER_NAME,
    own,
    store::{Op, Store, StoreError, Txn, TxnOutcome},
};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use sluice_model::{Name, Revision, RouteKind};
use std::{net::IpAddr, sync::Arc, time::Duration};

pub const CONTROLLER: &str = "sluice.dev/control";
/// Of the members that are missing, this many are named.
const NAMED: usize = 5;

/// For ever: after every change of the published state or of an acknowledgement.
pub async fn run(store: Arc<dyn Store>, shared: Arc<Shared>) {
    let mut published = shared.published.clone();
    let mut written = Arc::default();
    loop {
        let current = published.borrow_and_update().clone();
        // A node that is not ready any more is not waited for.
        shared.settle();
        for route in current.routes.iter() {
            if let Err(error) = write(&store, &shared, &current, route).await {
                try_again(&shared, &format!("route {}", route.name), &error).await;
            }
        }
        if !Arc::ptr_eq(&written, &current.policies) {
            match write_policies(&store, &current.policies).await {
                Ok(()) => written = current.policies.clone(),
                Err(error) => try_again(&shared, "policies", &error).await,
            }
        }
        if let Err(error) = write_gateways(&store, &current).await {
            try_again(&shared, "gateways", &error).await;
        }
        tokio::select! {
            () = shared.acknowledged.notified() => {}
            changed = published.changed() => if changed.is_err() { return },
        }
    }
}

async fn try_again(shared: &Shared, of: &str, error: &StoreError) {
    tracing::warn!(of, %error, "status not written, trying again");
    tokio::time::sleep(Duration::from_millis(100)).await;
    shared.acknowledged.notify_one();
}

async fn write_policies(store: &Arc<dyn Store>, policies: &[PolicyStatus]) -> Result<(), StoreError> {
    for policy in policies {
        let kind = kinds::find(own::GROUP, own::VERSION, policy.plural).expect("policies are in the table of kinds");
        let key = kind.key(&policy.name.namespace, &policy.name.name);
        let next = |status: &Value| {
            let mut next = status.clone();
            let all = policy.conditions.iter();
            next["conditions"] =
                all.map(|(t, v)| condition(t, verdict(v, t), policy.generation, Some(status))).collect();
            next
        };
        put(store, key, policy.generation, next).await?;
    }
    Ok(())
}

async fn write(
    store: &Arc<dyn Store>,
    shared: &Shared,
    current: &Published,
    route: &RouteStatus,
) -> Result<(), StoreError> {
    let (version, plural) = match route.kind {
        RouteKind::Http => ("v1", "httproutes"),
        RouteKind::Grpc => ("v1", "grpcroutes"),
        RouteKind::Tls => ("v1", "tlsroutes"),
        RouteKind::Tcp => ("v1alpha2", "tcproutes"),
    };
    let kind = kinds::find("gateway.networking.k8s.io", version, plural).expect("routes are in the table of kinds");
    let key = kind.key(&route.name.namespace, &route.name.name);
    let next = |status: &Value| {
        let mut next = status.clone();
        next["parents"] = parents(shared, current, route, &status["parents"]);
        next
    };
    if put(store, key, route.generation, next).await? {
        shared.observe(current, route);
    }
    Ok(())
}

/// Replaces the status of the object at `key` by what `next` makes of it; whether it differed.
async fn put(
    store: &Arc<dyn Store>,
    key: String,
    generation: i64,
    next: impl Fn(&Value) -> Value,
) -> Result<bool, StoreError> {
    loop {
        let Some(kv) = store.get(&key).await? else { return Ok(false) };
        let Ok(mut object) = serde_json::from_slice::<Value>(&kv.value) else { return Ok(false) };
        // A newer generation is being compiled: its own turn will write.
        if object["metadata"]["generation"].as_i64().unwrap_or(0) != generation {
            return Ok(false);
        }
        let status = next(&object["status"]);
        if object["status"] == status {
            return Ok(false);
        }
        object["status"] = status;
        let value = serde_json::to_vec(&object).expect("JSON serializes");
        let txn = Txn::new().when(key.clone(), kv.mod_revision).then(Op::put(key.clone(), value));
        if let TxnOutcome::Committed { .. } = store.txn(txn).await? {
            return Ok(true);
        }
    }
}

async fn write_gateways(store: &Arc<dyn Store>, current: &Published) -> Result<(), StoreError> {
    let kind = |plural| kinds::find("gateway.networking.k8s.io", "v1", plural).expect("gateways are in the table");
    for class in current.classes.iter() {
        let key = kind("gatewayclasses").key("", &class.name);
        put(store, key, class.generation, |status| class_status(class, status)).await?;
    }
    for gateway in current.gateways.iter() {
        let key = kind("gateways").key(&gateway.name.namespace, &gateway.name.name);
        put(store, key, gateway.generation, |status| gateway_status(gateway, status)).await?;
    }
    Ok(())
}

fn verdict(v: &Verdict, good: &'static str) -> Words {
    match v {
        Ok(()) => ("True", good, String::new()),
        Err((reason, message)) => ("False", reason, message.clone()),
    }
}

fn class_status(class: &ClassStatus, before: &Value) -> Value {
    let accepted = condition("Accepted", verdict(&class.accepted, "Accepted"), class.generation, Some(before));
    json!({"conditions": [accepted]})
}

fn gateway_status(g: &GatewayStatus, before: &Value) -> Value {
    let accepted = match (&g.accepted, &g.partly) {
        (Ok(()), Some((reason, text))) => ("True", *reason, text.clone()),
        _ => verdict(&g.accepted, "Accepted"),
    };
    let all = [("Accepted", accepted), ("Programmed", verdict(&g.programmed, "Programmed"))];
    let conditions: Vec<Value> =
        all.into_iter().map(|(type_, words)| condition(type_, words, g.generation, Some(before))).collect();
    let listeners: Vec<Value> = g
        .listeners
        .iter()
        .map(|l| {
            let old = before["listeners"].as_array().and_then(|all| all.iter().find(|o| o["name"] == l.name.as_str()));
            listener_status(l, g.generation, old)
        })
        .collect();
    let kind = |a: &String| if a.parse::<IpAddr>().is_ok() { "IPAddress" } else { "Hostname" };
    let addresses: Vec<Value> = g.addresses.iter().map(|a| json!({"type": kind(a), "value": a})).collect();
    json!({"addresses": addresses, "conditions": conditions, "listeners": listeners})
}

fn listener_status(l: &ListenerStatus, generation: i64, before: Option<&Value>) -> Value {
    let conflicted = match &l.conflicted {
        Some((reason, text)) => ("True", *reason, text.clone()),
        None => ("False", "NoConflicts", String::new()),
    };
    let all = [
        ("Accepted", verdict(&l.accepted, "Accepted")),
        ("Conflicted", conflicted),
        ("ResolvedRefs", verdict(&l.resolved, "ResolvedRefs")),
        ("Programmed", verdict(&l.programmed, "Programmed")),
    ];
    let conditions: Vec<Value> =
        all.into_iter().map(|(type_, words)| condition(type_, words, generation, before)).collect();
    let kinds: Vec<Value> = l.kinds.iter().map(|k| json!({"group": "gateway.networking.k8s.io", "kind": k})).collect();
    json!({"name": l.name, "attachedRoutes": l.attached, "supportedKinds": kinds, "conditions": conditions})
}

/// Ours anew; entries of other controllers stay.
fn parents(shared: &Shared, current: &Published, route: &RouteStatus, old: &Value) -> Value {
    let foreign = old.as_array().into_iter().flatten().filter(|p| !ours(p)).cloned();
    let ours = route.parents.iter().map(|p| {
        let before = old
            .as_array()
            .into_iter()
            .flatten()
            .find(|o| o["controllerName"] == controller(p) && o["parentRef"] == parent_ref(p));
        let programmed = p.compiled.as_ref().and_then(|name| programmed(shared, current, name));
        json!({
            "controllerName": controller(p),
            "parentRef": parent_ref(p),
            "conditions": conditions(route, p, programmed, before),
        })
    });
    foreign.chain(ours).collect()
}

fn ours(entry: &Value) -> bool {
    [CONTROLLER, CONTROLLER_NAME].iter().any(|c| entry["controllerName"] == *c)
}

/// Of a gateway's class, as the Gateway API asks; of services there is no class.
fn controller(p: &ParentStatus) -> &'static str {
    match p.kind {
        ParentKind::Service => CONTROLLER,
        ParentKind::Gateway => CONTROLLER_NAME,
    }
}

fn parent_ref(p: &ParentStatus) -> Value {
    let (group, kind) = match p.kind {
        ParentKind::Service => ("", "Service"),
        ParentKind::Gateway => ("gateway.networking.k8s.io", "Gateway"),
    };
    let mut r = json!({"group": group, "kind": kind, "name": p.name});
    if let Some(s) = &p.section {
        r["sectionName"] = s.as_str().into();
    }
    if let Some(n) = &p.namespace {
        r["namespace"] = n.as_str().into();
    }
    if let Some(n) = p.port {
        r["port"] = n.into();
    }
    r
}

fn programmed(shared: &Shared, current: &Published, name: &Name) -> Option<Programmed> {
    let (_, required, _) = current.since.get(name)?;
    let tracker = shared.tracker.lock().expect("no holder panics");
    let ready = current.snapshot.nodes().filter(|n| n.ready).map(|n| n.name.name.as_str());
    Some(tracker.programmed(name, *required, ready))
}

/// Status, reason, message.
type Words = (&'static str, &'static str, String);

fn conditions(route: &RouteStatus, p: &ParentStatus, programmed: Option<Programmed>, before: Option<&Value>) -> Value {
    let fallback = match &p.unmeshed {
        Unmeshed::Rule(i) => (
            "True",
            "RouteWeights",
            format!("callers without a sidecar follow the weights of rule {i}, per connection"),
        ),
        Unmeshed::Older(other) => {
            ("False", "OlderRoute", format!("callers without a sidecar follow the older route {other}"))
        }
        Unmeshed::Endpoints => (
            "False",
            "ServiceEndpoints",
            "callers without a sidecar use the service's own endpoints: no rule takes every request".into(),
        ),
        Unmeshed::Producer => (
            "False",
            "ConsumerRoute",
            "callers without a sidecar follow the routes of the service's own namespace".into(),
        ),
    };
    let all = [
        ("Accepted", verdict(&p.accepted, "Accepted")),
        ("ResolvedRefs", verdict(&p.resolved, "ResolvedRefs")),
        (
            "Programmed",
            p.unserved.clone().map_or_else(|| in_force(programmed), |why| ("False", "ListenersNotValid", why)),
        ),
        ("UnmeshedFallback", fallback),
    ];
    // Nobody without a sidecar calls a gateway.
    let all = all.into_iter().filter(|(type_, _)| p.kind == ParentKind::Service || *type_ != "UnmeshedFallback");
    all.map(|(type_, words)| condition(type_, words, route.generation, before)).collect()
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn in_force(p: Option<Programmed>) -> Words {
    match p {
        Some(Programmed::InForce { agents, sidecars }) => (
            "True",
            "Acknowledged",
            format!("in force at {} and {}", count(agents, "node"), count(sidecars, "sidecar")),
        ),
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
    /// Says once how long a route's change took until the last member that must have it had it.
    fn observe(&self, current: &Published, route: &RouteStatus) {
        for name in route.parents.iter().filter_map(|p| p.compiled.as_ref()) {
            self.observe_compiled(current, name);
        }
    }

    fn observe_compiled(&self, current: &Published, name: &Name) {
        let Some((generation, required, changed)) = current.since.get(name).copied() else { return };
        if !matches!(programmed(self, current, name), Some(Programmed::InForce { .. })) {
            return;
        }
        let mut seen = self.observed.lock().expect("no holder panics");
        if seen.insert(name.clone(), (generation, required)) != Some((generation, required)) {
            let ms = changed.elapsed().as_millis();
            tracing::info!(route = %name, generation, ms, "in force everywhere");
        }
    }
}

/// What has been reported as in force: generation and revision.
pub type Observed = std::collections::HashMap<Name, (i64, Revision)>;
