//! The cluster as the scheduler sees it: nodes with what they have and what is taken, pods by uid. PURE.

use std::collections::{BTreeMap, HashMap, HashSet};

use k8s_openapi::api::core::v1::{Node, Pod, PodSpec, Taint};

use super::filter;
use super::resources::{Resources, pod_requests};

/// Pods of a node that does not say how many it takes, as the kubelet's default.
const DEFAULT_PODS: i64 = 110;

/// A node.
#[derive(Debug, Clone)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Taints, including the one that not being ready amounts to.
    pub taints: Vec<Taint>,
    /// Cordoned.
    pub unschedulable: bool,
    /// What it has for pods.
    pub allocatable: Resources,
}

impl NodeInfo {
    /// From the object.
    pub fn new(node: &Node) -> Self {
        let spec = node.spec.clone().unwrap_or_default();
        let status = node.status.clone().unwrap_or_default();
        let mut allocatable = Resources::from_quantities(status.allocatable.as_ref().or(status.capacity.as_ref()));
        if allocatable.pods == 0 {
            allocatable.pods = DEFAULT_PODS;
        }
        let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
        let mut taints = spec.taints.unwrap_or_default();
        let known =
            taints.iter().any(|t| t.key.starts_with("node.kubernetes.io/not-ready") || t.key.ends_with("/unreachable"));
        if !ready && !known {
            let key = "node.kubernetes.io/not-ready".to_owned();
            taints.push(Taint { key, effect: "NoSchedule".to_owned(), ..Taint::default() });
        }
        NodeInfo {
            name: node.metadata.name.clone().unwrap_or_default(),
            labels: node.metadata.labels.clone().unwrap_or_default(),
            taints,
            unschedulable: spec.unschedulable.unwrap_or_default(),
            allocatable,
        }
    }
}

/// A pod, as far as placing it goes.
#[derive(Debug, Clone)]
pub struct PodInfo {
    /// Its uid.
    pub uid: String,
    /// What it takes.
    pub requests: Resources,
    /// What its pods are spread by: the controlling owner, or nothing.
    pub owner: Option<String>,
    /// Ports of the node it takes: protocol and number.
    pub host_ports: Vec<(String, i32)>,
    /// Its spec, for what is not a number.
    pub spec: PodSpec,
}

