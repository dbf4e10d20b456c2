//! Nodes: a pod range for each, and what to do when one is no longer heard of: not ready, tainted, its pods evicted after
//! what they tolerate; pods of nodes that are gone are removed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tokio::time::Instant;

use super::{Shared, pod_over};
use crate::api::client::{Notice, Object};
use crate::api::registry::{DeleteOptions, Patch};
use crate::api::status::ApiError;
use crate::api::value::rfc3339;
use crate::range::{Cidr, Family};

/// How often clocks are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Changes of nodes that come within this are looked at together.
const GATHER: Duration = Duration::from_millis(50);
/// Writes at a time: they share the store's syncs.
const PARALLEL: usize = 64;
/// Finished pods kept for a look at their logs; beyond it the oldest go.
const FINISHED_KEPT: usize = 1_000;
const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const SILENT: &str = "NodeStatusUnknown";
/// What a pod tolerates if it says nothing; the service's setting stands for this number.
const DEFAULT_TOLERATION_S: i64 = 300;

/// When a node's lease was last seen to change, by our own clock: nodes' clocks may be wrong.
struct Heartbeat {
    renewed: String,
    seen: Instant,
}

/// Runs for ever.
pub(super) async fn run(shared: Shared) {
    let mut heartbeats: HashMap<String, Heartbeat> = HashMap::new();
    let mut nodes = shared.caches.nodes.listen();
    let mut next_tick = Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(next_tick) => {}
            _ = nodes.next() => tokio::time::sleep(GATHER).await,
        }
        nodes.skip();
        let tick = Instant::now() >= next_tick;
        if tick {
            next_tick = Instant::now() + TICK;
        }
        if let Err(error) = look(&shared, &mut heartbeats, tick).await {
            tracing::warn!(%error, "node controller; tried again");
        }
    }
}

async fn look(shared: &Shared, heartbeats: &mut HashMap<String, Heartbeat>, pods_too: bool) -> Result<(), ApiError> {
    let nodes = shared.caches.nodes.all();
    give_ranges(shared, &nodes).await?;
    let now = Instant::now();
    for node in &nodes {
        let silent = silent(shared, heartbeats, node, now);
        settle(shared, node, silent).await?;
    }
    heartbeats.retain(|name, _| nodes.iter().any(|node| node.name() == name));
    if pods_too {
        evict(shared, &nodes).await?;
        collect(shared, &nodes).await?;
    }
    Ok(())
}

/// Whether the node has not renewed its lease for the grace period.
fn silent(shared: &Shared, heartbeats: &mut HashMap<String, Heartbeat>, node: &Node, now: Instant) -> bool {
    let lease = shared.caches.leases.get("kube-node-lease", node.name());
    let renewed =
        lease.as_ref().and_then(|lease| lease.spec.as_ref()?.renew_time.as_ref().map(|time| time.0.to_string()));
    let renewed = renewed.unwrap_or_default();
    let heartbeat =
        heartbeats.entry(node.name().to_owned()).or_insert(Heartbeat { renewed: renewed.clone(), seen: now });
    if heartbeat.renewed != renewed {
        *heartbeat = Heartbeat { renewed, seen: now };
    }
    now.duration_since(heartbeat.seen) > shared.config.node_grace
}

/// PURE: length of the prefix of one node's part of a range.
fn node_prefix(range: Cidr) -> u8 {
    match range.family() {
        Family::V4 => 24,
        Family::V6 => range.prefix().saturating_add(8).clamp(64, 120),
    }
}

/// PURE: the free parts of a range of pods, lowest first; the first of all is left to the cluster itself.
fn free_ranges(range: Cidr, taken: &HashSet<String>) -> impl Iterator<Item = String> {
    let prefix = node_prefix(range);
    let count = 1_u128 << prefix.saturating_sub(range.prefix());
    let size = 1_u128 << (range.family().bits() - prefix);
    let candidate = move |n: u128| format!("{}/{prefix}", range.nth(n * size));
    (1..count).map(candidate).filter(move |candidate| !taken.contains(candidate))
}

/// The ranges that a node has, as they would be written here.
fn ranges_of(node: &Node) -> Vec<String> {
    let Some(spec) = node.spec.as_ref() else { return vec![] };
    let all = spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr);
    all.map(|text| text.parse::<Cidr>().map_or_else(|_| text.clone(), |range| range.to_string())).collect()
}

