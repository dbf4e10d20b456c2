//! ReplicaSets: as many pods as wanted, and a status that counts them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::queue::{Key, Queue};
use super::{Shared, controller_of, owned_by, pod_over, pod_ready};
use crate::api::cache::Heard;
use crate::api::client::{Notice, Object};
use crate::api::registry::DeleteOptions;
use crate::api::status::ApiError;
use crate::api::validate::selects;

/// Pods made or deleted by one look, as Kubernetes.
const BURST: usize = 500;
/// Of these, at a time.
const PARALLEL: usize = 64;

/// What to do about a ReplicaSet.
#[derive(Debug)]
struct Plan {
    create: usize,
    delete: Vec<Arc<Pod>>,
    status: ReplicaSetStatus,
    /// A pod becomes available without anything changing.
    again_after: Option<Duration>,
}

/// PURE: `pods` are those it controls.
fn plan(set: &ReplicaSet, pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let spec = set.spec.clone().unwrap_or_default();
    let wanted = usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
    let active: Vec<Arc<Pod>> = pods.iter().filter(|pod| !pod.deleting() && !pod_over(pod)).cloned().collect();
    let min_ready_s = i64::from(spec.min_ready_seconds.unwrap_or(0));
    let waits: Vec<Option<i64>> = active.iter().map(|pod| until_available(pod, min_ready_s, now)).collect();
    let labels =
        spec.template.as_ref().and_then(|t| t.metadata.as_ref()).and_then(|m| m.labels.clone()).unwrap_or_default();
    let labelled = |pod: &&Arc<Pod>| {
        let own = pod.metadata.labels.clone().unwrap_or_default();
        labels.iter().all(|(key, value)| own.get(key) == Some(value))
    };
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let old = set.status.clone().unwrap_or_default();
    let status = ReplicaSetStatus {
        replicas: count(active.len()),
        fully_labeled_replicas: Some(count(active.iter().filter(labelled).count())),
        ready_replicas: Some(count(active.iter().filter(|pod| pod_ready(pod)).count())),
        available_replicas: Some(count(waits.iter().filter(|wait| **wait == Some(0)).count())),
        observed_generation: set.metadata.generation,
        conditions: old.conditions,
    };
    let stopping = set.deleting();
    let surplus = active.len().saturating_sub(wanted);
    Plan {
        create: if stopping { 0 } else { wanted.saturating_sub(active.len()).min(BURST) },
        delete: if stopping { Vec::new() } else { victims(active, surplus.min(BURST)) },
        status,
        again_after: waits
            .into_iter()
            .flatten()
            .filter(|s| *s > 0)
            .min()
            .and_then(|s| u64::try_from(s).ok())
            .map(Duration::from_secs),
    }
}

/// Seconds until a ready pod counts as available; `None` = not ready.
fn until_available(pod: &Pod, min_ready_s: i64, now: Timestamp) -> Option<i64> {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let ready = conditions.into_iter().flatten().find(|c| c.type_ == "Ready" && c.status == "True")?;
    if min_ready_s == 0 {
        return Some(0);
    }
    let since = ready.last_transition_time.as_ref().map_or(now, |time| time.0);
    Some((since.as_second() + min_ready_s - now.as_second()).max(0))
}

/// The pods that are missed least: not placed, not running, not ready, cheap to delete, crowded, young.
fn victims(mut pods: Vec<Arc<Pod>>, count: usize) -> Vec<Arc<Pod>> {
    if count == 0 {
        return Vec::new();
    }
    let node = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
    let mut per_node: HashMap<String, usize> = HashMap::new();
    for pod in &pods {
        *per_node.entry(node(pod)).or_default() += 1;
    }
    pods.sort_by_cached_key(|pod| {
        let status = pod.status.clone().unwrap_or_default();
        let cost = pod.metadata.annotations.as_ref().and_then(|a| a.get("controller.kubernetes.io/pod-deletion-cost"));
        let restarts: i32 = status.container_statuses.iter().flatten().map(|c| c.restart_count).sum();
        let phase = match status.phase.as_deref() {
            Some("Running") => 2,
            Some("Pending") | None => 0,
            _ => 1,
        };
        let crowd = std::cmp::Reverse(per_node.get(&node(pod)).copied().unwrap_or(0));
        let age = pod.metadata.creation_timestamp.as_ref().map_or(0, |time| -time.0.as_second());
        (
            (!node(pod).is_empty(), phase, pod_ready(pod)),
            cost.and_then(|cost| cost.parse::<i64>().ok()).unwrap_or(0),
            (crowd, -restarts, age, pod.name().to_owned()),
        )
    });
    pods.truncate(count);
    pods
}

