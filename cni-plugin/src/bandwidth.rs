//! PURE: the `bandwidth` capability (CNI conventions) as token buckets. Rates come in bits and leave in bytes.
//!
//! `ingress` is what comes to the pod: a bucket on the node's end of the link, out of the pod's reach. `egress` is what
//! the pod sends: a bucket on the pod's end, the only place where it queues without another device.

use serde::{Deserialize, Serialize};
use sluice_netlink::qdisc::TokenBucket;

/// How long a packet may wait in the queue, as with the reference plugin.
const LATENCY_MS: u64 = 25;
/// A burst that nobody names lasts this long.
const BURST_MS: u64 = 50;
/// The link's header comes on top of its MTU.
const HEADER_BYTES: u64 = 18;
const DEFAULT_MTU: u32 = 1500;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct RawBandwidth {
    #[serde(alias = "IngressRate")]
    ingress_rate: i64,
    #[serde(alias = "IngressBurst")]
    ingress_burst: i64,
    #[serde(alias = "EgressRate")]
    egress_rate: i64,
    #[serde(alias = "EgressBurst")]
    egress_burst: i64,
}

/// One direction's limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Bytes per second.
    pub rate: u64,
    /// Bytes that may pass at once.
    pub burst: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Limit>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Limit>,
}

impl TryFrom<RawBandwidth> for Bandwidth {
    type Error = String;

    fn try_from(raw: RawBandwidth) -> Result<Self, String> {
        Ok(Self {
            ingress: limit("ingress", raw.ingress_rate, raw.ingress_burst)?,
            egress: limit("egress", raw.egress_rate, raw.egress_burst)?,
        })
    }
}

fn limit(name: &str, rate_bits: i64, burst_bits: i64) -> Result<Option<Limit>, String> {
    let positive = |what: &str, n: i64| u64::try_from(n).map_err(|_| format!("{name}{what} is {n}"));
    let (rate, burst) = (positive("Rate", rate_bits)?, positive("Burst", burst_bits)?);
    match (rate, burst) {
        (0, 0) => Ok(None),
        (0, _) => Err(format!("{name}Burst is {burst} without {name}Rate")),
        (1..8, _) => Err(format!("{name}Rate is {rate} bits a second, less than one byte")),
        (_, _) if burst / 8 > u64::from(u32::MAX) => Err(format!("{name}Burst is {burst}, more than 4 GB")),
        (_, 0) => Ok(Some(Limit { rate: rate / 8, burst: rate / 8 * BURST_MS / 1000 })),
        (_, _) => Ok(Some(Limit { rate: rate / 8, burst: burst / 8 })),
    }
}

impl Bandwidth {
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }
}

impl Limit {
    /// The bucket for a link: a burst smaller than one packet would let no full packet pass.
    pub fn bucket(&self, mtu: Option<u32>) -> TokenBucket {
        let packet = u64::from(mtu.unwrap_or(DEFAULT_MTU)) + HEADER_BYTES;
        let burst = u32::try_from(self.burst.max(packet)).unwrap_or(u32::MAX);
        let waiting = self.rate.saturating_mul(LATENCY_MS) / 1000;
        let limit = u32::try_from(waiting.saturating_add(u64::from(burst))).unwrap_or(u32::MAX);
        TokenBucket { rate: self.rate, burst, limit }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_in_bits_become_buckets_in_bytes() {
        assert_eq!(limit("ingress", 0, 0), Ok(None));
        assert_eq!(limit("ingress", 8_000_000, 80_000), Ok(Some(Limit { rate: 1_000_000, burst: 10_000 })));
        assert_eq!(limit("ingress", 8_000_000, 0), Ok(Some(Limit { rate: 1_000_000, burst: 50_000 })));
        for (rate, burst) in [(-1, 0), (0, -1), (0, 8), (7, 0), (8, i64::MAX)] {
            assert!(limit("egress", rate, burst).is_err(), "{rate} {burst}");
        }
        let l = Limit { rate: 1_000_000, burst: 10_000 };
        assert_eq!(l.bucket(None), TokenBucket { rate: 1_000_000, burst: 10_000, limit: 35_000 });
        let small = Limit { rate: 1_000, burst: 1 };
        assert_eq!(small.bucket(Some(9000)), TokenBucket { rate: 1_000, burst: 9_018, limit: 9_043 });
        let large = Limit { rate: u64::MAX / 8, burst: 1 << 31 };
        assert_eq!(large.bucket(None).limit, u32::MAX);
    }
}
