//! What a sidecar may know: its own workload and policy, and of each destination that it dialled what the address
//! means, the service, its routes, and the services and endpoints those name. A gateway's pod has the gateway with its keys,
//! and of the gateway's routes the same. PURE.

use sluice_model::{
    Delta, Endpoint, EndpointSet, Gateway, Kind, Name, Place, Resource, ResourceKey, Route, Service, Snapshot, Workload,
};
use sluice_traffic::resolve::{Resolved, resolve};
use sluice_wire::{
    CHUNK_RESOURCES, chunks,
    convert::{address_to_wire, key_to_wire, resource_to_wire},
    v1,
};
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// A sidecar's part of a snapshot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scope {
    pub resources: Snapshot,
    pub resolutions: BTreeMap<SocketAddr, Resolved>,
}

impl Scope {
    /// The part of `snapshot` for `workload`, which dialled `destinations`.
    pub fn of(snapshot: &Snapshot, workload: &Name, destinations: &BTreeSet<SocketAddr>) -> Self {
        let resolutions: BTreeMap<_, _> = destinations.iter().map(|d| (*d, resolve(snapshot, *d))).collect();
        let mut keys: BTreeSet<ResourceKey> = BTreeSet::new();
        let mut add = |kind, name: &Name| keys.insert(ResourceKey { kind, name: name.clone() });
        add(Kind::Workload, workload);
        add(Kind::Policy, workload);
        let dialled: BTreeSet<&Name> = resolutions.values().filter_map(|r| r.service.as_ref()).collect();
        for service in &dialled {
            add(Kind::Service, service);
            add(Kind::EndpointSet, service);
        }
        let own = snapshot.workload(workload);
        let gateway = own.and_then(Workload::served);
        if let Some(gateway) = &gateway {
            add(Kind::Gateway, gateway);
        }
        let served = gateway.as_ref().map(Gateway::parent);
        let follows = |r: &&Route| !r.of_consumer() || r.name.namespace == workload.namespace;
        let uses = |r: &&Route| dialled.contains(&r.parent) && follows(r) || served.as_ref() == Some(&r.parent);
        for route in snapshot.routes().filter(uses) {
            add(Kind::Route, &route.name);
            let backends = route.rules.iter().flat_map(|r| &r.backends).map(|b| &b.service);
            let mirrors = route.rules.iter().flat_map(|r| &r.filters.mirrors).map(|m| &m.service);
            for service in backends.chain(mirrors) {
                add(Kind::Service, service);
                add(Kind::EndpointSet, service);
            }
        }
        // Where it is: its node's zone, for services that prefer theirs.
        let zoned = |k: &ResourceKey| snapshot.service(&k.name).is_some_and(prefers_zone);
        if let Some(own) = own.filter(|_| keys.iter().any(zoned)) {
            keys.insert(ResourceKey { kind: Kind::Node, name: Name::cluster(&own.node) });
        }
        let place = own.map(|w| snapshot.place(&w.node)).unwrap_or_default();
        let found = keys.iter().filter_map(|k| Some(seen_from(snapshot, place, snapshot.get(k)?)));
        Self { resources: Snapshot::from_shared(snapshot.revision, found), resolutions }
    }

    pub fn routes(&self) -> Vec<Name> {
        self.resources.routes().map(|r| r.name.clone()).collect()
    }

    /// The Update that turns `before` into this, in chunks; none when nothing differs. Without `before`, a full one.
    pub fn updates(&self, before: Option<&Scope>, epoch: &str) -> Vec<v1::Update> {
        let empty = Scope::default();
        let old = before.unwrap_or(&empty);
        let delta = old.resources.diff(&self.resources);
        let resolved: Vec<(&SocketAddr, &Resolved)> =
            self.resolutions.iter().filter(|(d, r)| old.resolutions.get(d) != Some(r)).collect();
        if before.is_some() && delta.is_empty() && resolved.is_empty() {
            return Vec::new();
        }
        let mut chunks = self.chunks(&delta, &resolved, epoch);
        if let Some(first) = chunks.first_mut() {
            first.full = before.is_none();
        }
        if let Some(last) = chunks.last_mut() {
            last.last = true;
        }
        chunks
    }

    fn chunks(&self, delta: &Delta, resolved: &[(&SocketAddr, &Resolved)], epoch: &str) -> Vec<v1::Update> {
        let revision = self.resources.revision;
        let empty = || v1::Update { epoch: epoch.to_owned(), revision: revision.0, ..v1::Update::default() };
        let changed = chunks(delta.changed.iter().map(|r| resource_to_wire(r, revision)));
        let changed = changed.into_iter().map(|changed| v1::Update { changed, ..empty() });
        let removed = delta
            .removed
            .chunks(CHUNK_RESOURCES)
            .map(|part| v1::Update { removed: part.iter().map(key_to_wire).collect(), ..empty() });
        let resolutions = resolved.chunks(CHUNK_RESOURCES).map(|part| v1::Update {
            resolutions: part.iter().map(|(d, r)| resolution_to_wire(**d, r)).collect(),
            ..empty()
        });
        let chunks: Vec<_> = changed.chain(removed).chain(resolutions).collect();
        if chunks.is_empty() { vec![empty()] } else { chunks }
    }
}

