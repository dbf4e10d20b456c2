//! One query in, an answer or "ask upstream" out: PURE.

use crate::{
    message::{self, Data, Query, Rcode, Record, Refused, Soa},
    zone::{Lookup, Zone},
};

/// Seconds clients may keep an answer: short, because endpoints move (CoreDNS' default is the same).
pub const TTL_S: u32 = 5;
/// Most aliases on the way to a name. Two services that are aliases of each other are answered SERVFAIL.
const MAX_ALIASES: usize = 8;

#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    Answer(Vec<u8>),
    /// Not ours: forward the bytes as they are.
    Forward(Query),
    /// An alias of a name that is not ours.
    Follow(Alias),
    Drop,
}

/// A name of ours that leads to one that others know.
#[derive(Debug, PartialEq, Eq)]
pub struct Alias {
    pub query: Query,
    /// From the question's name to the target.
    chain: Vec<Record>,
    pub target: String,
    limit: usize,
}

/// `udp`: keep to what the client takes in one datagram.
pub fn resolve(zone: &Zone, bytes: &[u8], udp: bool) -> Step {
    let q = match message::parse(bytes) {
        Ok(q) => q,
        Err(Refused::Drop) => return Step::Drop,
        Err(Refused::Answer(id, rcode)) => return Step::Answer(message::error(id, rcode)),
    };
    let limit = if udp { q.max_udp } else { usize::from(u16::MAX) };
    let soa = soa(zone);
    match zone.lookup(&q.name) {
        Lookup::Records([Data::Alias(target)]) if matches!(q.qtype, message::TYPE_A | message::TYPE_AAAA) => {
            let target = target.clone();
            follow(zone, bytes, q, target, limit)
        }
        Lookup::Records(all) => {
            let records: Vec<Data> = all.iter().filter(|d| d.answers(q.qtype)).cloned().collect();
            Step::Answer(message::answer(bytes, &q, Rcode::NoError, &records, TTL_S, Some(&soa), limit))
        }
        Lookup::NoSuchName => Step::Answer(message::answer(bytes, &q, Rcode::NxDomain, &[], TTL_S, Some(&soa), limit)),
        Lookup::Foreign => Step::Forward(q),
    }
}

fn soa(zone: &Zone) -> Soa<'_> {
    Soa { zone: &zone.domain, serial: zone.serial, negative_ttl_s: TTL_S }
}

/// From alias to alias, while they are ours. The code is that of the last name (RFC 6604).
fn follow(zone: &Zone, bytes: &[u8], query: Query, mut target: String, limit: usize) -> Step {
    let mut chain = vec![Record { owner: query.name.clone(), data: Data::Alias(target.clone()), ttl_s: TTL_S }];
    while chain.len() <= MAX_ALIASES {
        let (rcode, found) = match zone.lookup(&target) {
            Lookup::Records([Data::Alias(next)]) => {
                chain.push(Record { owner: target, data: Data::Alias(next.clone()), ttl_s: TTL_S });
                target = next.clone();
                continue;
            }
            Lookup::Records(all) => (Rcode::NoError, all),
            Lookup::NoSuchName => (Rcode::NxDomain, &[][..]),
            Lookup::Foreign => return Step::Follow(Alias { query, chain, target, limit }),
        };
        let found = found.iter().filter(|d| d.answers(query.qtype));
        chain.extend(found.map(|d| Record { owner: target.clone(), data: d.clone(), ttl_s: TTL_S }));
        return Step::Answer(message::answer_records(bytes, &query, rcode, &chain, Some(&soa(zone)), limit));
    }
    Step::Answer(message::answer(bytes, &query, Rcode::ServFail, &[], 0, None, limit))
}

impl Alias {
    /// What to ask upstream.
    pub fn question(&self) -> Vec<u8> {
        message::query(self.query.id, &self.target, self.query.qtype)
    }

    /// The answer to `bytes`, with what upstream says of the target. What cannot be made sense of has failed.
    pub fn answer(mut self, bytes: &[u8], upstream: &[u8]) -> Vec<u8> {
        let rcode = match message::read_answer(upstream) {
            Some((0, found)) => {
                self.chain.extend(found);
                Rcode::NoError
            }
            Some((3, found)) => {
                self.chain.extend(found);
                Rcode::NxDomain
            }
            _ => return unanswered(bytes, &self.query, true),
        };
        message::answer_records(bytes, &self.query, rcode, &self.chain, None, self.limit)
    }