async fn give_ranges(shared: &Shared, nodes: &[Arc<Node>]) -> Result<(), ApiError> {
    let lacking = |node: &&Arc<Node>| ranges_of(node).is_empty() && !node.deleting();
    if !nodes.iter().any(|node| lacking(&node)) {
        return Ok(());
    }
    let taken: HashSet<String> = nodes.iter().flat_map(|node| ranges_of(node)).collect();
    let mut free: Vec<_> = shared.config.pod_cidr.iter().map(|range| free_ranges(range, &taken)).collect();
    let mut writes: Vec<BoxFuture<'_, Result<Node, ApiError>>> = Vec::new();
    for node in nodes.iter().filter(lacking) {
        // All or none: what a node has is never added to.
        let Some(ranges) = free.iter_mut().map(Iterator::next).collect::<Option<Vec<String>>>() else {
            let message = format!("no free range left in {}", shared.config.pod_cidr);
            shared.client.notice(&**node, &Notice { kind: "Warning", reason: "CIDRNotAvailable", message: &message });
            continue;
        };
        let change = json!({"metadata": {"uid": node.uid()}, "spec": {"podCIDR": ranges[0], "podCIDRs": ranges}});
        writes.push(Box::pin(shared.client.merge::<Node>("", node.name(), "", change)));
    }
    let written: Vec<_> = futures::stream::iter(writes).buffer_unordered(PARALLEL).collect().await;
    for node in written {
        // The next look must see what this one gave.
        shared.caches.nodes.wait_for(node?.revision()).await;
    }
    Ok(())
}

fn ready(node: &Node) -> Option<&NodeCondition> {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().find(|condition| condition.type_ == "Ready")
}

/// PURE: the taints a node should have, given its condition.
fn taints(node: &Node, status: &str, now: Timestamp) -> Vec<Taint> {
    let old = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
    let key = match status {
        "True" => None,
        "Unknown" => Some(UNREACHABLE),
        _ => Some(NOT_READY),
    };
    let ours = |taint: &Taint| taint.key == UNREACHABLE || taint.key == NOT_READY;
    let mut taints: Vec<Taint> = old.iter().filter(|taint| !ours(taint)).cloned().collect();
    for (key, effect) in key.into_iter().flat_map(|key| [(key, "NoSchedule"), (key, "NoExecute")]) {
        let known = old.iter().find(|taint| taint.key == key && taint.effect == effect).cloned();
        taints.push(known.unwrap_or_else(|| Taint {
            key: key.to_owned(),
            effect: effect.to_owned(),
            time_added: Some(Time(now)),
            value: None,
        }));
    }
    taints
}