fn prefers_zone(service: &Service) -> bool {
    service.backend_policy.as_ref().is_some_and(|p| p.locality.is_some())
}

/// Endpoint sets as callers at `place` may use them: the sidecar knows of no places.
fn seen_from(snapshot: &Snapshot, place: Place<'_>, resource: &Arc<Resource>) -> Arc<Resource> {
    let (Resource::EndpointSet(set), Some(service)) = (resource.as_ref(), snapshot.service(resource.name())) else {
        return resource.clone();
    };
    let set = once_per_pod(set, service);
    let kept = matches!(set, Cow::Borrowed(_));
    match set.seen_from(service, place) {
        Cow::Borrowed(_) if kept => resource.clone(),
        seen => Arc::new(Resource::EndpointSet(seen.into_owned())),
    }
}

/// A sidecar may go on by another family than the one that was dialled: a pod that has both is one endpoint to it, by its
/// address of the service's first family.
fn once_per_pod<'s>(set: &'s EndpointSet, service: &Service) -> Cow<'s, EndpointSet> {
    let Some(v4) = service.virtual_ips.first().map(IpAddr::is_ipv4) else { return Cow::Borrowed(set) };
    let (first, second): (Vec<_>, Vec<_>) = set.endpoints.iter().partition(|e| e.address.is_ipv4() == v4);
    let pods: HashSet<&Name> = first.iter().filter_map(|e| e.workload.as_ref()).collect();
    let again = |e: &&Endpoint| e.workload.as_ref().is_some_and(|pod| pods.contains(pod));
    if !second.iter().any(again) {
        return Cow::Borrowed(set);
    }
    let rest = second.into_iter().filter(|e| !again(e));
    let endpoints = first.iter().copied().chain(rest).cloned().collect();
    Cow::Owned(EndpointSet { name: set.name.clone(), endpoints })
}

