//! One query in, an answer or "ask upstream" out: PURE.

use crate::{
    message::{self, Data, Query, Rcode, Refused, Soa},
    zone::{Lookup, Zone},
};

/// Seconds clients may keep an answer: short, because endpoints move (CoreDNS' default is the same).
pub const TTL_S: u32 = 5;

#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    Answer(Vec<u8>),
    /// Not ours: forward the bytes as they are.
    Forward(Query),
    Drop,
}

/// `udp`: keep to what the client takes in one datagram.
pub fn resolve(zone: &Zone, bytes: &[u8], udp: bool) -> Step {
    let q = match message::parse(bytes) {
        Ok(q) => q,
        Err(Refused::Drop) => return Step::Drop,
        Err(Refused::Answer(id, rcode)) => return Step::Answer(message::error(id, rcode)),
    };
    let limit = if udp { q.max_udp } else { usize::from(u16::MAX) };
    let soa = Soa { zone: &zone.domain, serial: zone.serial, negative_ttl_s: TTL_S };
    match zone.lookup(&q.name) {
        Lookup::Records(all) => {
            let records: Vec<Data> = all.iter().filter(|d| d.answers(q.qtype)).cloned().collect();
            Step::Answer(message::answer(bytes, &q, Rcode::NoError, &records, TTL_S, Some(&soa), limit))
        }
        Lookup::NoSuchName => Step::Answer(message::answer(bytes, &q, Rcode::NxDomain, &[], TTL_S, Some(&soa), limit)),
        Lookup::Foreign => Step::Forward(q),
    }
}

/// When nobody can be asked: a cluster without upstream has no foreign names; one whose upstream is silent has failed.
pub fn unanswered(bytes: &[u8], q: &Query, has_upstream: bool) -> Vec<u8> {
    let rcode = if has_upstream { Rcode::ServFail } else { Rcode::NxDomain };
    message::answer(bytes, q, rcode, &[], 0, None, message::MAX_UDP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::{
        op::{Message, MessageType, OpCode, Query as Question, ResponseCode},
        rr::{Name as Asked, RData, RecordType},
        serialize::binary::{BinDecodable, BinEncodable},
    };
    use sluice_model::{Endpoint, EndpointSet, Mesh, Name, Resource, Revision, Service, Snapshot};
    use std::{net::IpAddr, str::FromStr};

    fn zone() -> Zone {
        let ips = |all: &[&str]| all.iter().map(|ip| ip.parse().expect("an address")).collect::<Vec<IpAddr>>();
        let service = |name: &str, all: &[&str]| {
            let (name, virtual_ips) = (Name::new("shop", name), ips(all));
            Resource::Service(Service { name, virtual_ips, ..Service::default() })
        };
        let set = |name: &str, all: &[&str]| {
            let endpoint = |address| Endpoint {
                address,
                ready: true,
                draining: false,
                node: String::new(),
                zone: String::new(),
                workload: None,
                hostname: Some("pod-0".to_owned()),
                mesh: Mesh::Plain,
                ports: vec![],
            };
            let endpoints = ips(all).into_iter().map(endpoint).collect();
            Resource::EndpointSet(EndpointSet { name: Name::new("shop", name), endpoints })
        };
        let all = [
            service("both", &["10.96.0.5", "fd00:96::5"]),
            service("six", &["fd00:96::6"]),
            service("pods", &[]),
            set("pods", &["10.244.1.5", "fd00:244:0:1::5"]),
            service("pods6", &[]),
            set("pods6", &["fd00:244:0:1::6"]),
        ];
        Zone::new("cluster.local", &Snapshot::new(Revision(1), all))
    }

    /// The answer's code and addresses.
    fn asked(zone: &Zone, name: &str, kind: RecordType) -> (ResponseCode, Vec<String>) {
        let mut query = Message::new(7, MessageType::Query, OpCode::Query);
        let name = Asked::from_str(&format!("{name}.shop.svc.cluster.local.")).expect("a name");
        query.add_query(Question::query(name, kind));
        let Step::Answer(bytes) = resolve(zone, &query.to_bytes().expect("encodes"), true) else {
            panic!("{query:?} is the zone's to answer");
        };
        let message = Message::from_bytes(&bytes).expect("an answer");
        let address = |data: &RData| match data {
            RData::A(a) => a.0.to_string(),
            RData::AAAA(a) => a.0.to_string(),
            other => panic!("{other:?}"),
        };
        (message.metadata.response_code, message.answers.iter().map(|r| address(&r.data)).collect())
    }

    #[test]
    fn each_family_is_asked_for_by_itself() {
        use RecordType::{A, AAAA};
        let (zone, fine) = (zone(), ResponseCode::NoError);
        for (name, kind, want) in [
            ("both", A, Some("10.96.0.5")),
            ("both", AAAA, Some("fd00:96::5")),
            ("six", A, None),
            ("six", AAAA, Some("fd00:96::6")),
            ("pods", A, Some("10.244.1.5")),
            ("pods", AAAA, Some("fd00:244:0:1::5")),
            ("pods6", A, None),
            ("pods6", AAAA, Some("fd00:244:0:1::6")),
            ("pod-0.pods6", A, None),
            ("pod-0.pods6", AAAA, Some("fd00:244:0:1::6")),
        ] {
            let want = (fine, want.into_iter().map(str::to_owned).collect());
            assert_eq!(asked(&zone, name, kind), want, "{name} {kind}");
        }
        assert_eq!(asked(&zone, "nope", AAAA).0, ResponseCode::NXDomain);
    }
}