/// Brings a node's condition and taints in line with whether it is heard of.
async fn settle(shared: &Shared, node: &Arc<Node>, silent: bool) -> Result<(), ApiError> {
    let condition = ready(node);
    let told_silent = condition.is_some_and(|condition| condition.reason.as_deref() == Some(SILENT));
    let status = condition.map_or("Unknown", |condition| condition.status.as_str()).to_owned();
    let (status, reason, message) = match (silent, told_silent) {
        (true, false) => ("Unknown", SILENT, "Kubelet stopped posting node status."),
        // Its agent is back and speaks for the node again, first of all by its lease.
        (false, true) => ("True", "KubeletReady", "kubelet is posting ready status"),
        _ => (status.as_str(), "", ""),
    };
    if !reason.is_empty() {
        let now = rfc3339(Timestamp::now());
        let condition = json!({"type": "Ready", "status": status, "reason": reason, "message": message,
            "lastTransitionTime": now});
        let patch = Patch::Strategic(json!({"status": {"conditions": [condition]}}));
        let written = shared.client.patch::<Node>("", node.name(), "status", &patch).await?;
        shared.caches.nodes.wait_for(written.revision()).await;
        let (reason, message) = match status {
            "True" => ("NodeReady", format!("Node {} status is now: NodeReady", node.name())),
            _ => ("NodeNotReady", format!("Node {} status is now: NodeNotReady", node.name())),
        };
        shared.client.notice(&**node, &Notice { kind: "Normal", reason, message: &message });
    }
    let Some(node) = shared.caches.nodes.get("", node.name()) else { return Ok(()) };
    // A node that has never said anything yet is starting; the scheduler waits for it anyway.
    if ready(&node).is_none() {
        return Ok(());
    }
    let wanted = taints(&node, status, Timestamp::now());
    if node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default() != wanted {
        let change =
            json!({"metadata": {"resourceVersion": node.metadata.resource_version}, "spec": {"taints": wanted}});
        match shared.client.merge::<Node>("", node.name(), "", change).await {
            Ok(written) => shared.caches.nodes.wait_for(written.revision()).await,
            // It changed meanwhile; the next look sees it.
            Err(error) if error.is_conflict() || error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// PURE: seconds a pod stays on a node with this taint, from when the taint came; `None` = for ever.
fn tolerated_s(pod: &Pod, taint: &Taint, default_s: i64) -> Option<i64> {
    let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.as_ref());
    let matching = tolerations.into_iter().flatten().filter(|t| crate::schedule::tolerates(t, taint));
    let seconds: Vec<Option<i64>> = matching.map(|toleration| toleration.toleration_seconds).collect();
    match seconds.as_slice() {
        [] => Some(0),
        all => all.iter().flatten().min().map(|s| if *s == DEFAULT_TOLERATION_S { default_s } else { *s }),
    }
}

/// Deletes pods that have stayed on a tainted node as long as they tolerate.
async fn evict(shared: &Shared, nodes: &[Arc<Node>]) -> Result<(), ApiError> {
    let now = Timestamp::now();
    let default_s = i64::try_from(shared.config.eviction.as_secs()).unwrap_or(i64::MAX);
    let tainted: HashMap<&str, Vec<Taint>> = nodes
        .iter()
        .filter_map(|node| {
            let all = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
            let hard: Vec<Taint> = all.into_iter().filter(|taint| taint.effect == "NoExecute").collect();
            (!hard.is_empty()).then_some((node.name(), hard))
        })
        .collect();
    if tainted.is_empty() {
        return Ok(());
    }
    for pod in shared.caches.pods.all() {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default();
        let Some(taints) = tainted.get(node).filter(|_| !pod.deleting() && !pod_over(&pod)) else { continue };
        let over = taints.iter().any(|taint| {
            let since = taint.time_added.as_ref().map_or(now, |time| time.0).as_second();
            tolerated_s(&pod, taint, default_s).is_some_and(|seconds| now.as_second() - since >= seconds)
        });
        if over {
            let message = format!("Marking for deletion Pod {}/{}", pod.namespace(), pod.name());
            shared.client.notice(&*pod, &Notice { kind: "Normal", reason: "TaintManagerEviction", message: &message });
            shared.client.delete(&*pod, DeleteOptions::default()).await?;
        }
    }
    Ok(())
}

/// Removes pods of nodes that are gone, and finished pods beyond what is kept.
async fn collect(shared: &Shared, nodes: &[Arc<Node>]) -> Result<(), ApiError> {
    let known: HashSet<&str> = nodes.iter().map(|node| node.name()).collect();
    let at_once = || DeleteOptions { grace_s: Some(0), ..DeleteOptions::default() };
    let mut finished = Vec::new();
    for pod in shared.caches.pods.all() {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
        if !node.is_empty() && !known.contains(node.as_str()) {
            // The copy of the nodes may be behind that of the pods: ask the store.
            if shared.client.get::<Node>("", &node).await?.is_none() {
                shared.client.delete(&*pod, at_once()).await?;
            }
        } else if pod_over(&pod) && !pod.deleting() {
            finished.push(pod);
        }
    }
    if finished.len() > FINISHED_KEPT {
        finished.sort_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0));
        let surplus = finished.len() - FINISHED_KEPT;
        for pod in &finished[..surplus] {
            shared.client.delete(&**pod, at_once()).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn ranges_are_given_from_the_low_end() {
        let range: Cidr = "10.244.0.0/16".parse().expect("a range");
        let taken = HashSet::from(["10.244.1.0/24".to_owned(), "10.244.3.0/24".to_owned()]);
        let free: Vec<String> = free_ranges(range, &taken).take(2).collect();
        assert_eq!(free, ["10.244.2.0/24", "10.244.4.0/24"]);
        let all = (1..256).map(|n| format!("10.244.{n}.0/24")).collect();
        assert_eq!(free_ranges(range, &all).next(), None);
        for (range, first, count) in [
            ("fd00:244::/48", "fd00:244:0:1::/64", 65_535),
            ("fd00:244::/56", "fd00:244:0:1::/64", 255),
            ("fd00:244::/64", "fd00:244:0:0:100::/72", 255),
            ("fd00:244::/112", "fd00:244::100/120", 255),
            ("10.244.0.0/24", "", 0),
            ("fd00:244::/120", "", 0),
        ] {
            let parsed: Cidr = range.parse().expect("a range");
            let none = HashSet::new();
            let mut free = free_ranges(parsed, &none);
            assert_eq!(free.next().unwrap_or_default(), first, "{range}");
            assert_eq!(free.count(), usize::saturating_sub(count, 1), "{range}");
        }
    }

    #[test]
    fn taints_follow_the_condition_and_keep_their_time() {
        let node: Node = serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": {"taints": [
            {"key": "mine", "effect": "NoSchedule"}]}}))
        .expect("a node");
        let at = |s| Timestamp::from_second(s).expect("a time");
        let silent = taints(&node, "Unknown", at(5));
        assert_eq!(silent.iter().map(|t| t.key.as_str()).collect::<Vec<_>>(), ["mine", UNREACHABLE, UNREACHABLE]);
        let mut tainted = node.clone();
        tainted.spec.get_or_insert_default().taints = Some(silent.clone());
        assert_eq!(taints(&tainted, "Unknown", at(50)), silent);
        assert_eq!(taints(&tainted, "True", at(50)).len(), 1);
    }

    #[test]
    fn tolerated_seconds() {
        let taint = Taint { key: UNREACHABLE.to_owned(), effect: "NoExecute".to_owned(), ..Taint::default() };
        let pod = |tolerations: Value| -> Pod {
            serde_json::from_value(json!({"spec": {"containers": [], "tolerations": tolerations}})).expect("a pod")
        };
        let cases = [
            (json!([]), Some(0)),
            (json!([{"key": UNREACHABLE, "operator": "Exists", "tolerationSeconds": 300}]), Some(20)),
            (json!([{"key": UNREACHABLE, "operator": "Exists", "tolerationSeconds": 5}]), Some(5)),
            (json!([{"operator": "Exists"}]), None),
        ];
        for (tolerations, want) in cases {
            assert_eq!(tolerated_s(&pod(tolerations.clone()), &taint, 20), want, "{tolerations}");
        }
    }
}