fn resolution_to_wire(d: SocketAddr, r: &Resolved) -> v1::Resolution {
    v1::Resolution {
        destination: Some(v1::Destination { address: address_to_wire(d.ip()), port: d.port().into() }),
        service: r.service.as_ref().map(Into::into),
        identity: r.identity.as_ref().map(ToString::to_string).unwrap_or_default(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use sluice_model::*;

    pub(crate) fn workload(name: &str) -> Resource {
        Resource::Workload(Workload {
            name: Name::new("shop", name),
            uid: format!("uid-{name}"),
            node: "n1".into(),
            addresses: vec![],
            identity: "spiffe://cluster.local/ns/shop/sa/default".parse().expect("identity"),
            meshed: true,
            gateway: None,
        })
    }

    pub(crate) fn service(name: &str, ip: &str) -> [Resource; 2] {
        let port = ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            app_protocol: AppProtocol::Detect,
            node_port: None,
        };
        let name = Name::new("shop", name);
        [
            Resource::Service(Service {
                name: name.clone(),
                virtual_ips: vec![ip.parse().expect("address")],
                ports: vec![port],
                ..Service::default()
            }),
            Resource::EndpointSet(EndpointSet { name, endpoints: vec![] }),
        ]
    }

    pub(crate) fn route(parent: &str, backends: &[(&str, u32)]) -> Resource {
        let backends = backends
            .iter()
            .map(|(name, weight)| Backend {
                service: Name::new("shop", *name),
                port: 80,
                weight: *weight,
                ..Backend::default()
            })
            .collect();
        Resource::Route(Route {
            name: Name::new("shop", format!("{parent}-route")),
            kind: RouteKind::Http,
            parent: Name::new("shop", parent),
            parent_port: None,
            created_s: 1,
            generation: 1,
            rules: vec![Rule { backends, ..Rule::default() }],
        })
    }

    pub(crate) fn snapshot(revision: u64, canary: u32) -> Snapshot {
        let mut all =
            vec![workload("client"), workload("other"), route("web", &[("web", 100 - canary), ("v2", canary)])];
        all.extend(service("web", "10.96.0.1"));
        all.extend(service("v2", "10.96.0.2"));
        all.extend(service("unused", "10.96.0.3"));
        Snapshot::new(Revision(revision), all)
    }

    pub(crate) fn dialled(list: &[&str]) -> BTreeSet<SocketAddr> {
        list.iter().map(|d| d.parse().expect("address")).collect()
    }

    fn scope(s: &Snapshot, list: &[&str]) -> Scope {
        Scope::of(s, &Name::new("shop", "client"), &dialled(list))
    }

    fn keys(s: &Scope) -> Vec<String> {
        s.resources.iter().map(|r| format!("{:?} {}", r.kind(), r.name().name)).collect()
    }

    #[test]
    fn a_sidecar_sees_itself_and_what_it_dialled() {
        let s = snapshot(1, 10);
        assert_eq!(keys(&scope(&s, &[])), ["Workload client"]);
        assert_eq!(keys(&scope(&s, &["9.9.9.9:80"])), ["Workload client"]);
        let web = scope(&s, &["10.96.0.1:80"]);
        assert_eq!(
            keys(&web),
            ["Service v2", "Service web", "EndpointSet v2", "EndpointSet web", "Route web-route", "Workload client"]
        );
        assert_eq!(web.routes(), [Name::new("shop", "web-route")]);
        assert_eq!(keys(&scope(&s, &["10.96.0.3:80"])).len(), 3);
    }

    #[test]
    fn a_gateway_sees_its_listeners_and_all_of_its_routes() {
        let Resource::Workload(edge) = workload("edge-1") else { unreachable!("it is one") };
        let of = |name: &str| Gateway { name: Name::new("shop", name), ..Gateway::default() };
        let Resource::Route(route) = route("web", &[("v2", 1)]) else { unreachable!("it is one") };
        let parent = Gateway::parent(&Name::new("shop", "edge"));
        let all = snapshot(1, 0).iter().map(|r| (**r).clone()).collect::<Vec<_>>();
        let s = Snapshot::new(
            Revision(1),
            all.into_iter().chain([
                Resource::Workload(Workload { meshed: false, gateway: Some("edge".into()), ..edge }),
                Resource::Gateway(of("edge")),
                Resource::Gateway(of("other")),
                Resource::Route(Route { name: Name::new("shop", "outside"), parent, ..route }),
            ]),
        );
        let seen = Scope::of(&s, &Name::new("shop", "edge-1"), &dialled(&[]));
        assert_eq!(keys(&seen), ["Service v2", "EndpointSet v2", "Route outside", "Workload edge-1", "Gateway edge"]);
        assert_eq!(keys(&scope(&s, &["10.96.0.1:80"])).len(), 6, "others see nothing of it");
    }

    #[test]
    fn a_pod_of_both_families_is_one_endpoint() {
        let endpoint = |(address, pod): (&str, Option<&str>)| Endpoint {
            address: address.parse().expect("address"),
            ready: true,
            draining: false,
            node: String::new(),
            zone: String::new(),
            workload: pod.map(|pod| Name::new("shop", pod)),
            hostname: None,
            mesh: Mesh::Plain,
            ports: vec![],
        };
        let list = [("10.244.1.1", Some("a")), ("fd00::1", Some("a")), ("fd00::2", Some("b")), ("fd00::3", None)];
        for (vips, want) in [
            (&["10.96.0.1", "fd00:96::1"][..], &["10.244.1.1", "fd00::2", "fd00::3"][..]),
            (&["fd00:96::1", "10.96.0.1"], &["fd00::1", "fd00::2", "fd00::3"]),
            (&[], &["10.244.1.1", "fd00::1", "fd00::2", "fd00::3"]),
        ] {
            let virtual_ips = vips.iter().map(|ip| ip.parse().expect("address")).collect();
            let service = Service { virtual_ips, ..Service::default() };
            let set = EndpointSet { name: Name::new("shop", "web"), endpoints: list.map(endpoint).to_vec() };
            let seen: Vec<String> =
                once_per_pod(&set, &service).endpoints.iter().map(|e| e.address.to_string()).collect();
            assert_eq!(seen, want, "{vips:?}");
        }
    }

    #[test]
    fn only_differences_are_sent() {
        let before = scope(&snapshot(1, 10), &["10.96.0.1:80"]);
        let first = before.updates(None, "e");
        assert!(first[0].full && first.last().expect("a chunk").last);
        assert!(scope(&snapshot(2, 10), &["10.96.0.1:80"]).updates(Some(&before), "e").is_empty());
        let change = scope(&snapshot(2, 50), &["10.96.0.1:80"]).updates(Some(&before), "e");
        assert_eq!(change.iter().map(|u| u.changed.len()).sum::<usize>(), 1, "the route");
        assert!(!change[0].full);
        let left = scope(&snapshot(2, 10), &[]).updates(Some(&before), "e");
        assert_eq!(left.iter().map(|u| u.removed.len()).sum::<usize>(), 5);
    }

    #[test]
    fn unknown_destinations_are_answered_too() {
        let updates = scope(&snapshot(1, 0), &["9.9.9.9:80"]).updates(None, "e");
        let resolutions: Vec<_> = updates.iter().flat_map(|u| &u.resolutions).collect();
        assert!(matches!(resolutions[..], [r] if r.service.is_none() && r.identity.is_empty()));
    }

    #[test]
    fn large_scopes_come_in_chunks() {
        let many = (0..CHUNK_RESOURCES + 1)
            .map(|i| Resource::EndpointSet(EndpointSet { name: Name::new("a", i.to_string()), endpoints: vec![] }));
        let scope = Scope { resources: Snapshot::new(Revision(1), many), ..Scope::default() };
        let updates = scope.updates(None, "e");
        assert_eq!(updates.iter().map(|u| u.changed.len()).collect::<Vec<_>>(), [CHUNK_RESOURCES, 1]);
        assert_eq!(updates.iter().map(|u| (u.full, u.last)).collect::<Vec<_>>(), [(true, false), (false, true)]);
        assert_eq!(Scope::default().updates(None, "e").len(), 1, "an empty view is a view");
    }
}
