//! DNS messages as far as a resolver of one question needs them (RFC 1035 §4): PURE. What is not understood is answered
//! FORMERR or handed on as it came; nothing here panics on any bytes.

use std::net::IpAddr;

pub const TYPE_A: u16 = 1;
pub const TYPE_CNAME: u16 = 5;
pub const TYPE_SOA: u16 = 6;
pub const TYPE_PTR: u16 = 12;
pub const TYPE_AAAA: u16 = 28;
pub const TYPE_ANY: u16 = 255;
const CLASS_IN: u16 = 1;
const HEADER: usize = 12;
/// RFC 1035 §2.3.4.
const MAX_NAME: usize = 255;
/// Largest UDP answer without EDNS.
pub const MAX_UDP: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rcode {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NxDomain = 3,
    NotImp = 4,
}

/// A query with exactly one question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    pub id: u16,
    pub recursion_desired: bool,
    /// Lower case, dots between labels, none at the end.
    pub name: String,
    pub qtype: u16,
    /// Offset of the end of the question.
    end: usize,
    /// What the client can take over UDP (EDNS, RFC 6891), 512 without.
    pub max_udp: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No answer at all: not a query, or too short to have an id.
    Drop,
    /// Answer with this code.
    Answer(u16, Rcode),
}

fn u16_at(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*b.get(at)?, *b.get(at + 1)?]))
}

pub fn parse(b: &[u8]) -> Result<Query, Refused> {
    let id = u16_at(b, 0).ok_or(Refused::Drop)?;
    let flags = u16_at(b, 2).ok_or(Refused::Drop)?;
    if flags & 0x8000 != 0 {
        return Err(Refused::Drop);
    }
    if (flags >> 11) & 0xf != 0 {
        return Err(Refused::Answer(id, Rcode::NotImp));
    }
    let bad = Refused::Answer(id, Rcode::FormErr);
    if u16_at(b, 4) != Some(1) {
        return Err(bad);
    }
    let (name, at) = name(b, HEADER).ok_or(bad)?;
    let qtype = u16_at(b, at).ok_or(bad)?;
    let class = u16_at(b, at + 2).ok_or(bad)?;
    if class != CLASS_IN {
        return Err(Refused::Answer(id, Rcode::NotImp));
    }
    let end = at + 4;
    Ok(Query { id, recursion_desired: flags & 0x100 != 0, name, qtype, end, max_udp: edns(b, end).unwrap_or(MAX_UDP) })
}

/// An uncompressed name; in a question there is nothing to point at.
fn name(b: &[u8], mut at: usize) -> Option<(String, usize)> {
    let mut out = String::new();
    loop {
        let len = usize::from(*b.get(at)?);
        at += 1;
        if len == 0 {
            return Some((out, at));
        }
        if len > 63 || out.len() + len + 1 > MAX_NAME {
            return None;
        }
        if !out.is_empty() {
            out.push('.');
        }
        for c in b.get(at..at + len)? {
            // A dot or control byte inside a label cannot be one of our names; keep it distinguishable.
            out.push(if c.is_ascii_graphic() && *c != b'.' { c.to_ascii_lowercase().into() } else { '\u{fffd}' });
        }
        at += len;
    }
}

/// The UDP size of an OPT record right after the question, if that is all there is.
fn edns(b: &[u8], at: usize) -> Option<usize> {
    if u16_at(b, 6)? != 0 || u16_at(b, 8)? != 0 || u16_at(b, 10)? == 0 {
        return None;
    }
    if *b.get(at)? != 0 || u16_at(b, at + 1)? != 41 {
        return None;
    }
    Some(usize::from(u16_at(b, at + 3)?).clamp(MAX_UDP, 4096))
}

/// What one record says of its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    Address(IpAddr),
    Pointer(String),
    /// The name is another one for this.
    Alias(String),
}

/// One answer record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Lower case, without the last dot.
    pub owner: String,
    pub data: Data,
    pub ttl_s: u32,
}

impl Data {
    fn qtype(&self) -> u16 {
        match self {
            Data::Address(IpAddr::V4(_)) => TYPE_A,
            Data::Address(IpAddr::V6(_)) => TYPE_AAAA,
            Data::Pointer(_) => TYPE_PTR,
            Data::Alias(_) => TYPE_CNAME,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Data::Address(IpAddr::V4(a)) => a.octets().to_vec(),
            Data::Address(IpAddr::V6(a)) => a.octets().to_vec(),
            Data::Pointer(n) | Data::Alias(n) => encode_name(n),
        }
    }

