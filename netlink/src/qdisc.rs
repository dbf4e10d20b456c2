//! Token buckets (the kernel's `tbf` queueing discipline) at the root of a link: put there, read back.
//!
//! The options are written by hand, as `linux/pkt_sched.h` lays them out: the netlink library has no type for them.

use crate::{Connection, Error, error::Result, rtnl::Request};
use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE, Nla};
use netlink_packet_route::{
    RouteNetlinkMessage as Message,
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};

const KIND: &str = "tbf";
const TCA_OPTIONS: u16 = 2;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// With this link layer the kernel computes times itself and wants no rate table.
const TC_LINKLAYER_ETHERNET: u8 = 1;
/// `struct tc_tbf_qopt`: two `tc_ratespec` of 12 bytes, limit, buffer, mtu.
const QOPT_BYTES: usize = 36;
const RATE_AT: usize = 8;
const LIMIT_AT: usize = 24;
const NLA_HEADER: usize = 4;

/// What a link sends is let through at `rate`; what waits beyond `limit` is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenBucket {
    /// Bytes per second.
    pub rate: u64,
    /// Bytes that may pass at once.
    pub burst: u32,
    /// Bytes that may wait, burst included.
    pub limit: u32,
}

/// Puts a bucket at the root of a link, in place of what is there.
pub fn set_bucket(connection: &mut Connection, link: u32, bucket: &TokenBucket) -> Result<()> {
    let mut message = root_of(link);
    message.attributes =
        vec![TcAttribute::Kind(KIND.to_owned()), TcAttribute::Other(DefaultNla::new(TCA_OPTIONS, options(bucket)))];
    let request = Request {
        message: Message::NewQueueDiscipline(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        operation: format!("limit link {link} to {} bytes a second", bucket.rate),
    };
    connection.execute(vec![request])?.into_iter().collect::<Result<Vec<()>>>().map(drop)
}

/// The kernel was built without token buckets (`CONFIG_NET_SCH_TBF`).
pub fn is_unknown(error: &Error) -> bool {
    [libc::ENOENT, libc::EOPNOTSUPP].map(Some).contains(&error.errno())
}

/// Rate and limit of the bucket at the root of a link; `None` where there is no bucket.
pub fn bucket(connection: &mut Connection, link: u32) -> Result<Option<(u64, u32)>> {
    let all = connection.dump(Message::GetQueueDiscipline(root_of(link)), "list queueing disciplines")?;
    let at_root = |m: &TcMessage| i64::from(m.header.index) == i64::from(link) && m.header.parent == TcHandle::ROOT;
    Ok(all.into_iter().find_map(|m| match m {
        Message::NewQueueDiscipline(m) if at_root(&m) => read_bucket(&m),
        _ => None,
    }))
}

fn root_of(link: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(link).unwrap_or(0); // the kernel's indexes are positive integers
    message.header.parent = TcHandle::ROOT;
    message
}

fn options(bucket: &TokenBucket) -> Vec<u8> {
    let mut parameters = [0u8; QOPT_BYTES];
    parameters[1] = TC_LINKLAYER_ETHERNET;
    let rate = u32::try_from(bucket.rate).unwrap_or(u32::MAX); // more is said by RATE64
    parameters[RATE_AT..RATE_AT + 4].copy_from_slice(&rate.to_ne_bytes());
    parameters[LIMIT_AT..LIMIT_AT + 4].copy_from_slice(&bucket.limit.to_ne_bytes());
    let mut bytes = Vec::new();
    append(&mut bytes, TCA_TBF_PARMS, &parameters);
    append(&mut bytes, TCA_TBF_BURST, &bucket.burst.to_ne_bytes());
    if bucket.rate > u64::from(u32::MAX) {
        append(&mut bytes, TCA_TBF_RATE64, &bucket.rate.to_ne_bytes());
    }
    bytes
}

/// One attribute; all that are written here are multiples of four long.
fn append(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend(((NLA_HEADER + value.len()) as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
}

fn read_bucket(m: &TcMessage) -> Option<(u64, u32)> {
    let kind = m.attributes.iter().any(|a| matches!(a, TcAttribute::Kind(k) if k == KIND));
    let nested = m.attributes.iter().find_map(|a| match a {
        TcAttribute::Options(options) => options.iter().find_map(other),
        _ => None,
    });
    read_options(&nested.filter(|_| kind)?)
}

fn other(option: &TcOption) -> Option<Vec<u8>> {
    let TcOption::Other(nla) = option else { return None };
    let mut value = vec![0; nla.value_len()];
    nla.emit_value(&mut value);
    Some(value)
}

fn read_options(mut bytes: &[u8]) -> Option<(u64, u32)> {
    let (mut parameters, mut wide) = (None, None);
    while let [a, b, c, d, ..] = *bytes {
        let (length, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
        let value = bytes.get(NLA_HEADER..length)?;
        match kind {
            TCA_TBF_PARMS => parameters = Some(value),
            TCA_TBF_RATE64 => wide = value.try_into().ok().map(u64::from_ne_bytes),
            _ => {}
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    let word = |at: usize| Some(u32::from_ne_bytes(parameters?.get(at..at + 4)?.try_into().ok()?));
    Some((wide.unwrap_or(u64::from(word(RATE_AT)?)), word(LIMIT_AT)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_read_back_and_damaged_ones_are_none() {
        for rate in [1, 1_000_000, u64::from(u32::MAX), 50_000_000_000] {
            let bytes = options(&TokenBucket { rate, burst: 20_000, limit: 45_000 });
            assert_eq!(read_options(&bytes), Some((rate, 45_000)));
            for cut in 0..QOPT_BYTES + NLA_HEADER {
                assert_eq!(read_options(&bytes[..cut]), None);
            }
        }
        assert_eq!(read_options(&[0, 0, 0, 0]), None);
    }
}
