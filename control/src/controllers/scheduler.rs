//! The scheduler's shell: keeps the scheduler's view of the cluster current, takes waiting pods in order, binds what was
//! decided, and says why when nothing can be.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Shared, pod_over};
use crate::api::cache::{Change, Heard};
use crate::api::client::{Notice, Object};
use crate::api::registry::Patch;
use crate::api::status::ApiError;
use crate::api::value::rfc3339;
use crate::schedule::{Cluster, NodeInfo, PodInfo};

/// Binds in flight: they share the store's syncs.
const IN_FLIGHT: usize = 512;
/// Pods that found no node are looked at again this long after something changed.
const RETRY: Duration = Duration::from_millis(100);
const SCHEDULER: &str = "default-scheduler";

/// Priority (higher first), creation time, key.
type Place = (std::cmp::Reverse<i32>, Timestamp, String, String);

/// A bind that has ended: the pod, its node, and how.
struct Bind {
    pod: Arc<Pod>,
    node: String,
    result: Result<u64, ApiError>,
}

/// A decision.
struct Decided {
    at: (String, String),
    info: PodInfo,
    node: String,
}

struct Scheduler {
    shared: Shared,
    /// Where binds tell how they ended; never more than [`IN_FLIGHT`] are on their way.
    bound: mpsc::UnboundedSender<Bind>,
    in_flight: usize,
    /// Decisions that the copy of the pods does not show yet, by uid.
    decided: HashMap<String, Decided>,
    cluster: Cluster,
    waiting: BTreeMap<Place, Arc<Pod>>,
    /// Looked at since the cluster last changed, and found no node.
    stuck: BTreeSet<Place>,
    retry_at: Option<Instant>,
    /// At which node to begin to look.
    start: usize,
}

/// Runs for ever.
pub(super) async fn run(shared: Shared) {
    let (mut pods, mut nodes) = (shared.caches.pods.listen(), shared.caches.nodes.listen());
    let (bound, mut results) = mpsc::unbounded_channel();
    let mut scheduler = Scheduler {
        shared,
        bound,
        in_flight: 0,
        decided: HashMap::new(),
        cluster: Cluster::default(),
        waiting: BTreeMap::new(),
        stuck: BTreeSet::new(),
        retry_at: None,
        start: 0,
    };
    scheduler.look_at_everything();
    loop {
        scheduler.work().await;
        let retry = scheduler.retry_at.unwrap_or_else(|| Instant::now() + Duration::from_secs(60));
        tokio::select! {
            heard = pods.next() => match heard {
                Heard::Change(change) => scheduler.pod_changed(&change),
                Heard::Everything => scheduler.look_at_everything(),
            },
            heard = nodes.next() => match heard {
                Heard::Change(change) => scheduler.node_changed(&change),
                Heard::Everything => scheduler.look_at_everything(),
            },
            Some(bind) = results.recv() => scheduler.bind_ended(bind),
            () = tokio::time::sleep_until(retry) => {
                scheduler.retry_at = None;
                scheduler.stuck.clear();
            }
        }
    }
}

impl Scheduler {
    fn look_at_everything(&mut self) {
        self.cluster = Cluster::default();
        self.waiting.clear();
        self.stuck.clear();
        for node in self.shared.caches.nodes.all() {
            self.cluster.set_node(NodeInfo::new(&node));
        }
        // What was decided and is not in view yet counts; what has gone meanwhile does not.
        let pods = &self.shared.caches.pods;
        self.decided.retain(|uid, decided| {
            let (namespace, name) = &decided.at;
            pods.get(namespace, name).is_some_and(|pod| pod.uid() == uid)
        });
        for decided in self.decided.values() {
            self.cluster.place(&decided.info, &decided.node);
        }
        for pod in self.shared.caches.pods.all() {
            self.pod_changed(&Change { old: None, new: Some(pod) });
        }
    }

    fn node_changed(&mut self, change: &Change<Node>) {
        match &change.new {
            Some(node) => self.cluster.set_node(NodeInfo::new(node)),
            None => self.cluster.remove_node(change.object().name()),
        }
        self.retry_soon();
    }

    fn pod_changed(&mut self, change: &Change<Pod>) {
        if let Some(old) = &change.old {
            self.waiting.remove(&place_of(old));
            let replaced = change.new.as_ref().is_none_or(|new| new.uid() != old.uid());
            if replaced {
                self.decided.remove(old.uid());
                self.cluster.remove(old.uid());
                self.retry_soon();
            }
        }
        let Some(pod) = &change.new else { return };
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
        if pod_over(pod) {
            self.cluster.remove(pod.uid());
            self.retry_soon();
        } else if !node.is_empty() {
            self.decided.remove(pod.uid());
            if self.cluster.node_of(pod.uid()) != Some(node.as_str()) {
                self.cluster.place(&PodInfo::new(pod), &node);
            }
        } else if waits(pod) {
            let place = place_of(pod);
            let same_spec = change.old.as_ref().is_some_and(|old| old.spec == pod.spec && old.uid() == pod.uid());
            if !same_spec {
                self.stuck.remove(&place);
            }
            self.waiting.insert(place, pod.clone());
        }
    }