    /// An alias stands for whatever is asked for (RFC 1034 §3.6.2).
    pub fn answers(&self, qtype: u16) -> bool {
        qtype == self.qtype() || qtype == TYPE_ANY || matches!(self, Data::Alias(_))
    }
}

fn encode_name(n: &str) -> Vec<u8> {
    let mut out = vec![];
    for label in n.split('.').filter(|l| !l.is_empty() && l.len() < 64) {
        out.push(u8::try_from(label.len()).unwrap_or(63));
        out.extend_from_slice(label.as_bytes());
    }
    out.push(0);
    out
}

/// What an authoritative negative answer names as the zone (RFC 2308: lets clients cache it).
pub struct Soa<'a> {
    pub zone: &'a str,
    pub serial: u32,
    pub negative_ttl_s: u32,
}

/// A query of our own for what a client asked for by another name.
pub fn query(id: u16, name: &str, qtype: u16) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    out.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]); // recursion desired, one question
    out.extend(encode_name(name));
    out.extend_from_slice(&qtype.to_be_bytes());
    out.extend_from_slice(&CLASS_IN.to_be_bytes());
    out
}

/// The answer, to the question's own name; over UDP pass the client's limit: what does not fit is left out and TC set.
pub fn answer(
    query: &[u8],
    q: &Query,
    rcode: Rcode,
    records: &[Data],
    ttl_s: u32,
    soa: Option<&Soa<'_>>,
    limit: usize,
) -> Vec<u8> {
    write(query, q, rcode, records.iter().map(|data| (q.name.as_str(), data, ttl_s)), soa, limit)
}

/// The same with records of other names too, in this order.
pub fn answer_records(
    query: &[u8],
    q: &Query,
    rcode: Rcode,
    records: &[Record],
    soa: Option<&Soa<'_>>,
    limit: usize,
) -> Vec<u8> {
    write(query, q, rcode, records.iter().map(|r| (r.owner.as_str(), &r.data, r.ttl_s)), soa, limit)
}

fn write<'a>(
    query: &[u8],
    q: &Query,
    rcode: Rcode,
    records: impl Iterator<Item = (&'a str, &'a Data, u32)>,
    soa: Option<&Soa<'_>>,
    limit: usize,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    out.extend_from_slice(&q.id.to_be_bytes());
    // QR, AA, RA, and RD as asked.
    let flags = 0x8480 | (u16::from(q.recursion_desired) << 8) | rcode as u16;
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
    out.extend_from_slice(query.get(HEADER..q.end).unwrap_or_default());
    let mut written = 0u16;
    let mut truncated = false;
    for (owner, d, ttl_s) in records {
        let data = d.bytes();
        let owner = if owner == q.name { vec![0xc0, HEADER as u8] } else { encode_name(owner) };
        if out.len() + owner.len() + 10 + data.len() > limit {
            truncated = true;
            break;
        }
        record(&mut out, &owner, d.qtype(), ttl_s, &data);
        written += 1;
    }
    out[6..8].copy_from_slice(&written.to_be_bytes());
    if truncated {
        out[2] |= 0x02;
    }
    if let Some(s) = soa.filter(|_| written == 0) {
        let data = soa_data(s);
        let zone = encode_name(s.zone);
        if out.len() + zone.len() + 10 + data.len() <= limit {
            record(&mut out, &zone, TYPE_SOA, s.negative_ttl_s, &data);
            out[9] = 1;
        }
    }
    out
}

fn record(out: &mut Vec<u8>, name: &[u8], qtype: u16, ttl_s: u32, data: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(&qtype.to_be_bytes());
    out.extend_from_slice(&CLASS_IN.to_be_bytes());
    out.extend_from_slice(&ttl_s.to_be_bytes());
    out.extend_from_slice(&u16::try_from(data.len()).unwrap_or(0).to_be_bytes());
    out.extend_from_slice(data);
}

fn soa_data(s: &Soa<'_>) -> Vec<u8> {
    let mut d = encode_name(&format!("ns.dns.{}", s.zone));
    d.extend(encode_name(&format!("hostmaster.{}", s.zone)));
    for n in [s.serial, 7200, 1800, 86_400, s.negative_ttl_s] {
        d.extend_from_slice(&n.to_be_bytes());
    }
    d
}

/// An answer without a question section, for what could not be read.
pub fn error(id: u16, rcode: Rcode) -> Vec<u8> {
    let mut out = vec![0; HEADER];
    out[..2].copy_from_slice(&id.to_be_bytes());
    out[2..4].copy_from_slice(&(0x8080 | rcode as u16).to_be_bytes());
    out
}

