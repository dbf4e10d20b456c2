//! What an address and TCP port that an app dialled mean: a service's virtual address, a meshed pod, or neither.

use sluice_model::{Identity, Mesh, Name, Protocol, Service, Snapshot};
use std::net::{IpAddr, SocketAddr};

/// The answer; both absent for an address that the cluster does not know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolved {
    pub service: Option<Name>,
    /// The address is a meshed pod that takes mTLS as this identity.
    pub identity: Option<Identity>,
}

/// Looks `destination` up in `snapshot`. Scans: callers ask once per destination and revision, not per connection.
pub fn resolve(snapshot: &Snapshot, destination: SocketAddr) -> Resolved {
    let ip = destination.ip().to_canonical();
    // No service takes another's own address by naming it as an external one.
    let own = snapshot.services().find(|s| s.virtual_ips.contains(&ip) && serves(s, destination.port()));
    let external = || snapshot.services().find(|s| s.external_ips.contains(&ip) && serves(s, destination.port()));
    match own.or_else(external) {
        Some(service) => Resolved { service: Some(service.name.clone()), identity: None },
        None => Resolved { service: None, identity: pod_identity(snapshot, ip) },
    }
}

fn serves(service: &Service, port: u16) -> bool {
    service.ports.iter().any(|p| p.protocol == Protocol::Tcp && p.port == port)
}

/// From the workload where it is known, else from any service the pod is behind.
fn pod_identity(snapshot: &Snapshot, ip: IpAddr) -> Option<Identity> {
    let known = snapshot.workloads().find(|w| w.meshed && w.addresses.contains(&ip)).map(|w| w.identity.clone());
    known.or_else(|| {
        let mut endpoints = snapshot.endpoint_sets().flat_map(|s| &s.endpoints);
        endpoints.find_map(|e| match &e.mesh {
            Mesh::Mtls(identity) if e.address == ip => Some(identity.clone()),
            _ => None,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::{AppProtocol, Endpoint, EndpointSet, Resource, Revision, ServicePort};

    fn snapshot() -> Snapshot {
        let name = Name::new("shop", "web");
        let port = ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 80,
            app_protocol: AppProtocol::Detect,
            node_port: None,
        };
        let endpoint = Endpoint {
            address: "10.244.1.5".parse().expect("address"),
            ready: true,
            draining: false,
            node: "n1".into(),
            zone: String::new(),
            workload: None,
            hostname: None,
            mesh: Mesh::Mtls("spiffe://cluster.local/ns/shop/sa/web".parse().expect("identity")),
            ports: vec![],
        };
        Snapshot::new(
            Revision(1),
            [
                Resource::Service(Service {
                    name: name.clone(),
                    virtual_ips: vec!["10.96.0.1".parse().expect("address")],
                    ports: vec![port],
                    ..Service::default()
                }),
                Resource::EndpointSet(EndpointSet { name, endpoints: vec![endpoint] }),
            ],
        )
    }

    #[test]
    fn addresses_mean_services_pods_or_nothing() {
        let s = snapshot();
        let ask = |a: &str| resolve(&s, a.parse().expect("address"));
        assert_eq!(ask("10.96.0.1:80").service, Some(Name::new("shop", "web")));
        assert_eq!(ask("[::ffff:10.96.0.1]:80").service, Some(Name::new("shop", "web")));
        assert_eq!(ask("10.96.0.1:81"), Resolved::default());
        assert_eq!(ask("10.244.1.5:8080").identity.map(|i| i.service_account), Some("web".into()));
        assert_eq!(ask("1.1.1.1:443"), Resolved::default());
    }
}
