//! The door of the app: who may come in, and how often. The policy decides (`sluice-traffic::access`); buckets are a
//! worker's own, so that a limit is that of each worker.

use crate::{live::Choice, reason::Reason, rule::Routed, worker::Worker};
use http::Request;
use sluice_model::{Identity, InboundLimit, Name};
use sluice_traffic::{
    access::{Call, decide, limits},
    rate::Bucket,
};
use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
};

/// Beyond this those that are full are taken out; when none is, callers that have none share one.
const MAX_BUCKETS: usize = 4096;
/// Pause between two such looks.
const SWEEP_NS: u64 = 100_000_000;

/// The app at an address, and who calls it over this connection.
#[derive(Clone, Debug)]
pub struct Entry {
    pub address: SocketAddr,
    /// Proven by mTLS.
    pub caller: Option<Arc<Identity>>,
    choice: Choice,
}

impl Entry {
    pub fn new(worker: &Worker, address: SocketAddr, caller: Option<Arc<Identity>>) -> Self {
        let key = worker.inbound_key(address.port());
        let choice = Choice { cluster: worker.app(address), series: worker.series(key.clone()), key: key.into() };
        Self { address, caller, choice }
    }

    /// Lets a request in, or says why not.
    pub fn admit<B>(&self, worker: &Worker, request: &Request<B>) -> Result<Routed, Reason> {
        let request = Some((request.method().as_str(), request.uri().path()));
        admit(worker, &Call { caller: self.caller.as_deref(), port: self.address.port(), request }, None)?;
        Ok(Routed::plain(self.choice.clone()))
    }
}

/// Lets a request or connection in, or says why not. `client` is where it comes from, at a gateway: who proves no identity
/// there is told apart by it.
pub fn admit(worker: &Worker, call: &Call<'_>, client: Option<IpAddr>) -> Result<(), Reason> {
    let live = worker.live();
    let policy = &live.config.inbound.policy;
    if !policy.access.is_empty() {
        let verdict = decide(&policy.access, call);
        if let Some(policy) = verdict.would_deny {
            tracing::info!(%policy, caller = ?call.caller.map(ToString::to_string), port = call.port, request = ?call.request, "audit: would be denied");
            worker.counters.audit();
        }
        if let Some(policy) = verdict.denied {
            tracing::debug!(%policy, caller = ?call.caller.map(ToString::to_string), port = call.port, request = ?call.request, "denied");
            return Err(Reason::Denied);
        }
    }
    let now = worker.now_ns();
    let whom = call.caller.map(|c| Whom::Identity(Rc::new(c.clone()))).or(client.map(Whom::at));
    match limits(&policy.rate_limits, call).all(|(at, limit)| worker.buckets.take(at, limit, whom.as_ref(), now)) {
        true => Ok(()),
        false => Err(Reason::RateLimited),
    }
}

/// Of which limit of which policy, and of whom.
type Key = (Name, usize, Option<Whom>);

/// Who has a bucket of his own. Of an IPv6 client its network: all addresses of a /64 are one machine's to choose from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Whom {
    Identity(Rc<Identity>),
    Address(IpAddr),
}

impl Whom {
    fn at(client: IpAddr) -> Self {
        Self::Address(match client {
            IpAddr::V4(_) => client,
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
        })
    }
}

/// A worker's buckets.
#[derive(Debug, Default)]
pub struct Buckets {
    of: RefCell<HashMap<Key, Bucket>>,
    /// When those that are full were taken out last.
    swept_ns: Cell<u64>,
}

impl Buckets {
    fn take(&self, at: usize, limit: &InboundLimit, caller: Option<&Whom>, now_ns: u64) -> bool {
        let mut buckets = self.of.borrow_mut();
        // Not for each of the callers that have no room: looking at all takes its time.
        if buckets.len() >= MAX_BUCKETS && now_ns.saturating_sub(self.swept_ns.get()) >= SWEEP_NS {
            self.swept_ns.set(now_ns);
            buckets.retain(|_, b| !b.is_full(now_ns));
        }
        let mut key = (limit.policy.clone(), at, caller.filter(|_| limit.per_identity).cloned());
        if buckets.len() >= MAX_BUCKETS && !buckets.contains_key(&key) {
            key.2 = None;
        }
        buckets.entry(key).or_default().take(now_ns, limit.limit).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::RateLimit;
    use std::net::Ipv4Addr;

    fn once_a_minute() -> InboundLimit {
        let limit = RateLimit { requests: 1, per_ms: 60_000, burst: 1 };
        InboundLimit { policy: Name::new("shop", "p"), from: vec![], to: vec![], limit, per_identity: true }
    }

    fn client(text: &str) -> Whom {
        Whom::at(text.parse().expect(text))
    }

    #[test]
    fn an_ipv6_client_is_its_network() {
        assert_eq!(client("2001:db8:1:2::1"), client("2001:db8:1:2:ffff::9"));
        assert_ne!(client("2001:db8:1:2::1"), client("2001:db8:1:3::1"));
        assert_ne!(client("192.0.2.1"), client("192.0.2.2"));
    }

    #[test]
    fn clients_without_room_share_a_bucket_until_there_is_room() {
        let (buckets, limit) = (Buckets::default(), once_a_minute());
        let take = |n: u32, now_s: u64| {
            let whom = Whom::at(Ipv4Addr::from_bits(n).into());
            buckets.take(0, &limit, Some(&whom), now_s * 1_000_000_000)
        };
        assert!((0..MAX_BUCKETS as u32).all(|n| take(n, 1)));
        assert!(!take(0, 1), "each had its one");
        assert!(take(1 << 24, 1), "the shared one");
        assert!(!take(2 << 24, 1) && !take(3 << 24, 2));
        assert!(take(2 << 24, 62) && take(3 << 24, 62), "those that are full again have made room");
        assert!(buckets.of.borrow().len() <= 3);
    }
}