/// Shortest time to live among a message's records, for the cache; none when it cannot be read or must not be kept.
pub fn min_ttl(b: &[u8]) -> Option<u32> {
    let rcode = b.get(3)? & 0x0f;
    if (rcode != 0 && rcode != 3) || b.get(2)? & 0x02 != 0 {
        return None;
    }
    let mut at = HEADER;
    for _ in 0..u16_at(b, 4)? {
        at = skip_name(b, at)? + 4;
    }
    let records = u32::from(u16_at(b, 6)?) + u32::from(u16_at(b, 8)?);
    let mut min = None;
    for _ in 0..records {
        at = skip_name(b, at)?;
        let ttl = u32::from_be_bytes(b.get(at + 4..at + 8)?.try_into().ok()?);
        min = Some(min.map_or(ttl, |m: u32| m.min(ttl)));
        at += 10 + usize::from(u16_at(b, at + 8)?);
    }
    min
}

/// What an upstream server answered: its code, and those of its records that say where a name leads. None when it cannot
/// be read, or is not whole.
pub fn read_answer(b: &[u8]) -> Option<(u8, Vec<Record>)> {
    if b.get(2)? & 0x82 != 0x80 {
        return None; // no answer, or a truncated one
    }
    let mut at = HEADER;
    for _ in 0..u16_at(b, 4)? {
        at = skip_name(b, at)? + 4;
    }
    let mut records = vec![];
    for _ in 0..u16_at(b, 6)? {
        let owner = compressed_name(b, at)?;
        at = skip_name(b, at)?;
        let ttl_s = u32::from_be_bytes(b.get(at + 4..at + 8)?.try_into().ok()?);
        let (start, len) = (at + 10, usize::from(u16_at(b, at + 8)?));
        let rdata = b.get(start..start + len)?;
        let data = match (u16_at(b, at)?, len) {
            (TYPE_A, 4) => Some(Data::Address(IpAddr::from(<[u8; 4]>::try_from(rdata).ok()?))),
            (TYPE_AAAA, 16) => Some(Data::Address(IpAddr::from(<[u8; 16]>::try_from(rdata).ok()?))),
            (TYPE_CNAME, _) => Some(Data::Alias(compressed_name(b, start)?)),
            _ => None,
        };
        records.extend(data.map(|data| Record { owner, data, ttl_s }));
        at = start + len;
    }
    Some((b.get(3)? & 0x0f, records))
}

/// A name that may point back into the message. Each pointer leads further back, so that there is an end.
fn compressed_name(b: &[u8], mut at: usize) -> Option<String> {
    let mut out = String::new();
    let mut before = at;
    loop {
        let len = usize::from(*b.get(at)?);
        match len {
            0 => return Some(out),
            n if n & 0xc0 == 0xc0 => {
                let to = (n & 0x3f) << 8 | usize::from(*b.get(at + 1)?);
                if to >= before {
                    return None;
                }
                (at, before) = (to, to);
            }
            n if n > 63 || out.len() + n + 1 > MAX_NAME => return None,
            n => {
                if !out.is_empty() {
                    out.push('.');
                }
                let label = b.get(at + 1..at + 1 + n)?;
                // Such a label could not be written again.
                if !label.iter().all(|c| c.is_ascii_graphic() && *c != b'.') {
                    return None;
                }
                out.extend(label.iter().map(|c| char::from(c.to_ascii_lowercase())));
                at += n + 1;
            }
        }
    }
}

