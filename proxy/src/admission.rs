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
    cell::RefCell,
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
};

/// Buckets beyond this are emptied of those that are full; when none is, callers share one.
const MAX_BUCKETS: usize = 4096;

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
    let whom = call.caller.map(|c| Whom::Identity(Rc::new(c.clone()))).or(client.map(Whom::Address));
    match limits(&policy.rate_limits, call).all(|(at, limit)| worker.buckets.take(at, limit, whom.as_ref(), now)) {
        true => Ok(()),
        false => Err(Reason::RateLimited),
    }
}

/// Of which limit of which policy, and of whom.
type Key = (Name, usize, Option<Whom>);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Whom {
    Identity(Rc<Identity>),
    Address(IpAddr),
}

/// A worker's buckets.
#[derive(Debug, Default)]
pub struct Buckets(RefCell<HashMap<Key, Bucket>>);

impl Buckets {
    fn take(&self, at: usize, limit: &InboundLimit, caller: Option<&Whom>, now_ns: u64) -> bool {
        let mut buckets = self.0.borrow_mut();
        if buckets.len() >= MAX_BUCKETS {
            buckets.retain(|_, b| !b.is_full(now_ns));
        }
        let own = limit.per_identity && buckets.len() < MAX_BUCKETS;
        let key = (limit.policy.clone(), at, caller.filter(|_| own).cloned());
        buckets.entry(key).or_default().take(now_ns, limit.limit).is_ok()
    }
}