impl PodInfo {
    /// From the object.
    pub fn new(pod: &Pod) -> Self {
        let spec = pod.spec.clone().unwrap_or_default();
        let owners = pod.metadata.owner_references.iter().flatten();
        let ports = spec.containers.iter().flat_map(|container| container.ports.iter().flatten());
        let port = |port: &k8s_openapi::api::core::v1::ContainerPort| {
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            port.host_port.filter(|number| *number > 0).map(|number| (protocol, number))
        };
        PodInfo {
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            requests: pod_requests(&spec),
            owner: owners.clone().find(|owner| owner.controller == Some(true)).map(|owner| owner.uid.clone()),
            host_ports: ports.filter_map(port).collect(),
            spec,
        }
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct Taken {
    pub(super) resources: Resources,
    pub(super) host_ports: HashSet<(String, i32)>,
}

#[derive(Debug, Clone)]
struct Placed {
    node: String,
    requests: Resources,
    owner: Option<String>,
    host_ports: Vec<(String, i32)>,
}

/// Nodes, and which pods are on them. A pod may be placed on a node that is not known yet.
#[derive(Debug, Clone, Default)]
pub struct Cluster {
    nodes: BTreeMap<String, NodeInfo>,
    taken: HashMap<String, Taken>,
    placed: HashMap<String, Placed>,
    /// Pods per node of each owner.
    by_owner: HashMap<String, HashMap<String, u32>>,
}

impl Cluster {
    /// Adds or replaces a node.
    pub fn set_node(&mut self, node: NodeInfo) {
        self.nodes.insert(node.name.clone(), node);
    }

    /// Removes a node; pods on it stay counted until they are gone.
    pub fn remove_node(&mut self, name: &str) {
        self.nodes.remove(name);
    }

    /// How many nodes there are.
    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// Counts a pod on a node. Placing it again, there or elsewhere, counts it once.
    pub fn place(&mut self, pod: &PodInfo, node: &str) {
        self.remove(&pod.uid);
        let taken = self.taken.entry(node.to_owned()).or_default();
        taken.resources.add(&pod.requests);
        taken.host_ports.extend(pod.host_ports.iter().cloned());
        if let Some(owner) = &pod.owner {
            *self.by_owner.entry(owner.clone()).or_default().entry(node.to_owned()).or_default() += 1;
        }
        let placed = Placed {
            node: node.to_owned(),
            requests: pod.requests.clone(),
            owner: pod.owner.clone(),
            host_ports: pod.host_ports.clone(),
        };
        self.placed.insert(pod.uid.clone(), placed);
    }

    /// Stops counting a pod.
    pub fn remove(&mut self, uid: &str) {
        let Some(pod) = self.placed.remove(uid) else { return };
        if let Some(owner) = &pod.owner {
            self.forget_owner(owner, &pod.node);
        }
        let Some(taken) = self.taken.get_mut(&pod.node) else { return };
        taken.resources.subtract(&pod.requests);
        for port in &pod.host_ports {
            taken.host_ports.remove(port);
        }
        if taken.resources.pods == 0 {
            self.taken.remove(&pod.node);
        }
    }

    fn forget_owner(&mut self, owner: &str, node: &str) {
        let Some(nodes) = self.by_owner.get_mut(owner) else { return };
        if let Some(count) = nodes.get_mut(node) {
            *count -= 1;
            if *count == 0 {
                nodes.remove(node);
            }
        }
        if nodes.is_empty() {
            self.by_owner.remove(owner);
        }
    }

    /// Where a pod is counted.
    pub fn node_of(&self, uid: &str) -> Option<&str> {
        self.placed.get(uid).map(|placed| placed.node.as_str())
    }

    /// The best node for a pod, or why there is none. In a large cluster the best of enough nodes, as kube-scheduler
    /// does; `start` says where to begin, so that all nodes get their turn.
    pub fn choose(&self, pod: &PodInfo, start: usize) -> Result<String, String> {
        let empty = Taken::default();
        let no_pods = HashMap::new();
        let siblings = pod.owner.as_ref().and_then(|owner| self.by_owner.get(owner)).unwrap_or(&no_pods);
        let most = siblings.values().max().copied().unwrap_or(0);
        let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
        let mut best: Option<(i64, i64, &str)> = None;
        let mut enough = enough(self.nodes.len());
        let start = start.checked_rem(self.nodes.len()).unwrap_or(0);
        for node in self.nodes.values().skip(start).chain(self.nodes.values().take(start)) {
            let taken = self.taken.get(&node.name).unwrap_or(&empty);
            let refused = filter::refusals(pod, node, taken);
            if refused.is_empty() {
                let same = siblings.get(&node.name).copied().unwrap_or(0);
                let score = score(pod, node, taken, same, most);
                // Equal scores: the emptier node, then the first.
                let candidate = (score, -taken.resources.pods, node.name.as_str());
                if best.is_none_or(|best| (candidate.0, candidate.1) > (best.0, best.1)) {
                    best = Some(candidate);
                }
                enough -= 1;
                if enough == 0 {
                    break;
                }
            }
            for reason in refused {
                *reasons.entry(reason).or_default() += 1;
            }
        }
        match best {
            Some((_, _, name)) => Ok(name.to_owned()),
            None => Err(filter::unavailable_message(self.nodes.len(), &reasons)),
        }
    }

    /// Nothing is counted anywhere.
    pub fn taken_is_empty(&self) -> bool {
        self.taken.is_empty() && self.placed.is_empty() && self.by_owner.is_empty()
    }

    /// A node that has more taken than it has, if any.
    pub fn overcommitted(&self) -> Option<&str> {
        let over = |node: &&NodeInfo| {
            self.taken.get(&node.name).is_some_and(|taken| {
                let mut left = node.allocatable.clone();
                left.subtract(&taken.resources);
                left.cpu_milli < 0 || left.memory < 0 || left.ephemeral < 0 || left.pods < 0
            })
        };
        self.nodes.values().find(over).map(|node| node.name.as_str())
    }
}

/// How many nodes that fit are compared: all of up to a hundred, then a share that falls to 5 %.
fn enough(nodes: usize) -> usize {
    let percent = 50_usize.saturating_sub(nodes / 125).max(5);
    (nodes * percent / 100).max(100)
}

/// 0..=300: up to 100 for what is left of CPU and memory, up to 200 for holding few pods of the same owner.
fn score(pod: &PodInfo, node: &NodeInfo, taken: &Taken, same: u32, most: u32) -> i64 {
    let left = |have: i64, used: i64, want: i64| {
        if have <= 0 { 0 } else { (have.saturating_sub(used).saturating_sub(want)).max(0).saturating_mul(100) / have }
    };
    let (have, used, want) = (&node.allocatable, &taken.resources, &pod.requests);
    let cpu = left(have.cpu_milli, used.cpu_milli, want.cpu_milli);
    let memory = left(have.memory, used.memory, want.memory);
    let spread = if most == 0 { 200 } else { 200 * i64::from(most - same.min(most)) / i64::from(most) };
    (cpu + memory) / 2 + spread
}
