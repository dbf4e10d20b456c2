//! A backend as one worker uses it: its endpoints, and what its [`BackendPolicy`] asks to be kept about them (turns,
//! latencies, ejections, budgets, bounds). Without a policy nothing is kept and nothing is looked at but the requests in
//! flight.

use crate::{metrics::add, reason::Reason, upstream::Upstream, worker::Worker};
use sluice_model::{BackendPolicy, Balance, HashKey, Name, Retry, RetryBudget};
use sluice_traffic::{
    balance,
    budget::Budget,
    hash::hash,
    outlier,
    ring::{Maglev, Ring},
};
use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

/// The endpoints of a backend.
#[derive(Debug)]
pub struct LiveCluster {
    pub known: bool,
    /// Its port is said to speak HTTP/2.
    pub http2: bool,
    pub endpoints: Vec<Rc<Upstream>>,
    pub policy: Option<Box<LivePolicy>>,
    pub state: Rc<ClusterState>,
}

/// A policy with what is made of it once per set of endpoints.
#[derive(Debug)]
pub struct LivePolicy {
    pub of: Arc<BackendPolicy>,
    keyed: Option<Keyed>,
    /// Of each endpoint, whether it is in this pod's zone; absent where zones do not count.
    near: Option<Vec<bool>>,
    /// Of each endpoint, since when it is one, in the worker's milliseconds; `None`, or absent: it is warm.
    joined: Vec<Option<u64>>,
}

#[derive(Debug)]
enum Keyed {
    Ring(Ring),
    Maglev(Maglev),
}

/// What is kept about a backend from config to config.
#[derive(Debug, Default)]
pub struct ClusterState {
    budget: RefCell<Budget>,
    requests: Cell<u32>,
    pending: Cell<u32>,
    retries: Cell<u32>,
    last: Cell<usize>,
    /// Endpoints that the last config with a slow start had, and since when; `None`: from the first of those on.
    met: RefCell<Option<Met>>,
    pub ejections: Cell<u64>,
}

impl ClusterState {
    /// There is no slow start any more: a later one begins with whom it finds then.
    pub fn meet_anew(&self) {
        self.met.take();
    }
}

type Met = HashMap<SocketAddr, Option<u64>>;

/// PURE. Who is new: not whom a sidecar finds when it begins, else those that come soon after would not be told from them.
fn meet(before: Option<&Met>, now: u64, addresses: &[SocketAddr]) -> Met {
    let since = |a: &SocketAddr| before.and_then(|met| met.get(a).copied().unwrap_or(Some(now)));
    addresses.iter().map(|a| (*a, since(a))).collect()
}

/// All that a worker keeps about backends.
pub type States = HashMap<(Name, u16), Rc<ClusterState>>;

/// Counts one of something until it is dropped.
#[derive(Debug)]
pub struct Held(Rc<ClusterState>, fn(&ClusterState) -> &Cell<u32>);

impl Held {
    fn new(state: &Rc<ClusterState>, of: fn(&ClusterState) -> &Cell<u32>) -> Self {
        of(state).set(of(state).get() + 1);
        Self(state.clone(), of)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let cell = (self.1)(&self.0);
        cell.set(cell.get() - 1);
    }
}

impl LivePolicy {
    /// `now` is the worker's, in milliseconds.
    pub fn new(
        of: Arc<BackendPolicy>,
        addresses: &[SocketAddr],
        near: &[bool],
        state: &ClusterState,
        now: u64,
    ) -> Self {
        let names = || addresses.iter().map(|a| hash(a.to_string().as_bytes(), 0)).collect::<Vec<_>>();
        let keyed = match &of.balance {
            Balance::RingHash(_) => Some(Keyed::Ring(Ring::new(&names()))),
            Balance::Maglev(_) => Some(Keyed::Maglev(Maglev::new(&names()))),
            _ => None,
        };
        let near = of.locality.map(|_| near.to_vec());
        let mut met = state.met.borrow_mut();
        *met = (of.slow_start_ms > 0).then(|| meet(met.as_ref(), now, addresses));
        let joined = met.iter().flat_map(|met| addresses.iter().map(|a| met.get(a).copied().flatten())).collect();
        Self { of, keyed, near, joined }
    }

    fn hash_key(&self) -> Option<&HashKey> {
        match &self.of.balance {
            Balance::RingHash(key) | Balance::Maglev(key) => Some(key),
            _ => None,
        }
    }
}

