//! Whether a node can take a pod, and if not, why: kube-scheduler's reasons in its words. PURE.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm, Taint, Toleration};

use super::cluster::{NodeInfo, PodInfo, Taken};

/// Why a node does not take a pod; empty if it does. Like kube-scheduler, the first filter that refuses speaks; only
/// the amounts that are missing are told all together.
pub(super) fn refusals(pod: &PodInfo, node: &NodeInfo, taken: &Taken) -> Vec<String> {
    if node.unschedulable && !tolerates_all(&pod.spec.tolerations, &cordon()) {
        return vec!["node(s) were unschedulable".to_owned()];
    }
    let hard = |taint: &&Taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute");
    if let Some(taint) = node.taints.iter().filter(hard).find(|taint| !tolerates_all(&pod.spec.tolerations, taint)) {
        let value = taint.value.as_deref().unwrap_or_default();
        return vec![format!("node(s) had untolerated taint {{{}: {value}}}", taint.key)];
    }
    if !selected(pod, node) {
        return vec!["node(s) didn't match Pod's node affinity/selector".to_owned()];
    }
    if pod.host_ports.iter().any(|port| taken.host_ports.contains(port)) {
        return vec!["node(s) didn't have free ports for the requested pod ports".to_owned()];
    }
    node.allocatable.missing(&taken.resources, &pod.requests)
}

fn cordon() -> Taint {
    let key = "node.kubernetes.io/unschedulable".to_owned();
    Taint { key, effect: "NoSchedule".to_owned(), ..Taint::default() }
}

fn tolerates_all(tolerations: &Option<Vec<Toleration>>, taint: &Taint) -> bool {
    tolerations.iter().flatten().any(|toleration| tolerates(toleration, taint))
}

/// Whether a toleration covers a taint.
pub(crate) fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    let exists = toleration.operator.as_deref() == Some("Exists");
    let same_value = toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default();
    (effect.is_empty() || effect == taint.effect)
        && (if key.is_empty() { exists } else { key == taint.key })
        && (exists || same_value)
}

fn selected(pod: &PodInfo, node: &NodeInfo) -> bool {
    let mut labels = pod.spec.node_selector.iter().flatten();
    if !labels.all(|(key, value)| node.labels.get(key) == Some(value)) {
        return false;
    }
    let affinity = pod.spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    required.is_none_or(|selector| selector.node_selector_terms.iter().any(|term| term_selects(term, node)))
}

fn term_selects(term: &NodeSelectorTerm, node: &NodeInfo) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    // A term that says nothing selects nothing.
    !(expressions.is_empty() && fields.is_empty())
        && expressions.iter().all(|requirement| requirement_holds(requirement, node.labels.get(&requirement.key)))
        && fields.iter().all(|requirement| {
            requirement_holds(requirement, Some(&node.name).filter(|_| requirement.key == "metadata.name"))
        })
}

fn requirement_holds(requirement: &NodeSelectorRequirement, found: Option<&String>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let numbers = || {
        let wanted: i64 = values.first()?.parse().ok()?;
        Some((found?.parse::<i64>().ok()?, wanted))
    };
    match requirement.operator.as_str() {
        "In" => found.is_some_and(|found| values.contains(found)),
        "NotIn" => found.is_none_or(|found| !values.contains(found)),
        "Exists" => found.is_some(),
        "DoesNotExist" => found.is_none(),
        "Gt" => numbers().is_some_and(|(found, wanted)| found > wanted),
        "Lt" => numbers().is_some_and(|(found, wanted)| found < wanted),
        _ => false,
    }
}

/// `0/3 nodes are available: 2 Insufficient cpu, 1 node(s) were unschedulable.`
pub fn unavailable_message(nodes: usize, reasons: &BTreeMap<String, usize>) -> String {
    if nodes == 0 {
        return "no nodes available to schedule pods".to_owned();
    }
    let mut each: Vec<String> = reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    each.sort();
    format!("0/{nodes} nodes are available: {}.", each.join(", "))
}

#[cfg(test)]
mod tests {
    use super::super::{Cluster, Resources};
    use super::*;
    use serde_json::{Value, json};