    /// Where nobody can be asked for the target: the alias, for whoever can.
    pub fn alone(&self, bytes: &[u8]) -> Vec<u8> {
        message::answer_records(bytes, &self.query, Rcode::NoError, &self.chain, None, self.limit)
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
    use crate::message::{TYPE_A, TYPE_AAAA, TYPE_ANY, TYPE_CNAME, query, read_answer};
    use sluice_model::{Endpoint, EndpointSet, Mesh, Name, Resource, Revision, Service, Snapshot};
    use std::net::IpAddr;

    fn zone() -> Zone {
        let alias = |name: &str, target: &str| {
            Resource::Service(Service {
                name: Name::new("shop", name),
                external_name: Some(target.to_owned()),
                ..Service::default()
            })
        };
        let web = Service {
            name: Name::new("shop", "web"),
            virtual_ips: vec!["10.96.0.5".parse().expect("an address")],
            ..Service::default()
        };
        let all = [
            Resource::Service(web),
            alias("outside", "db.example.org"),
            alias("inside", "web.shop.svc.cluster.local"),
            alias("twice", "inside.shop.svc.cluster.local"),
            alias("far", "outside.shop.svc.cluster.local"),
            alias("lost", "gone.shop.svc.cluster.local"),
            alias("one", "two.shop.svc.cluster.local"),
            alias("two", "one.shop.svc.cluster.local"),
        ];
        Zone::new("cluster.local", &Snapshot::new(Revision(9), all))
    }

    /// `name TYPE value` of each record, names without the zone.
    fn seen(answer: &[u8]) -> (u8, Vec<String>) {
        let (rcode, records) = read_answer(answer).expect("an answer");
        let short = |n: &str| n.trim_end_matches(".shop.svc.cluster.local").to_owned();
        let text = |r: Record| match r.data {
            Data::Address(ip) => format!("{} {ip}", short(&r.owner)),
            Data::Alias(to) | Data::Pointer(to) => format!("{} -> {}", short(&r.owner), short(&to)),
        };
        (rcode, records.into_iter().map(text).collect())
    }

    #[test]
    fn aliases_are_followed_as_far_as_the_zone_knows() {
        let zone = zone();
        for (name, qtype, rcode, expected) in [
            ("inside", TYPE_A, 0, vec!["inside -> web", "web 10.96.0.5"]),
            ("inside", TYPE_AAAA, 0, vec!["inside -> web"]),
            ("inside", TYPE_CNAME, 0, vec!["inside -> web"]),
            ("inside", TYPE_ANY, 0, vec!["inside -> web"]),
            ("inside", 15, 0, vec!["inside -> web"]),
            ("twice", TYPE_A, 0, vec!["twice -> inside", "inside -> web", "web 10.96.0.5"]),
            ("outside", TYPE_CNAME, 0, vec!["outside -> db.example.org"]),
            ("lost", TYPE_A, 3, vec!["lost -> gone"]),
            ("one", TYPE_A, 2, vec![]),
            ("web", TYPE_A, 0, vec!["web 10.96.0.5"]),
            ("web", TYPE_CNAME, 0, vec![]),
        ] {
            let asked = query(7, &format!("{name}.shop.svc.cluster.local"), qtype);
            let Step::Answer(answer) = resolve(&zone, &asked, true) else { panic!("{name} {qtype}: not answered") };
            assert_eq!(seen(&answer), (rcode, expected.into_iter().map(str::to_owned).collect()), "{name} {qtype}");
        }
    }

    #[test]
    fn upstream_says_where_aliases_of_its_names_lead() {
        let zone = zone();
        let asked = query(7, "far.shop.svc.cluster.local", TYPE_A);
        let alias = || match resolve(&zone, &asked, true) {
            Step::Follow(alias) => alias,
            other => panic!("{other:?}"),
        };
        let own = ["far -> outside", "outside -> db.example.org"];
        assert_eq!(alias().target, "db.example.org");
        assert_eq!(seen(&alias().alone(&asked)), (0, own.map(str::to_owned).to_vec()));
        let question = alias().question();
        let q = message::parse(&question).expect("a query");
        let records = [
            ("db.example.org", Data::Alias("a.cdn.example".into())),
            ("a.cdn.example", Data::Address([192, 0, 2, 1].into())),
        ];
        let records = records.map(|(owner, data)| Record { owner: owner.into(), data, ttl_s: 300 });
        let upstream = |rcode, records: &[Record]| message::answer_records(&question, &q, rcode, records, None, 512);
        let found = ["db.example.org -> a.cdn.example", "a.cdn.example 192.0.2.1"];
        let whole: Vec<String> = own.iter().chain(&found).map(|s| (*s).to_owned()).collect();
        let own = own.map(str::to_owned).to_vec();
        for (upstream, expected) in [
            (upstream(Rcode::NoError, &records), (0, whole)),
            (upstream(Rcode::NoError, &[]), (0, own.clone())),
            (upstream(Rcode::NxDomain, &[]), (3, own)),
            (upstream(Rcode::ServFail, &[]), (2, vec![])),
            (b"junk".to_vec(), (2, vec![])),
        ] {
            assert_eq!(seen(&alias().answer(&asked, &upstream)), expected);
        }
        assert!(matches!(resolve(&zone, &query(7, "db.example.org", TYPE_A), true), Step::Forward(_)));
    }

    fn zone_of_both_families() -> Zone {
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

    #[test]
    fn each_family_is_asked_for_by_itself() {
        let zone = zone_of_both_families();
        for (name, qtype, rcode, want) in [
            ("both", TYPE_A, 0, Some("10.96.0.5")),
            ("both", TYPE_AAAA, 0, Some("fd00:96::5")),
            ("six", TYPE_A, 0, None),
            ("six", TYPE_AAAA, 0, Some("fd00:96::6")),
            ("pods", TYPE_A, 0, Some("10.244.1.5")),
            ("pods", TYPE_AAAA, 0, Some("fd00:244:0:1::5")),
            ("pods6", TYPE_A, 0, None),
            ("pods6", TYPE_AAAA, 0, Some("fd00:244:0:1::6")),
            ("pod-0.pods6", TYPE_A, 0, None),
            ("pod-0.pods6", TYPE_AAAA, 0, Some("fd00:244:0:1::6")),
            ("nope", TYPE_AAAA, 3, None),
        ] {
            let asked = query(7, &format!("{name}.shop.svc.cluster.local"), qtype);
            let Step::Answer(answer) = resolve(&zone, &asked, true) else { panic!("{name} {qtype}: not answered") };
            let want = want.into_iter().map(|address| format!("{name} {address}")).collect();
            assert_eq!(seen(&answer), (rcode, want), "{name} {qtype}");
        }
    }
}