/// The key of a request by what the policy hashes; `source` is the caller's.
pub fn key(key: &HashKey, headers: &http::HeaderMap, source: u64) -> Option<u64> {
    let text = match key {
        HashKey::Header(name) => headers.get(name)?.as_bytes(),
        HashKey::Cookie(name) => crate::headers::cookie(headers, name)?.as_bytes(),
        HashKey::Source => return Some(source),
    };
    Some(hash(text, 0))
}

impl LiveCluster {
    /// One without policy, of an endpoint.
    pub fn of(upstream: Rc<Upstream>) -> Self {
        Self { known: true, http2: false, endpoints: vec![upstream], policy: None, state: Rc::default() }
    }

    /// The key by which this backend's endpoint is chosen, where one is.
    pub fn hash_key(&self) -> Option<&HashKey> {
        self.policy.as_ref().and_then(|p| p.hash_key())
    }

    /// The endpoint that takes the next request or connection.
    pub fn pick(&self, worker: &Worker, key: Option<u64>, untried: impl Fn(usize) -> bool) -> Option<usize> {
        if let Some(policy) = &self.policy {
            return self.pick_by(policy, worker, key, untried);
        }
        let random = if self.endpoints.len() > 1 { worker.random() } else { 0 };
        balance::pick(self.endpoints.len(), random, |i| self.endpoints[i].in_flight.get(), untried)
    }

    fn pick_by(
        &self,
        policy: &LivePolicy,
        worker: &Worker,
        key: Option<u64>,
        untried: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let now = worker.now_ms();
        let out = |i: usize| self.endpoints[i].record.borrow().is_out(now);
        let panic = policy.of.panic_percent > 0 && {
            let healthy = (0..self.endpoints.len()).filter(|i| !out(*i)).count();
            healthy * 100 < self.endpoints.len() * usize::from(policy.of.panic_percent)
        };
        let well = |i: usize| panic || policy.of.outlier.is_none() || !out(i);
        let usable = |i: usize| untried(i) && well(i);
        match (&policy.near, policy.of.locality) {
            (Some(near), Some(locality)) => {
                let healthy = near.iter().enumerate().filter(|(i, near)| **near && well(*i)).count();
                let local = near.iter().filter(|near| **near).count();
                let stays = balance::stays_local(healthy, local, locality.healthy_percent, worker.random());
                let side = self.pick_of(policy, worker, now, key, |i| usable(i) && near[i] == stays);
                // The other side rather than nobody.
                side.or_else(|| self.pick_of(policy, worker, now, key, usable))
            }
            _ => self.pick_of(policy, worker, now, key, usable),
        }
    }

    fn pick_of(
        &self,
        policy: &LivePolicy,
        worker: &Worker,
        now: u64,
        key: Option<u64>,
        usable: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let first = self.draw(policy, worker, now, key, &usable)?;
        let Some(since) = policy.joined.get(first).copied().flatten() else { return Some(first) };
        let warmth = balance::warmth(now.saturating_sub(since), policy.of.slow_start_ms);
        if balance::takes_warming(warmth, worker.random()) {
            return Some(first);
        }
        self.draw(policy, worker, now, key, |i| i != first && usable(i)).or(Some(first))
    }

    fn draw(
        &self,
        policy: &LivePolicy,
        worker: &Worker,
        now: u64,
        key: Option<u64>,
        usable: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let (count, endpoints) = (self.endpoints.len(), &self.endpoints);
        match (&policy.of.balance, &policy.keyed, key) {
            (_, Some(Keyed::Ring(ring)), Some(key)) => ring.pick(key, usable),
            (_, Some(Keyed::Maglev(table)), Some(key)) => table.pick(key, usable),
            (Balance::RoundRobin, ..) => {
                let next = balance::in_turn(count, self.state.last.get(), usable)?;
                self.state.last.set(next);
                Some(next)
            }
            (Balance::Ewma, ..) => {
                let cost = |i: usize| endpoints[i].latency.get().cost(now, endpoints[i].in_flight.get());
                balance::pick(count, worker.random(), cost, usable)
            }
            _ => balance::pick(count, worker.random(), |i| endpoints[i].in_flight.get(), usable),
        }
    }