/// A pod of the set.
fn new_pod(set: &ReplicaSet) -> Pod {
    let template = set.spec.clone().unwrap_or_default().template.unwrap_or_default();
    let metadata = template.metadata.unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", set.name())),
            namespace: Some(set.namespace().to_owned()),
            labels: metadata.labels,
            annotations: metadata.annotations,
            finalizers: metadata.finalizers,
            owner_references: Some(vec![owned_by(set)]),
            ..ObjectMeta::default()
        },
        spec: Some(template.spec.unwrap_or_default()),
        status: None,
    }
}

/// Runs for ever.
pub(super) async fn run(shared: Shared) {
    let queue = Queue::new();
    let feed = feed(shared.clone(), queue.clone());
    let work = queue.clone().run("replicaset", move |key| reconcile(shared.clone(), queue.clone(), key));
    tokio::join!(feed, work);
}

async fn feed(shared: Shared, queue: Arc<Queue>) {
    let (mut sets, mut pods) = (shared.caches.replica_sets.listen(), shared.caches.pods.listen());
    let all = || {
        for set in shared.caches.replica_sets.all() {
            queue.add((set.namespace().to_owned(), set.name().to_owned()));
        }
    };
    all();
    loop {
        tokio::select! {
            heard = sets.next() => match heard {
                Heard::Change(change) => queue.add((change.object().namespace().to_owned(), change.object().name().to_owned())),
                Heard::Everything => all(),
            },
            heard = pods.next() => match heard {
                Heard::Change(change) => {
                    for pod in [&change.old, &change.new].into_iter().flatten() {
                        match controller_of(&**pod).filter(|owner| owner.kind == "ReplicaSet") {
                            Some(owner) => queue.add((pod.namespace().to_owned(), owner.name.clone())),
                            None => matching(&shared, pod).into_iter().for_each(|key| queue.add(key)),
                        }
                    }
                }
                Heard::Everything => all(),
            },
        }
    }
}

/// Sets that would adopt a pod nobody controls.
fn matching(shared: &Shared, pod: &Pod) -> Vec<Key> {
    if controller_of(pod).is_some() || pod.deleting() {
        return Vec::new();
    }
    let sets = shared.caches.replica_sets.in_namespace(pod.namespace());
    let adopts = sets.iter().filter(|set| selects_pod(set, pod));
    adopts.map(|set| (set.namespace().to_owned(), set.name().to_owned())).collect()
}

fn selects_pod(set: &ReplicaSet, pod: &Pod) -> bool {
    let selector = set.spec.as_ref().map_or(Value::Null, |spec| json!(spec.selector));
    selector.is_object() && selects(&selector, &json!(pod.metadata.labels.clone().unwrap_or_default()))
}

async fn reconcile(shared: Shared, queue: Arc<Queue>, key: Key) -> Result<(), ApiError> {
    let Some(set) = shared.caches.replica_sets.get(&key.0, &key.1) else { return Ok(()) };
    let mine = shared.caches.pods.controlled_by(set.uid());
    let mut orphans = shared.caches.pods.controlled_by("");
    orphans.retain(|pod| pod.namespace() == key.0);
    if !set.deleting() && adopt(&shared, &set, &orphans).await? {
        queue.add(key);
        return Ok(());
    }
    let plan = plan(&set, &mine, Timestamp::now());
    let seen = tokio::join!(create(&shared, &set, plan.create), delete(&shared, &set, &plan.delete));
    let seen = seen.0?.max(seen.1?);
    let acted = plan.create > 0 || !plan.delete.is_empty();
    if set.status.as_ref() != Some(&plan.status) {
        let mut updated = (*set).clone();
        updated.status = Some(plan.status);
        let written = shared.client.update_status(&updated).await?;
        shared.caches.replica_sets.wait_for(written.revision()).await;
    }
    if acted {
        // Our own writes must be in view before the next look, or it would make the same pods again.
        shared.caches.pods.wait_for(seen).await;
        queue.add(key);
    } else if let Some(pause) = plan.again_after {
        queue.add_after(key, pause);
    }
    Ok(())
}

async fn adopt(shared: &Shared, set: &ReplicaSet, orphans: &[Arc<Pod>]) -> Result<bool, ApiError> {
    let mut adopted = false;
    for pod in orphans.iter().filter(|pod| !pod.deleting() && !pod_over(pod) && selects_pod(set, pod)) {
        let mut owners = pod.metadata.owner_references.clone().unwrap_or_default();
        owners.push(owned_by(set));
        let change = json!({"metadata": {"uid": pod.uid(), "ownerReferences": owners}});
        let written = shared.client.merge::<Pod>(pod.namespace(), pod.name(), "", change).await?;
        shared.caches.pods.wait_for(written.revision()).await;
        adopted = true;
    }
    Ok(adopted)
}

