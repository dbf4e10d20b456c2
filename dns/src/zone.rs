//! The cluster's names, made from a snapshot: PURE (kubernetes/dns specification 1.1.0 §2).

use crate::message::Data;
use sluice_model::{EndpointSet, Service, Snapshot};
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
};

#[derive(Debug, Default)]
pub struct Zone {
    /// `cluster.local`
    pub domain: String,
    pub serial: u32,
    names: HashMap<String, Vec<Data>>,
}

/// What the zone says of a name.
#[derive(Debug, PartialEq, Eq)]
pub enum Lookup<'a> {
    Records(&'a [Data]),
    /// In the zone's domain, but there is no such name.
    NoSuchName,
    /// Not the zone's business.
    Foreign,
}

impl Zone {
    pub fn new(domain: &str, snapshot: &Snapshot) -> Self {
        let mut zone = Self {
            domain: domain.to_ascii_lowercase(),
            serial: u32::try_from(snapshot.revision.0 & 0xffff_ffff).unwrap_or(0),
            names: HashMap::new(),
        };
        for s in snapshot.services() {
            zone.add_service(s, snapshot.endpoint_set(&s.name));
        }
        zone
    }

    fn add_service(&mut self, s: &Service, endpoints: Option<&EndpointSet>) {
        let base = format!("{}.{}.svc.{}", s.name.name, s.name.namespace, self.domain);
        // The namespace exists as a name as soon as something is in it: an empty answer, not NXDOMAIN.
        for parent in [format!("{}.svc.{}", s.name.namespace, self.domain), format!("svc.{}", self.domain)] {
            self.names.entry(parent).or_default();
        }
        if let Some(target) = &s.external_name {
            self.names.insert(base, vec![Data::Alias(target.clone())]);
            return;
        }
        if !s.headless() {
            for ip in &s.virtual_ips {
                self.add(base.clone(), *ip);
            }
            return;
        }
        // Headless: its ready endpoints; without any the name does not exist.
        for e in endpoints.iter().flat_map(|s| &s.endpoints).filter(|e| e.ready) {
            self.add(base.clone(), e.address);
            if let Some(host) = &e.hostname {
                self.add(format!("{}.{base}", host.to_ascii_lowercase()), e.address);
            }
        }
    }

    fn add(&mut self, name: String, ip: IpAddr) {
        let pointer = Data::Pointer(name.clone());
        let reverse = self.names.entry(reverse(ip)).or_default();
        if !reverse.contains(&pointer) {
            reverse.push(pointer);
        }
        let data = Data::Address(ip);
        let forward = self.names.entry(name).or_default();
        if !forward.contains(&data) {
            forward.push(data);
        }
    }

    /// `name` in lower case, without the last dot.
    pub fn lookup(&self, name: &str) -> Lookup<'_> {
        if let Some(records) = self.names.get(name) {
            return Lookup::Records(records);
        }
        match name.strip_suffix(&self.domain) {
            Some("") => Lookup::Records(&[]),
            Some(rest) if rest.ends_with('.') => Lookup::NoSuchName,
            _ => Lookup::Foreign,
        }
    }
}

fn reverse(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(a) => {
            let [x, y, z, w] = Ipv4Addr::octets(&a);
            format!("{w}.{z}.{y}.{x}.in-addr.arpa")
        }
        IpAddr::V6(a) => {
            let nibbles = a.octets().into_iter().rev().flat_map(|b| [b & 15, b >> 4]).map(|n| format!("{n:x}."));
            nibbles.collect::<String>() + "ip6.arpa"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::{Endpoint, Mesh, Name, Resource, Revision};

    fn ip(s: &str) -> IpAddr {
        s.parse().expect("an address")
    }

    fn zone() -> Zone {
        let service = |name: &str, ips: &[&str]| {
            Resource::Service(Service {
                name: Name::new("shop", name),
                virtual_ips: ips.iter().map(|i| ip(i)).collect(),
                ports: vec![],
                ..Service::default()
            })
        };
        let endpoint = |address: &str, ready| Endpoint {
            address: ip(address),
            ready,
            node: String::new(),
            zone: String::new(),
            draining: false,
            workload: None,
            hostname: Some("db-0".into()),
            mesh: Mesh::Plain,
            ports: vec![],
        };
        let set = EndpointSet {
            name: Name::new("shop", "db"),
            endpoints: vec![endpoint("10.244.0.9", true), endpoint("10.244.0.10", false)],
        };
        let outside = Resource::Service(Service {
            name: Name::new("shop", "outside"),
            external_name: Some("db.example.org".into()),
            ..Service::default()
        });
        let all = [
            outside,
            service("web", &["10.96.0.5", "fd00::5"]),
            service("db", &[]),
            service("gone", &[]),
            Resource::EndpointSet(set),
        ];
        Zone::new("cluster.local", &Snapshot::new(Revision(9), all))
    }

    #[test]
    fn names_follow_the_specification() {
        let z = zone();
        let addresses = |name: &str| match z.lookup(name) {
            Lookup::Records(r) => r.to_vec(),
            other => panic!("{name}: {other:?}"),
        };
        let a = |s: &str| Data::Address(ip(s));
        let p = |s: &str| Data::Pointer(s.to_owned());
        assert_eq!(addresses("web.shop.svc.cluster.local"), [a("10.96.0.5"), a("fd00::5")]);
        assert_eq!(addresses("db.shop.svc.cluster.local"), [a("10.244.0.9")], "ready endpoints only");
        assert_eq!(addresses("db-0.db.shop.svc.cluster.local"), [a("10.244.0.9")]);
        assert_eq!(addresses("5.0.96.10.in-addr.arpa"), [p("web.shop.svc.cluster.local")]);
        assert_eq!(addresses("outside.shop.svc.cluster.local"), [Data::Alias("db.example.org".into())]);
        assert_eq!(addresses("shop.svc.cluster.local"), [], "a namespace with services exists");
        for missing in ["gone.shop.svc.cluster.local", "web.other.svc.cluster.local", "x.cluster.local"] {
            assert_eq!(z.lookup(missing), Lookup::NoSuchName, "{missing}");
        }
        for foreign in ["example.org", "web", "xcluster.local", "1.1.1.1.in-addr.arpa"] {
            assert_eq!(z.lookup(foreign), Lookup::Foreign, "{foreign}");
        }
    }
}
