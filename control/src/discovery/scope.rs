//! What one node's agent is sent: PURE. All services, endpoints, routes and nodes; of workloads and policies only those
//! of its node, and of gateways, which have private keys, those that pods of its node serve.

use sluice_model::{Delta, Name, Resource, ResourceKey, Snapshot, Workload};
use sluice_wire::{chunks, convert, v1};
use std::collections::HashSet;

/// What an agent is, and knows.
#[derive(Clone, Debug)]
pub struct Subscriber {
    pub node: String,
    /// It knows gateways.
    pub gateways: bool,
}

fn in_scope(r: &Resource, snapshot: &Snapshot, node: &str, gateways: &HashSet<Name>) -> bool {
    match r {
        Resource::Workload(w) => w.node == node,
        Resource::Policy(p) => snapshot.workload(&p.name).is_some_and(|w| w.node == node),
        Resource::Gateway(g) => gateways.contains(&g.name),
        _ => true,
    }
}

/// The part of `snapshot` that `subscriber` sees.
pub fn scoped(snapshot: &Snapshot, subscriber: &Subscriber) -> Snapshot {
    let node = subscriber.node.as_str();
    let here = snapshot.workloads().filter(|w| subscriber.gateways && w.node == node);
    let gateways: HashSet<Name> = here.filter_map(Workload::served).collect();
    let resources = snapshot.iter().filter(|r| in_scope(r, snapshot, node, &gateways)).cloned();
    Snapshot::from_shared(snapshot.revision, resources)
}

/// The updates that carry `delta`, the last one marked.
pub fn updates(epoch: &str, to: &Snapshot, full: bool, delta: &Delta) -> Vec<v1::Update> {
    let chunk = |changed| v1::Update {
        epoch: epoch.to_owned(),
        revision: to.revision.0,
        full,
        changed,
        ..v1::Update::default()
    };
    let changed = chunks(delta.changed.iter().map(|r| convert::resource_to_wire(r, to.revision)));
    let mut all: Vec<_> = changed.into_iter().map(chunk).collect();
    if all.is_empty() {
        all.push(chunk(vec![]));
    }
    if let Some(last) = all.last_mut() {
        last.removed = delta.removed.iter().map(|k: &ResourceKey| convert::key_to_wire(k)).collect();
        last.last = true;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::{Gateway, Policy, Revision};
    use sluice_wire::CHUNK_RESOURCES;

    fn workload(name: &str, node: &str) -> [Resource; 2] {
        let name = Name::new("ns", name);
        let policy = Policy { name: name.clone(), ..Policy::default() };
        let workload = Workload {
            name,
            uid: String::new(),
            node: node.into(),
            addresses: vec![],
            identity: "spiffe://d/ns/ns/sa/x".parse().expect("an identity"),
            meshed: true,
            gateway: None,
        };
        [Resource::Workload(workload), Resource::Policy(policy)]
    }

    fn subscriber(node: &str) -> Subscriber {
        Subscriber { node: node.into(), gateways: true }
    }

    #[test]
    fn keys_go_to_the_nodes_of_the_gateways_pods_alone() {
        let [Resource::Workload(edge), policy] = workload("edge-1", "n1") else { unreachable!("made so") };
        let edge = Resource::Workload(Workload { meshed: false, gateway: Some("edge".into()), ..edge });
        let gateway = |namespace: &str, name: &str| {
            Resource::Gateway(Gateway { name: Name::new(namespace, name), ..Gateway::default() })
        };
        let all = [edge, policy, gateway("ns", "edge"), gateway("ns", "other"), gateway("else", "edge")];
        let s = Snapshot::new(Revision(1), all);
        let sees =
            |subscriber: &Subscriber| scoped(&s, subscriber).gateways().map(|g| g.name.to_string()).collect::<Vec<_>>();
        assert_eq!(sees(&subscriber("n1")), ["ns/edge"]);
        assert!(sees(&subscriber("n2")).is_empty());
        assert!(sees(&Subscriber { gateways: false, ..subscriber("n1") }).is_empty(), "an agent that knows none");
    }

    #[test]
    fn a_node_sees_only_its_own_workloads_and_policies() {
        let s = Snapshot::new(Revision(1), [workload("a", "n1"), workload("b", "n2")].into_iter().flatten());
        let names: Vec<_> = scoped(&s, &subscriber("n1")).iter().map(|r| r.name().name.clone()).collect();
        assert_eq!(names, ["a", "a"]);
    }

    #[test]
    fn an_update_is_chunked_and_only_its_last_chunk_says_so() {
        let many = (0..CHUNK_RESOURCES + 1).flat_map(|i| workload(&format!("w{i}"), "n1"));
        let s = Snapshot::new(Revision(2), many);
        let all = updates("e", &s, true, &Snapshot::default().diff(&s));
        assert_eq!(all.len(), 3);
        assert_eq!(all.iter().map(|u| u.last).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(updates("e", &s, false, &Delta::default()).len(), 1, "an empty difference still moves the revision");
    }
}
