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