async fn create(shared: &Shared, set: &ReplicaSet, count: usize) -> Result<u64, ApiError> {
    let pod = new_pod(set);
    let one = |_| {
        let pod = &pod;
        async move { shared.client.create(pod).await }
    };
    let results: Vec<_> = futures::stream::iter(0..count).map(one).buffer_unordered(PARALLEL).collect().await;
    let revision = results.iter().flatten().map(Object::revision).max().unwrap_or(0);
    for result in results {
        match result {
            Ok(created) => {
                let message = format!("Created pod: {}", created.name());
                shared.client.notice(set, &Notice { kind: "Normal", reason: "SuccessfulCreate", message: &message });
            }
            Err(error) => {
                // What was made must be in view before it is tried again.
                shared.caches.pods.wait_for(revision).await;
                let message = format!("Error creating: {error}");
                shared.client.notice(set, &Notice { kind: "Warning", reason: "FailedCreate", message: &message });
                return Err(error);
            }
        }
    }
    Ok(revision)
}

async fn delete(shared: &Shared, set: &ReplicaSet, pods: &[Arc<Pod>]) -> Result<u64, ApiError> {
    let mut revision = 0;
    for pod in pods {
        revision = revision.max(shared.client.delete(&**pod, DeleteOptions::default()).await?);
        let message = format!("Deleted pod: {}", pod.name());
        shared.client.notice(set, &Notice { kind: "Normal", reason: "SuccessfulDelete", message: &message });
    }
    Ok(revision)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(replicas: i32) -> ReplicaSet {
        serde_json::from_value(json!({"metadata": {"name": "r", "uid": "u", "generation": 1}, "spec": {"replicas": replicas,
            "selector": {"matchLabels": {"a": "b"}}, "minReadySeconds": 0, "template": {"metadata": {"labels": {"a": "b"}}}}}))
        .expect("a set")
    }

    fn pod(name: &str, node: &str, ready: bool, change: Value) -> Arc<Pod> {
        let mut object = json!({"metadata": {"name": name, "labels": {"a": "b"}}, "spec": {"containers": [], "nodeName": node},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}});
        crate::api::patch::merge(&mut object, &change);
        Arc::new(serde_json::from_value(object).expect("a pod"))
    }

    #[test]
    fn counts_and_acts() {
        let pods = [pod("a", "n", true, json!({})), pod("b", "n", false, json!({}))];
        let plan_of = |replicas| plan(&set(replicas), &pods, Timestamp::UNIX_EPOCH);
        let up = plan_of(5);
        assert_eq!((up.create, up.delete.len()), (3, 0));
        assert_eq!((up.status.replicas, up.status.ready_replicas, up.status.available_replicas), (2, Some(1), Some(1)));
        let down = plan_of(1);
        assert_eq!(down.delete.iter().map(|p| p.name()).collect::<Vec<_>>(), ["b"]);
        let gone = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
        let failed = json!({"status": {"phase": "Failed"}});
        let dying = [pod("a", "n", true, gone), pod("b", "n", false, failed)];
        assert_eq!(plan(&set(2), &dying, Timestamp::UNIX_EPOCH).create, 2);
    }

    #[test]
    fn the_least_missed_go_first() {
        let cheap = json!({"metadata": {"annotations": {"controller.kubernetes.io/pod-deletion-cost": "-5"}}});
        let pods = vec![
            pod("ready", "n1", true, json!({})),
            pod("crowded", "n2", true, json!({})),
            pod("crowded2", "n2", true, json!({})),
            pod("cheap", "n3", true, cheap),
            pod("unready", "n3", false, json!({})),
            pod("unplaced", "", false, json!({"status": {"phase": "Pending"}})),
        ];
        let order: Vec<String> = victims(pods, 6).iter().map(|p| p.name().to_owned()).collect();
        assert_eq!(order[..3], ["unplaced", "unready", "cheap"]);
        assert_eq!(order[5], "ready");
    }

    #[test]
    fn availability_waits_for_min_ready() {
        let mut slow = set(1);
        slow.spec.as_mut().expect("spec").min_ready_seconds = Some(30);
        let since = json!({"status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "1970-01-01T00:00:00Z"}]}});
        let pods = [pod("a", "n", true, since)];
        let at = |s| plan(&slow, &pods, Timestamp::from_second(s).expect("a time"));
        assert_eq!(at(10).status.available_replicas, Some(0));
        assert_eq!(at(10).again_after, Some(Duration::from_secs(20)));
        assert_eq!(at(30).status.available_replicas, Some(1));
    }
}