    fn node(name: &str, change: Value) -> NodeInfo {
        let mut object = json!({"metadata": {"name": name, "labels": {"zone": name}}, "status": {
            "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True"}]}});
        crate::api::patch::merge(&mut object, &change);
        NodeInfo::new(&serde_json::from_value(object).expect("a node"))
    }

    fn pod(uid: &str, spec: Value) -> PodInfo {
        let mut object = json!({"metadata": {"uid": uid, "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "owner", "controller": true}]}, "spec":
            {"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]}});
        crate::api::patch::merge(&mut object["spec"], &spec);
        PodInfo::new(&serde_json::from_value(object).expect("a pod"))
    }

    fn three() -> Cluster {
        let mut cluster = Cluster::default();
        for name in ["a", "b", "c"] {
            cluster.set_node(node(name, json!({})));
        }
        cluster
    }

    #[test]
    fn twelve_pods_fill_three_nodes_evenly_and_the_thirteenth_waits() {
        let mut cluster = three();
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for index in 0..12 {
            let pod = pod(&index.to_string(), json!({}));
            let node = cluster.choose(&pod, 0).expect("fits");
            *counts.entry(node.clone()).or_default() += 1;
            cluster.place(&pod, &node);
        }
        assert_eq!(counts.values().copied().collect::<Vec<_>>(), [4, 4, 4]);
        let error = cluster.choose(&pod("13", json!({})), 0).expect_err("full");
        assert_eq!(error, "0/3 nodes are available: 3 Insufficient cpu.");
        cluster.set_node(node("d", json!({})));
        assert_eq!(cluster.choose(&pod("13", json!({})), 0), Ok("d".to_owned()));
    }

    #[test]
    fn reasons_read_like_kube_scheduler() {
        let tainted = json!({"spec": {"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]}});
        let cases = [
            (json!({"spec": {"unschedulable": true}}), json!({}), "1 node(s) were unschedulable"),
            (tainted.clone(), json!({}), "1 node(s) had untolerated taint {k: v}"),
            (json!({}), json!({"nodeSelector": {"zone": "x"}}), "1 node(s) didn't match Pod's node affinity/selector"),
            (
                json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}),
                json!({}),
                "1 node(s) had untolerated taint {node.kubernetes.io/not-ready: }",
            ),
            (json!({"status": {"allocatable": {"pods": "0", "cpu": "0"}}}), json!({}), "1 Insufficient cpu"),
        ];
        for (change, spec, want) in cases {
            let mut cluster = Cluster::default();
            cluster.set_node(node("a", change));
            let error = cluster.choose(&pod("p", spec), 0).expect_err(want);
            assert_eq!(error, format!("0/1 nodes are available: {want}."));
        }
        let mut cluster = Cluster::default();
        cluster.set_node(node("a", tainted));
        let tolerant = json!({"tolerations": [{"key": "k", "operator": "Exists"}]});
        assert!(cluster.choose(&pod("p", tolerant), 0).is_ok());
        assert_eq!(
            Cluster::default().choose(&pod("p", json!({})), 0),
            Err("no nodes available to schedule pods".to_owned())
        );
    }

    #[test]
    fn affinity_and_host_ports() {
        let mut cluster = three();
        let affine = json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
            {"nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["b"]}]}]}}}});
        assert_eq!(cluster.choose(&pod("p", affine), 0), Ok("b".to_owned()));
        let port = json!({"containers": [{"name": "c", "ports": [{"containerPort": 1, "hostPort": 80}]}]});
        for index in 0..3 {
            let pod = pod(&index.to_string(), port.clone());
            let node = cluster.choose(&pod, 0).expect("a port is free");
            cluster.place(&pod, &node);
        }
        assert!(cluster.choose(&pod("4", port), 0).expect_err("taken").contains("free ports"));
    }

    #[test]
    fn never_over_allocated_over_many_random_pods() {
        use rand::{Rng, SeedableRng};
        let mut rng = rand::rngs::StdRng::seed_from_u64(7);
        let mut cluster = Cluster::default();
        for index in 0..20 {
            let cpu = rng.random_range(1..16);
            let change = json!({"status": {"allocatable": {"cpu": cpu.to_string(), "memory": format!("{}Gi", cpu * 2), "pods": "30"}}});
            cluster.set_node(node(&format!("n{index}"), change));
        }
        let mut alive: Vec<String> = Vec::new();
        let base = pod("x", json!({}));
        for index in 0..100_000 {
            let mut pod = base.clone();
            pod.uid = index.to_string();
            pod.owner = rng.random_bool(0.7).then(|| format!("o{}", rng.random_range(0..50)));
            pod.requests = Resources {
                cpu_milli: rng.random_range(0..2_000),
                memory: rng.random_range(0..4 << 30),
                pods: 1,
                ..Resources::default()
            };
            if let Ok(node) = cluster.choose(&pod, 0) {
                cluster.place(&pod, &node);
                alive.push(pod.uid);
            }
            if alive.len() > 150 || rng.random_bool(0.3) && !alive.is_empty() {
                let gone = alive.swap_remove(rng.random_range(0..alive.len()));
                cluster.remove(&gone);
            }
            assert_eq!(cluster.overcommitted(), None, "after pod {index}");
        }
        for uid in alive {
            cluster.remove(&uid);
        }
        assert!(cluster.taken_is_empty());
    }
}
