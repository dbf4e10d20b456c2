//! EndpointSlices → one endpoint set per service: PURE. Kubernetes' terminating fallback is applied here, once: with no
//! ready endpoint left, those that still serve while terminating take the traffic (KEP-1669).

use super::{Objects, identity, port, protocol, zone};
use crate::inject;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use sluice_model as m;

const SERVICE_LABEL: &str = "kubernetes.io/service-name";

pub(super) fn endpoint_set(service: &m::Service, o: &Objects, trust_domain: &str) -> m::EndpointSet {
    let from = m::Name::new(service.name.namespace.clone(), "");
    let slices = o.slices.range(from..).take_while(|(n, _)| n.namespace == service.name.namespace).map(|(_, s)| s);
    let slices = slices.filter(|s| serves(s, &service.name.name));
    let mut endpoints: Vec<m::Endpoint> =
        slices.flat_map(|slice| slice.endpoints.iter().flat_map(|e| expand(slice, e, o, trust_domain))).collect();
    // Callers of one family have no use for what is ready in the other.
    for v4 in [true, false] {
        let mut family: Vec<_> = endpoints.iter_mut().filter(|e| e.address.is_ipv4() == v4).collect();
        if !family.iter().any(|e| e.ready) {
            family.iter_mut().for_each(|e| e.ready = e.draining);
        }
    }
    endpoints.sort_by_key(|e| e.address);
    m::EndpointSet { name: service.name.clone(), endpoints }
}

pub(super) fn serves(s: &EndpointSlice, service: &str) -> bool {
    s.metadata.labels.as_ref().and_then(|l| l.get(SERVICE_LABEL)).is_some_and(|v| v == service)
}

fn serving_while_terminating(e: &Endpoint) -> bool {
    e.conditions.as_ref().is_some_and(|c| c.serving == Some(true) && c.terminating == Some(true))
}

fn expand<'a>(
    slice: &'a EndpointSlice,
    e: &'a Endpoint,
    o: &'a Objects,
    trust_domain: &'a str,
) -> impl Iterator<Item = m::Endpoint> + 'a {
    let workload = e
        .target_ref
        .as_ref()
        .filter(|t| t.kind.as_deref() == Some("Pod"))
        .and_then(|t| Some(m::Name::new(slice.metadata.namespace.clone()?, t.name.clone()?)));
    let pod = workload.as_ref().and_then(|n| o.pods.get(n));
    let mesh = match pod {
        Some(p) if inject::injected(p) => m::Mesh::Mtls(identity(p, trust_domain)),
        _ => m::Mesh::Plain,
    };
    let ports: Vec<_> = slice
        .ports
        .iter()
        .flatten()
        .filter_map(|p| {
            Some(m::EndpointPort {
                name: p.name.clone().unwrap_or_default(),
                protocol: protocol(p.protocol.as_deref())?,
                port: port(p.port?)?,
            })
        })
        .collect();
    // Absent means ready (EndpointConditions.ready).
    let ready = e.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true);
    let draining = serving_while_terminating(e);
    let node = e.node_name.clone().unwrap_or_default();
    let zone = e.zone.clone().or_else(|| o.nodes.get(&m::Name::cluster(&node)).map(|n| zone(n))).unwrap_or_default();
    e.addresses.iter().filter_map(|a| a.parse().ok()).map(move |address| m::Endpoint {
        address,
        ready,
        draining,
        node: node.clone(),
        zone: zone.clone(),
        workload: workload.clone(),
        hostname: e.hostname.clone(),
        mesh: mesh.clone(),
        ports: ports.clone(),
    })
}