fn skip_name(b: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match usize::from(*b.get(at)?) {
            0 => return Some(at + 1),
            n if n & 0xc0 == 0xc0 => return Some(at + 2),
            n if n > 63 => return None,
            n => at += n + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::{
        op::{Message, MessageType, OpCode, Query as HQuery},
        rr::{Name, RData, RecordType},
        serialize::binary::{BinDecodable, BinEncodable},
    };
    use proptest::prelude::*;
    use std::str::FromStr;

    fn query(name: &str, t: RecordType) -> Vec<u8> {
        let mut m = Message::new(7, MessageType::Query, OpCode::Query);
        m.add_query(HQuery::query(Name::from_str(name).expect("a name"), t));
        m.to_bytes().expect("encodes")
    }

    #[test]
    fn answers_are_read_by_another_library() {
        let b = query("Web.Shop.svc.cluster.local.", RecordType::A);
        let q = parse(&b).expect("parses");
        assert_eq!((q.name.as_str(), q.qtype, q.id), ("web.shop.svc.cluster.local", TYPE_A, 7));
        let ip: IpAddr = "10.96.0.5".parse().expect("an address");
        let m = Message::from_bytes(&answer(&b, &q, Rcode::NoError, &[Data::Address(ip)], 5, None, MAX_UDP))
            .expect("decodes");
        assert_eq!(m.answers.len(), 1);
        assert!(matches!(&m.answers[0].data, RData::A(a) if IpAddr::from(a.0) == ip));
        let soa = Soa { zone: "cluster.local", serial: 1, negative_ttl_s: 5 };
        let m = Message::from_bytes(&answer(&b, &q, Rcode::NxDomain, &[], 5, Some(&soa), MAX_UDP)).expect("decodes");
        assert_eq!(m.authorities.len(), 1);
    }

    #[test]
    fn aliases_are_written_and_read_again() {
        let b = query("db.shop.svc.cluster.local.", RecordType::A);
        let q = parse(&b).expect("parses");
        let record = |owner: &str, data| Record { owner: owner.into(), data, ttl_s: 7 };
        let records = [
            record("db.shop.svc.cluster.local", Data::Alias("db.example.org".into())),
            record("db.example.org", Data::Address("192.0.2.1".parse().expect("an address"))),
            record("db.example.org", Data::Address("2001:db8::1".parse().expect("an address"))),
        ];
        let out = answer_records(&b, &q, Rcode::NoError, &records, None, MAX_UDP);
        let m = Message::from_bytes(&out).expect("decodes");
        assert!(matches!(&m.answers[0].data, RData::CNAME(n) if n.0.to_string() == "db.example.org."));
        assert_eq!(m.answers[1].name.to_string(), "db.example.org.");
        assert_eq!(read_answer(&out), Some((0, records.to_vec())));
        // Names that other servers compress.
        let compressed = m.to_bytes().expect("encodes");
        assert!(compressed.len() < out.len());
        assert_eq!(read_answer(&compressed), Some((0, records.to_vec())));
        for cut in 0..compressed.len() {
            assert_eq!(read_answer(&compressed[..cut]), None, "{cut}");
        }
        assert_eq!(read_answer(&b), None, "a query is no answer");
        let own = super::query(9, "db.example.org", TYPE_A);
        let parsed = parse(&own).expect("parses");
        assert_eq!((parsed.id, parsed.name.as_str(), parsed.qtype), (9, "db.example.org", TYPE_A));
        assert!(parsed.recursion_desired);
    }

    #[test]
    fn what_does_not_fit_is_truncated_and_says_so() {
        let b = query("many.", RecordType::A);
        let q = parse(&b).expect("parses");
        let many: Vec<_> = (0..100u8).map(|i| Data::Address(IpAddr::from([10, 0, 0, i]))).collect();
        let out = answer(&b, &q, Rcode::NoError, &many, 5, None, MAX_UDP);
        assert!(out.len() <= MAX_UDP && out[2] & 2 != 0);
        assert!(answer(&b, &q, Rcode::NoError, &many, 5, None, 65_535)[2] & 2 == 0);
    }

    #[test]
    fn what_is_no_plain_query_is_refused() {
        let b = query("a.", RecordType::A);
        let with = |at: usize, v: u8| {
            let mut b = b.clone();
            b[at] = v;
            b
        };
        assert_eq!(parse(&[1]), Err(Refused::Drop));
        assert_eq!(parse(&with(2, 0x80)), Err(Refused::Drop));
        assert_eq!(parse(&with(2, 0x28)), Err(Refused::Answer(7, Rcode::NotImp)));
        assert_eq!(parse(&with(5, 2)), Err(Refused::Answer(7, Rcode::FormErr)));
        assert_eq!(parse(&b[..b.len() - 1]), Err(Refused::Answer(7, Rcode::FormErr)));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(b in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(q) = parse(&b) {
                answer(&b, &q, Rcode::NoError, &[], 1, None, MAX_UDP);
            }
            let _ = min_ttl(&b);
            let _ = read_answer(&b);
        }

        #[test]
        fn nor_do_answers_that_are_damaged(at in 0usize..70, value in any::<u8>()) {
            let b = query("a.example.", RecordType::A);
            let q = parse(&b).expect("parses");
            let (alias, address) = (Data::Alias("b.example".into()), Data::Address([10, 0, 0, 1].into()));
            let records = [("a.example", alias), ("b.example", address)];
            let records = records.map(|(owner, data)| Record { owner: owner.into(), data, ttl_s: 5 });
            let mut answer = answer_records(&b, &q, Rcode::NoError, &records, None, MAX_UDP);
            if let Some(byte) = answer.get_mut(at) {
                *byte = value;
            }
            let _ = read_answer(&answer);
        }
    }
}