    fn retry_soon(&mut self) {
        if !self.stuck.is_empty() {
            self.retry_at.get_or_insert_with(|| Instant::now() + RETRY);
        }
    }

    /// Decides on pods that have not been looked at, as many as may be on their way.
    async fn work(&mut self) {
        let all = self.waiting.iter().filter(|(place, _)| !self.stuck.contains(place));
        let room = IN_FLIGHT - self.in_flight;
        let batch: Vec<(Place, Arc<Pod>)> = all.take(room).map(|(place, pod)| (place.clone(), pod.clone())).collect();
        for (place, pod) in batch {
            if self.cluster.node_of(pod.uid()).is_some() {
                // Bound, and the cache will say so soon.
                self.waiting.remove(&place);
                continue;
            }
            let info = PodInfo::new(&pod);
            // A step that shares no factor with usual cluster sizes visits all nodes.
            self.start = self.start.wrapping_add(101);
            match self.cluster.choose(&info, self.start) {
                Ok(node) => {
                    self.cluster.place(&info, &node);
                    self.waiting.remove(&place);
                    let at = (pod.namespace().to_owned(), pod.name().to_owned());
                    self.decided.insert(pod.uid().to_owned(), Decided { at, info, node: node.clone() });
                    self.bind(pod, node);
                }
                Err(why) => {
                    self.stuck.insert(place);
                    self.tell_unschedulable(&pod, why).await;
                }
            }
        }
    }

    fn bind(&mut self, pod: Arc<Pod>, node: String) {
        let (client, bound) = (self.shared.client.clone(), self.bound.clone());
        self.in_flight += 1;
        tokio::spawn(async move {
            let result = client.bind(&pod, &node).await;
            // Nobody waits for it any more when the service stops.
            let _ = bound.send(Bind { pod, node, result });
        });
    }

    fn bind_ended(&mut self, Bind { pod, node, result }: Bind) {
        self.in_flight -= 1;
        match result {
            Ok(_) => {
                let message = format!("Successfully assigned {}/{} to {node}", pod.namespace(), pod.name());
                self.tell(&pod, "Normal", "Scheduled", &message);
            }
            Err(error) => {
                tracing::debug!(pod = pod.name(), node, %error, "bind");
                self.decided.remove(pod.uid());
                self.cluster.remove(pod.uid());
                // It changed meanwhile; what it is now comes, or has come, through the cache.
                if let Some(now) = self.shared.caches.pods.get(pod.namespace(), pod.name()) {
                    self.pod_changed(&Change { old: None, new: Some(now) });
                }
            }
        }
    }

    fn tell(&self, pod: &Pod, kind: &str, reason: &str, message: &str) {
        self.shared.client.named(SCHEDULER).notice(pod, &Notice { kind, reason, message });
    }

    async fn tell_unschedulable(&self, pod: &Arc<Pod>, why: String) {
        let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        let known = conditions.into_iter().flatten().any(|condition| {
            condition.type_ == "PodScheduled"
                && condition.status == "False"
                && condition.message.as_deref() == Some(why.as_str())
        });
        if known {
            return;
        }
        let condition = json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why,
            "lastTransitionTime": rfc3339(Timestamp::now())});
        let patch = Patch::Strategic(json!({"metadata": {"uid": pod.uid()}, "status": {"conditions": [condition]}}));
        let result = self.shared.client.patch::<Pod>(pod.namespace(), pod.name(), "status", &patch).await;
        if let Err(error) = result {
            tracing::debug!(pod = pod.name(), %error, "condition");
        }
        self.tell(pod, "Warning", "FailedScheduling", &why);
    }
}

/// The pod is ours to place.
fn waits(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let ours = spec.scheduler_name.as_deref().is_none_or(|name| name == SCHEDULER);
    let gated = spec.scheduling_gates.as_ref().is_some_and(|gates| !gates.is_empty());
    ours && !gated && !pod.deleting()
}

fn place_of(pod: &Pod) -> Place {
    let priority = pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or_default();
    let created = pod.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    (std::cmp::Reverse(priority), created, pod.namespace().to_owned(), pod.name().to_owned())
}
