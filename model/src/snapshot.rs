//! The whole state of the data plane at one revision, and the difference between two of them.
//!
//! A snapshot is never changed: [`Snapshot::apply`] makes the next one, sharing every resource that stayed the same,
//! so control can hold one for thousands of streams.

use crate::{
    EndpointSet, Gateway, Kind, Name, Node, Place, Policy, Resource, ResourceKey, Revision, Route, Service, Workload,
};
use serde::{Deserialize, Serialize};
use std::{cmp::Ordering, collections::BTreeMap, sync::Arc};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub revision: Revision,
    resources: BTreeMap<ResourceKey, Arc<Resource>>,
}

/// What turns one snapshot into another. `removed` never names a key that `changed` holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    pub changed: Vec<Arc<Resource>>,
    pub removed: Vec<ResourceKey>,
}

impl Delta {
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.removed.is_empty()
    }
}

/// Typed views over one kind each.
macro_rules! views {
    ($($one:ident, $all:ident: $kind:ident => $ty:ty;)*) => { $(
        pub fn $one(&self, name: &Name) -> Option<&$ty> {
            match self.resources.get(&ResourceKey { kind: Kind::$kind, name: name.clone() })?.as_ref() {
                Resource::$kind(r) => Some(r),
                _ => None,
            }
        }

        /// In name order.
        pub fn $all(&self) -> impl Iterator<Item = &$ty> {
            self.of_kind(Kind::$kind).filter_map(|r| match r.as_ref() {
                Resource::$kind(r) => Some(r),
                _ => None,
            })
        }
    )* };
}

impl Snapshot {
    pub fn new(revision: Revision, resources: impl IntoIterator<Item = Resource>) -> Self {
        Self::from_shared(revision, resources.into_iter().map(Arc::new))
    }

    pub fn from_shared(revision: Revision, resources: impl IntoIterator<Item = Arc<Resource>>) -> Self {
        Self { revision, resources: resources.into_iter().map(|r| (r.key(), r)).collect() }
    }

    views! {
        service, services: Service => Service;
        endpoint_set, endpoint_sets: EndpointSet => EndpointSet;
        route, routes: Route => Route;
        policy, policies: Policy => Policy;
        workload, workloads: Workload => Workload;
        node, nodes: Node => Node;
        gateway, gateways: Gateway => Gateway;
    }

    pub fn get(&self, key: &ResourceKey) -> Option<&Arc<Resource>> {
        self.resources.get(key)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.resources.values()
    }

    pub fn len(&self) -> usize {
        self.resources.len()
    }

    pub fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }

    /// What changes from `self` to `next`, in key order. Both are walked once; what they share is not looked into.
    pub fn diff(&self, next: &Snapshot) -> Delta {
        let mut delta = Delta::default();
        let (mut old, mut new) = (self.resources.iter().peekable(), next.resources.iter().peekable());
        loop {
            let order = match (old.peek(), new.peek()) {
                (Some((before, _)), Some((after, _))) => before.cmp(after),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return delta,
            };
            let before = old.next_if(|_| order != Ordering::Greater);
            match (before, new.next_if(|_| order != Ordering::Less)) {
                (Some((key, _)), None) => delta.removed.push(key.clone()),
                (Some((_, before)), Some((_, after))) if Arc::ptr_eq(before, after) || before == after => {}
                (_, after) => delta.changed.extend(after.map(|(_, r)| r.clone())),
            }
        }
    }

    /// The snapshot after `delta`, at `revision`. Removing what is not there is no error.
    pub fn apply(&self, delta: &Delta, revision: Revision) -> Snapshot {
        let mut resources = self.resources.clone();
        for key in &delta.removed {
            resources.remove(key);
        }
        resources.extend(delta.changed.iter().map(|r| (r.key(), r.clone())));
        Snapshot { revision, resources }
    }

    /// The routes to a port of a service that callers of `namespace` follow: those of their own namespace, and the service's
    /// own where there are none (GEP-1426: consumer routes take the place of the producer's).
    pub fn routes_from<'a>(&'a self, namespace: &str, service: &Name, port: u16) -> Vec<&'a Route> {
        let attached = self.routes().filter(|r| r.attached(service, port));
        let (consumer, own): (Vec<_>, Vec<_>) = attached.partition(|r| r.of_consumer());
        let consumer: Vec<_> = consumer.into_iter().filter(|r| r.name.namespace == namespace).collect();
        if consumer.is_empty() { own } else { consumer }
    }

    /// Where callers on the node of that name are.
    pub fn place<'a>(&'a self, node: &'a str) -> Place<'a> {
        Place { node, zone: self.node(&Name::cluster(node)).map_or("", |n| &n.zone) }
    }

    fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Arc<Resource>> {
        let from = ResourceKey { kind, name: Name::default() };
        self.resources.range(from..).take_while(move |(k, _)| k.kind == kind).map(|(_, r)| r)
    }
}

/// The file form: `{"revision": n, "resources": [{"kind": "Service", …}, …]}`.
#[derive(Serialize, Deserialize)]
struct File {
    revision: Revision,
    resources: Vec<Arc<Resource>>,
}

impl Serialize for Snapshot {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        File { revision: self.revision, resources: self.resources.values().cloned().collect() }.serialize(s)
    }
}

impl<'de> Deserialize<'de> for Snapshot {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let f = File::deserialize(d)?;
        Ok(Self::from_shared(f.revision, f.resources))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ServicePort;
    use proptest::prelude::*;

    fn service(name: &str, port: u16) -> Resource {
        Resource::Service(Service {
            name: Name::new("default", name),
            virtual_ips: vec!["10.96.0.1".parse().expect("an address")],
            ports: vec![ServicePort {
                name: String::new(),
                protocol: crate::Protocol::Tcp,
                port,
                app_protocol: crate::AppProtocol::Detect,
                node_port: None,
            }],
            ..Service::default()
        })
    }

    #[test]
    fn typed_views_see_only_their_kind() {
        let s = Snapshot::new(
            Revision(1),
            [
                service("a", 1),
                service("b", 2),
                Resource::EndpointSet(EndpointSet { name: Name::new("default", "a"), endpoints: vec![] }),
            ],
        );
        assert_eq!(s.services().count(), 2);
        assert_eq!(s.endpoint_sets().count(), 1);
        assert!(s.route(&Name::new("default", "a")).is_none());
    }

    #[test]
    fn the_file_form_reads_back() {
        let route = Route {
            name: Name::new("default", "a"),
            kind: crate::RouteKind::Tcp,
            parent: Name::new("default", "a"),
            parent_port: None,
            created_s: 1,
            generation: 1,
            rules: vec![],
        };
        let s = Snapshot::new(Revision(7), [service("a", 80), Resource::Route(route)]);
        let text = serde_json::to_string(&s).expect("serializes");
        assert_eq!(serde_json::from_str::<Snapshot>(&text).expect("parses"), s);
    }

    proptest! {
        #[test]
        fn diff_then_apply_gives_the_other(a in snapshots(), b in snapshots()) {
            prop_assert_eq!(a.apply(&a.diff(&b), b.revision), b.clone());
            prop_assert!(b.diff(&b).is_empty());
        }
    }

    fn snapshots() -> impl Strategy<Value = Snapshot> {
        proptest::collection::btree_map("[a-d]", 1u16..4, 0..5)
            .prop_map(|m| Snapshot::new(Revision(1), m.iter().map(|(name, port)| service(name, *port))))
    }
}
