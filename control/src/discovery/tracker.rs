//! Who has acknowledged what: PURE. A route is in force when every live member that must have it says so: all agents of
//! ready nodes, and the sidecars there that hold it. Members leave only by being gone, never by being slow.

use sluice_model::{Name, Revision};
use std::collections::BTreeMap;

/// A sidecar, as its agent reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HolderState {
    /// `namespace/name` of the pod.
    pub workload: String,
    pub revision: Revision,
    pub routes: Vec<Name>,
    pub nack: Option<String>,
}

/// A node's agent, as its stream says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeState {
    pub connected: bool,
    /// Which of the node's streams this is about: what an older one still says does not count.
    pub session: u64,
    pub revision: Revision,
    pub nack: Option<String>,
    pub holders: Vec<HolderState>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Programmed {
    InForce {
        agents: usize,
        sidecars: usize,
    },
    /// Members that have not answered yet.
    Waiting {
        missing: Vec<String>,
    },
    /// A member refuses it: who, and why.
    Refused {
        who: String,
        why: String,
    },
}

#[derive(Clone, Debug, Default)]
pub struct Tracker {
    /// Of the current epoch only: the caller clears it when the epoch changes.
    pub nodes: BTreeMap<String, NodeState>,
}

impl Tracker {
    /// A new stream of a node takes the place of an older one; its number.
    pub fn connect(&mut self, node: &str) -> u64 {
        let state = self.nodes.entry(node.to_owned()).or_default();
        *state = NodeState { connected: true, session: state.session + 1, ..NodeState::default() };
        state.session
    }

    /// Takes what a stream says, unless another one has taken its place.
    pub fn update(&mut self, node: &str, session: u64, change: impl FnOnce(&mut NodeState)) {
        if let Some(state) = self.nodes.get_mut(node).filter(|s| s.session == session) {
            change(state);
        }
    }

    /// Whether all agents of `ready` nodes and the sidecars there have this revision; `None` if no node is ready. A
    /// sidecar that has nothing in force yet does not count: it will begin with what is newest.
    pub fn everybody_has<'a>(&self, revision: Revision, ready: impl IntoIterator<Item = &'a str>) -> Option<bool> {
        let mut nodes = ready.into_iter().peekable();
        nodes.peek()?;
        let has = |state: &NodeState| {
            let mut live = state.holders.iter().filter(|h| h.revision > Revision(0));
            state.connected && state.revision >= revision && live.all(|h| h.revision >= revision)
        };
        Some(nodes.all(|node| self.nodes.get(node).is_some_and(has)))
    }

    /// State of a route that `required` was the first snapshot to carry. `ready` are the nodes whose lease is live.
    pub fn programmed<'a>(
        &self,
        route: &Name,
        required: Revision,
        ready: impl IntoIterator<Item = &'a str>,
    ) -> Programmed {
        let (mut agents, mut sidecars, mut missing) = (0, 0, vec![]);
        for node in ready {
            let state = self.nodes.get(node).cloned().unwrap_or_default();
            if let Some(why) = state.nack.filter(|_| state.revision < required) {
                return Programmed::Refused { who: format!("node {node}"), why };
            }
            if state.revision >= required && state.connected {
                agents += 1;
            } else {
                missing.push(format!("node {node}"));
            }
            for h in state.holders.iter().filter(|h| h.routes.contains(route)) {
                match &h.nack {
                    Some(why) if h.revision < required => {
                        return Programmed::Refused { who: format!("pod {}", h.workload), why: why.clone() };
                    }
                    _ if h.revision >= required => sidecars += 1,
                    _ => missing.push(format!("pod {}", h.workload)),
                }
            }
        }
        if missing.is_empty() { Programmed::InForce { agents, sidecars } } else { Programmed::Waiting { missing } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(pod: &str, revision: u64, routes: &[&str]) -> HolderState {
        HolderState {
            workload: pod.into(),
            revision: Revision(revision),
            routes: routes.iter().map(|r| Name::new("ns", *r)).collect(),
            nack: None,
        }
    }

    fn node(revision: u64, holders: Vec<HolderState>) -> NodeState {
        NodeState { connected: true, session: 1, revision: Revision(revision), nack: None, holders }
    }

    fn ask(t: &Tracker, ready: &[&str]) -> Programmed {
        t.programmed(&Name::new("ns", "r"), Revision(5), ready.iter().copied())
    }

    #[test]
    fn all_agents_and_the_sidecars_that_hold_the_route_must_have_it() {
        let mut t = Tracker::default();
        t.nodes.insert("a".into(), node(5, vec![holder("ns/p", 5, &["r"]), holder("ns/q", 1, &["other"])]));
        t.nodes.insert("b".into(), node(4, vec![]));
        assert_eq!(ask(&t, &["a"]), Programmed::InForce { agents: 1, sidecars: 1 });
        assert_eq!(ask(&t, &["a", "b"]), Programmed::Waiting { missing: vec!["node b".into()] });
        t.nodes.insert("b".into(), node(6, vec![holder("ns/s", 4, &["r"])]));
        assert_eq!(ask(&t, &["a", "b"]), Programmed::Waiting { missing: vec!["pod ns/s".into()] });
        assert_eq!(ask(&t, &["a", "never-seen"]), Programmed::Waiting { missing: vec!["node never-seen".into()] });
    }

    #[test]
    fn everybody_is_the_agents_of_ready_nodes_and_their_sidecars() {
        let mut t = Tracker::default();
        t.nodes.insert("a".into(), node(5, vec![holder("ns/p", 5, &["r"]), holder("ns/starting", 0, &[])]));
        t.nodes.insert("b".into(), node(6, vec![holder("ns/q", 4, &["other"])]));
        let ask = |ready: &[&'static str]| t.everybody_has(Revision(5), ready.iter().copied());
        assert_eq!(ask(&[]), None);
        assert_eq!(ask(&["a"]), Some(true));
        assert_eq!(ask(&["a", "b"]), Some(false), "a sidecar of b is behind");
        assert_eq!(ask(&["a", "never-seen"]), Some(false));
        t.nodes.get_mut("a").expect("known").connected = false;
        assert_eq!(t.everybody_has(Revision(5), ["a"]), Some(false));
    }

    #[test]
    fn the_late_end_of_an_older_stream_changes_nothing() {
        let mut t = Tracker::default();
        let old = t.connect("a");
        let new = t.connect("a");
        t.update("a", new, |s| s.revision = Revision(5));
        t.update("a", old, |s| s.revision = Revision(1));
        t.update("a", old, |s| s.connected = false);
        assert_eq!(ask(&t, &["a"]), Programmed::InForce { agents: 1, sidecars: 0 });
        t.update("a", new, |s| s.connected = false);
        assert_eq!(ask(&t, &["a"]), Programmed::Waiting { missing: vec!["node a".into()] });
    }

    #[test]
    fn a_refusal_is_told_with_its_reason_until_it_is_overcome() {
        let mut t = Tracker::default();
        let mut refusing = node(4, vec![]);
        refusing.nack = Some("map full".into());
        t.nodes.insert("a".into(), refusing.clone());
        assert!(matches!(ask(&t, &["a"]), Programmed::Refused { .. }));
        refusing.revision = Revision(5);
        t.nodes.insert("a".into(), refusing);
        assert!(matches!(ask(&t, &["a"]), Programmed::InForce { .. }));
    }
}