    /// How the endpoint at `at` did: an answer after `us`, or its failure to come.
    pub fn observe(&self, worker: &Worker, at: usize, success: bool, us: u64) {
        let Some(policy) = &self.policy else { return };
        let (now, upstream) = (worker.now_ms(), &self.endpoints[at]);
        if policy.of.balance == Balance::Ewma {
            let mut latency = upstream.latency.get();
            latency.observe(now, us);
            upstream.latency.set(latency);
        }
        let Some(of) = &policy.of.outlier else { return };
        if !upstream.record.borrow_mut().answered(now, success, of) {
            return;
        }
        let out = self.endpoints.iter().filter(|e| e.record.borrow().is_out(now)).count();
        if outlier::may_eject(out, self.endpoints.len(), of) {
            upstream.record.borrow_mut().eject(now, of);
            add(&self.state.ejections, 1);
            add(&worker.counters.ejections, 1);
            tracing::info!(endpoint = %upstream.endpoint.address, "ejected: it fails where others do not");
        }
    }

    /// Endpoints that are ejected at present.
    pub fn ejected(&self, now_ms: u64) -> usize {
        self.endpoints.iter().filter(|e| e.record.borrow().is_out(now_ms)).count()
    }

    /// Takes a request in, within the bounds of the policy. It counts until the answer is dropped.
    pub fn admit(&self, worker: &Worker) -> Result<Option<Held>, Reason> {
        let Some(policy) = &self.policy else { return Ok(None) };
        let most = policy.of.circuit.max_requests;
        if most > 0 && self.state.requests.get() >= most {
            return Err(Reason::CircuitOpen);
        }
        self.state.budget.borrow_mut().request(worker.now_ms() / 1000);
        Ok(Some(Held::new(&self.state, |s| &s.requests)))
    }

    /// A request that may be tried again has come: the budget is a share of those. With a policy all are counted.
    pub fn may_retry(&self, worker: &Worker) {
        if self.policy.is_none() {
            self.state.budget.borrow_mut().request(worker.now_ms() / 1000);
        }
    }

    /// After how long without an answer a request is also sent elsewhere.
    pub fn hedge_after(&self) -> Option<Duration> {
        let ms = self.policy.as_ref()?.of.hedge_after_ms;
        (ms > 0).then(|| Duration::from_millis(ms.into()))
    }

    /// Lets a request wait for a connection.
    pub fn wait(&self) -> Result<Option<Held>, Reason> {
        let Some(policy) = &self.policy else { return Ok(None) };
        let most = policy.of.circuit.max_pending;
        if most > 0 && self.state.pending.get() >= most {
            return Err(Reason::CircuitOpen);
        }
        Ok(Some(Held::new(&self.state, |s| &s.pending)))
    }

    /// Whether an endpoint may have one more connection, for requests of a kind for which it `has_none` or has some. For the
    /// first it always may: they would wait for connections that do nothing for them.
    pub fn may_open(&self, has_none: impl Fn() -> bool) -> bool {
        let most = self.policy.as_ref().map_or(0, |p| p.of.circuit.max_connections);
        let all = || self.endpoints.iter().map(|e| e.connections().open()).sum::<u32>();
        most == 0 || all() < most || has_none()
    }

    /// Lets a request be tried once more; `asked` is the route's own word, which is held to a budget in any case.
    pub fn retry(&self, worker: &Worker, asked: Option<&Retry>) -> Result<Option<Held>, Reason> {
        let own = self.policy.as_ref().and_then(|p| p.of.retry_budget);
        let budget = own.or(asked.map(|_| RetryBudget::default()));
        if budget.is_none() && self.policy.is_none() {
            return Ok(None);
        }
        let most = self.policy.as_ref().map_or(0, |p| p.of.circuit.max_retries);
        if most > 0 && self.state.retries.get() >= most {
            return Err(Reason::CircuitOpen);
        }
        let now = worker.now_ms() / 1000;
        if budget.is_some_and(|b| !self.state.budget.borrow_mut().retry(now, b)) {
            return Err(Reason::RetryBudget);
        }
        Ok(Some(Held::new(&self.state, |s| &s.retries)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_there_at_first_is_not_new() {
        let [a, b, c] =
            ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"].map(|a| a.parse::<SocketAddr>().expect("an address"));
        let first = meet(None, 10, &[a]);
        assert_eq!(first, Met::from([(a, None)]));
        let second = meet(Some(&first), 20, &[a, b]);
        assert_eq!(second, Met::from([(a, None), (b, Some(20))]));
        assert_eq!(meet(Some(&second), 30, &[b, c]), Met::from([(b, Some(20)), (c, Some(30))]));
        // Who comes back is new once more.
        let gone = meet(Some(&second), 40, &[a]);
        assert_eq!(meet(Some(&gone), 50, &[a, b]), Met::from([(a, None), (b, Some(50))]));
    }
}
