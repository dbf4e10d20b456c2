//! One request to one backend: which endpoint, over which connection, and what may be tried again when that fails.
//! A request is never sent twice where the first time may have counted.

use crate::{
    body::Outgoing,
    check,
    cluster::{Held, LiveCluster},
    headers::Needs,
    metrics::add,
    multiplex,
    paced::Fate,
    reason::{self, Reason},
    rule::Routed,
    upstream::{ConnectError, InFlight, Sender, Serving, Upstream},
    worker::Worker,
};
use futures::future::{Either, select};
use http::{Request, Response, StatusCode, Version};
use hyper::{body::Incoming, client::conn::TrySendError};
use sluice_model::Retry;
use sluice_traffic::retry;
use std::{
    cell::Cell,
    pin::pin,
    rc::Rc,
    time::{Duration, Instant},
};

/// Endpoints tried for one request before it is given up, and connections that it may find closed before it was sent.
/// More only where a route asks for more.
const MAX_ATTEMPTS: u32 = 3;

/// The answer, and the connection it came by. Tries other endpoints, and once another connection, where that cannot make a
/// request count twice; what a route asks to be tried again is, whether or not it can.
pub async fn send(
    worker: &Rc<Worker>,
    routed: &Routed,
    key: Option<u64>,
    (request, fate): (Request<Outgoing>, &Fate),
    needs: Needs,
    in_flight: &mut InFlight,
    inbound: bool,
) -> Result<(Response<Incoming>, Sender), Reason> {
    let cluster = &routed.choice.cluster;
    if !cluster.known {
        return Err(Reason::NoBackend);
    }
    let tries = Tries::new(routed, key, &request, needs);
    if tries.asked.is_some() {
        cluster.may_retry(worker);
    }
    let exchange = Exchange { worker, routed, fate, needs, inbound };
    match cluster.hedge_after().filter(|_| tries.repeatable && cluster.endpoints.len() > 1) {
        None => exchange.send(tries, request, &mut |_, upstream| in_flight.at(upstream)).await,
        Some(after) => {
            let again = Tries::new(routed, key, &request, needs);
            Box::pin(exchange.hedged(after, [tries, again], request, in_flight)).await
        }
    }
}

/// A request that waits for a connection is woken by its endpoint; after this time it looks whether others have left it room.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What does not change from try to try.
struct Exchange<'a> {
    worker: &'a Rc<Worker>,
    routed: &'a Routed,
    fate: &'a Fate,
    needs: Needs,
    inbound: bool,
}

impl Exchange<'_> {
    /// Sends the request to a second endpoint when the first has not answered after a while: the first answer counts, and the
    /// other request is given up. Within the budget of retries.
    async fn hedged(
        &self,
        after: Duration,
        [tries, mut again]: [Tries<'_>; 2],
        request: Request<Outgoing>,
        in_flight: &mut InFlight,
    ) -> Result<(Response<Incoming>, Sender), Reason> {
        let (cluster, worker) = (&self.routed.choice.cluster, self.worker);
        let spare = copy(&request);
        let first_at = Cell::new(0);
        let mut note = |at, upstream: &Rc<Upstream>| {
            first_at.set(at);
            in_flight.at(upstream);
        };
        let mut first = Box::pin(self.send(tries, request, &mut note));
        if let Ok(answer) = tokio::time::timeout(after, &mut first).await {
            return answer;
        }
        again.tried = 1u64.checked_shl(first_at.get() as u32).unwrap_or(0);
        let Some(spare) = spare.filter(|_| again.pick(cluster, worker).is_some()) else { return first.await };
        match cluster.retry(worker, Some(&Retry::default())) {
            Ok(place) => again.retrying = place,
            Err(reason) => {
                worker.counters.refuse(reason);
                return first.await;
            }
        }
        add(&worker.counters.hedged, 1);
        let mut second_at = None;
        let mut serving = Serving::default();
        let mut note = |at, upstream: &Rc<Upstream>| {
            second_at = Some(at);
            serving.at(upstream);
        };
        let second = Box::pin(self.send(again, spare, &mut note));
        let answer = match select(first, second).await {
            Either::Left((Ok(answer), _)) => return Ok(answer),
            Either::Left((Err(_), second)) => second.await,
            Either::Right((Err(_), first)) => return first.await,
            Either::Right((answer, _)) => answer,
        };
        // The second endpoint has answered, or neither: the request is there.
        second_at.into_iter().for_each(|at| in_flight.at(&cluster.endpoints[at]));
        answer
    }

    /// One request to as many endpoints as it may be tried at, one after the other; `note` is told of each.
    async fn send(
        &self,
        mut tries: Tries<'_>,
        mut request: Request<Outgoing>,
        note: &mut dyn FnMut(usize, &Rc<Upstream>),
    ) -> Result<(Response<Incoming>, Sender), Reason> {
        let Self { worker, routed, fate, needs, inbound } = *self;
        let cluster = &routed.choice.cluster;
        let patience = tries.patience(routed);
        loop {
            let Some(at) = tries.pick(cluster, worker) else { return Err(tries.failure) };
            let upstream = &cluster.endpoints[at];
            note(at, upstream);
            let begun = cluster.policy.is_some().then(Instant::now);
            let us = || begun.map_or(0, |b| b.elapsed().as_micros() as u64);
            let (mut sender, reused) = match tries.connection(cluster, upstream, worker).await {
                Ok(got) => got,
                Err(reason) => {
                    let full = reason == Reason::CircuitOpen;
                    if full && tries.queued_until.is_none() {
                        return Err(reason);
                    }
                    if !full {
                        cluster.observe(worker, at, false, us());
                    }
                    tries.failure = if inbound { Reason::AppUnreachable } else { reason };
                    tries.next_endpoint(at, worker);
                    continue;
                }
            };
            let spare = copy(&request);
            match within(patience, sender.try_send(request)).await {
                Some(Ok(mut response)) => {
                    cluster.observe(worker, at, !response.status().is_server_error(), us());
                    // Only the endpoint's own sidecar may say why it answered: an app could have it from anywhere.
                    if inbound || upstream.endpoint.identity.is_none() {
                        response.headers_mut().remove(reason::HEADER);
                    }
                    let Some(spare) = spare else {
                        return check::answer(&response, needs).map(|()| (response, sender));
                    };
                    let again = tries.says_again(&response) && tries.another_endpoint(at, cluster, worker);
                    if !again && !tries.asked_again(Some(response.status()), at, cluster, worker).await {
                        return check::answer(&response, needs).map(|()| (response, sender));
                    }
                    request = spare;
                }
                Some(Err(failed)) => {
                    if let Some(reason) = fate.reason() {
                        return Err(reason);
                    }
                    tracing::debug!(error = %failed.error(), reused, "request failed");
                    upstream.failed(&sender, failed.error());
                    if !failed.error().is_user() {
                        // Else the client broke off, which says nothing of the endpoint.
                        cluster.observe(worker, at, false, us());
                    }
                    request = tries.after(failed, spare, at, cluster, worker).await?;
                }
                None => {
                    tracing::debug!(endpoint = %upstream.endpoint.address, "no answer in time");
                    cluster.observe(worker, at, false, us());
                    tries.failure = Reason::TryTimeout;
                    drop(sender);
                    let Some(again) = spare else { return Err(tries.failure) };
                    if !tries.asked_again(None, at, cluster, worker).await {
                        return Err(tries.failure);
                    }
                    request = again;
                }
            }
        }
    }
}

/// What `answer` brings, within `patience` where there is a limit.
async fn within<F: Future>(patience: Option<Duration>, answer: F) -> Option<F::Output> {
    match patience {
        None => Some(answer.await),
        // Apart: a timer is large, and most requests have none.
        Some(patience) => Box::pin(tokio::time::timeout(patience, answer)).await.ok(),
    }
}

/// What was tried for one request.
struct Tries<'a> {
    /// Idempotent and without body: may be sent again, once, after a connection broke before any byte of the answer
    /// (RFC 9110 §9.2.2). A server that is ending resets what waits in its backlog, so fresh connections break, too.
    repeatable: bool,
    http2: bool,
    /// Other requests may be on its connection.
    shareable: bool,
    /// By which the endpoint is chosen.
    key: Option<u64>,
    /// What the route asks to be tried again, and how often it may still be.
    asked: Option<&'a Retry>,
    asked_left: u32,
    /// The last of these tries is under way.
    retrying: Option<Held>,
    /// Endpoints not to try again, by index; those past 63 are not remembered.
    tried: u64,
    attempts: u32,
    /// No pooled connection any more.
    fresh: bool,
    /// It has waited for a connection, or may until then.
    queued_until: Option<tokio::time::Instant>,
    failure: Reason,
}

impl<'a> Tries<'a> {
    fn new(routed: &'a Routed, key: Option<u64>, request: &Request<Outgoing>, needs: Needs) -> Self {
        let asked = routed.asks.as_ref().and_then(|a| a.retry.as_ref());
        Self {
            repeatable: matches!(request.body(), Outgoing::Empty) && request.method().is_idempotent(),
            http2: request.version() == Version::HTTP_2,
            shareable: needs == Needs::Stream,
            key,
            asked,
            asked_left: asked.map_or(0, retry::attempts),
            retrying: None,
            tried: 0,
            attempts: 0,
            fresh: false,
            queued_until: None,
            failure: Reason::NoEndpoints,
        }
    }

    /// For one try: the shorter of what the rule and the backend's policy ask.
    fn patience(&self, routed: &Routed) -> Option<Duration> {
        let rule = routed.asks.as_ref().and_then(|a| a.try_timeout);
        let policy = routed.choice.cluster.policy.as_ref().map_or(0, |p| p.of.per_try_timeout_ms);
        let policy = (policy > 0).then(|| Duration::from_millis(policy.into()));
        [rule, policy].into_iter().flatten().min()
    }

    fn pick(&self, cluster: &LiveCluster, worker: &Worker) -> Option<usize> {
        if self.attempts >= MAX_ATTEMPTS {
            return None;
        }
        cluster.pick(worker, self.key, |i| i > 63 || self.tried & (1 << i) == 0)
    }

    async fn connection(
        &mut self,
        cluster: &LiveCluster,
        upstream: &Rc<Upstream>,
        worker: &Rc<Worker>,
    ) -> Result<(Sender, bool), Reason> {
        // What is open already needs no leave.
        if let Some(sender) = self.at_hand(upstream) {
            return Ok((sender, true));
        }
        let _waiting = cluster.wait()?;
        // Apart: rare.
        if !self.may_open(cluster, upstream)
            && let Some(sender) = Box::pin(self.queue(cluster, upstream)).await?
        {
            return Ok((sender, true));
        }
        self.connect(upstream, worker).await.map_err(|error| {
            tracing::debug!(%error, "no connection");
            error.reason()
        })
    }

    fn may_open(&self, cluster: &LiveCluster, upstream: &Upstream) -> bool {
        cluster.may_open(|| upstream.has_none_for(self.shareable, self.http2))
    }

    /// Waits until the endpoint has a connection at hand, or may have one more (`None`): for as long as connecting may take, all
    /// endpoints that are tried together.
    async fn queue(&mut self, cluster: &LiveCluster, upstream: &Upstream) -> Result<Option<Sender>, Reason> {
        let patience = upstream.connect_timeout();
        let until = *self.queued_until.get_or_insert_with(|| tokio::time::Instant::now() + patience);
        loop {
            let mut room = pin!(upstream.connections().room());
            room.as_mut().enable();
            if let Some(sender) = self.at_hand(upstream) {
                return Ok(Some(sender));
            }
            if let Some(opening) = upstream.opening(self.shareable, self.http2) {
                opening.await.map_err(|error| error.reason())?;
                continue;
            }
            if self.may_open(cluster, upstream) {
                return Ok(None);
            }
            let now = tokio::time::Instant::now();
            if now >= until {
                return Err(Reason::CircuitOpen);
            }
            // What is idle and not for this request must not keep it waiting.
            let _ = upstream.close_idle() || cluster.endpoints.iter().any(|e| e.close_idle());
            let _ = tokio::time::timeout_at(until.min(now + LOOK_AGAIN), room).await;
        }
    }

    /// A connection, or a place on one, that is open.
    fn at_hand(&self, upstream: &Upstream) -> Option<Sender> {
        if self.shareable
            && let Some(place) = upstream.mesh_at_hand()
        {
            return Some(place);
        }
        if self.http2 {
            return upstream.http2_at_hand();
        }
        let idle = (!self.fresh).then(|| upstream.take_idle(self.repeatable, Instant::now())).flatten();
        idle.map(Sender::Http1)
    }

    async fn connect(&self, upstream: &Rc<Upstream>, worker: &Rc<Worker>) -> Result<(Sender, bool), ConnectError> {
        if self.shareable
            && let Some(got) = upstream.mesh(worker).await?
        {
            return Ok(got);
        }
        if self.http2 {
            return upstream.http2(worker).await;
        }
        if !self.fresh
            && let Some(sender) = upstream.take_idle(self.repeatable, Instant::now())
        {
            return Ok((Sender::Http1(sender), true));
        }
        // Apart: rare, and large, and each connection holds room for the request that it serves.
        Ok((Sender::Http1(Box::pin(upstream.connect_http1(worker)).await?), false))
    }

    /// Whether the route wants one more try after an answer of this status, or after none came, and may have it; waits as
    /// long as it asks before.
    async fn asked_again(
        &mut self,
        status: Option<StatusCode>,
        at: usize,
        cluster: &LiveCluster,
        worker: &Worker,
    ) -> bool {
        let Some(asked) = self.asked else { return false };
        if self.asked_left == 0 || status.is_some_and(|s| !retry::asks_again(asked, s.as_u16())) {
            return false;
        }
        self.retrying = None;
        match cluster.retry(worker, Some(asked)) {
            Ok(place) => self.retrying = place,
            Err(reason) => {
                worker.counters.refuse(reason);
                return false;
            }
        }
        self.asked_left -= 1;
        add(&worker.counters.retries, 1);
        // Elsewhere, where there is another place; the bound is the route's own.
        self.tried |= 1u64.checked_shl(at as u32).unwrap_or(0);
        self.attempts = 0;
        if self.pick(cluster, worker).is_none() {
            self.tried = 0;
        }
        let n = retry::attempts(asked) - self.asked_left;
        let pause = Duration::from_millis(retry::backoff_ms(asked, n, worker.random()));
        if !pause.is_zero() {
            Box::pin(tokio::time::sleep(pause)).await;
        }
        true
    }

    /// The request to send again after its connection failed; the failure where it may not be.
    async fn after(
        &mut self,
        mut failed: TrySendError<Request<Outgoing>>,
        spare: Option<Request<Outgoing>>,
        at: usize,
        cluster: &LiveCluster,
        worker: &Worker,
    ) -> Result<Request<Outgoing>, Reason> {
        let unsent = failed.take_message();
        let malformed = failed.error().is_parse();
        self.failure = match failed.error() {
            _ if malformed => Reason::UpstreamMalformed,
            e if multiplex::by_tls(e) => Reason::IdentityNotProven,
            _ => Reason::UpstreamClosed,
        };
        let untouched = unsent.is_some() || multiplex::unprocessed(failed.error());
        let may = untouched || self.repeatable && !malformed;
        let again = unsent.or(spare);
        let built_in = may && again.is_some() && self.another_connection(untouched, at, cluster, worker);
        let Some(again) = again else { return Err(self.failure) };
        if built_in || self.asked_again(None, at, cluster, worker).await { Ok(again) } else { Err(self.failure) }
    }

    fn next_endpoint(&mut self, at: usize, worker: &Worker) {
        self.tried |= 1u64.checked_shl(at as u32).unwrap_or(0);
        self.attempts += 1;
        add(&worker.counters.retries, 1);
    }

    /// Whether another endpoint is left to try after `at`.
    fn another_endpoint(&mut self, at: usize, cluster: &LiveCluster, worker: &Worker) -> bool {
        self.next_endpoint(at, worker);
        self.pick(cluster, worker).is_some()
    }

    /// Whether a fresh connection may be tried, to another endpoint where there is one: once, and more often while
    /// the request certainly did not count.
    fn another_connection(&mut self, untouched: bool, at: usize, cluster: &LiveCluster, worker: &Worker) -> bool {
        add(&worker.counters.retries, 1);
        if cluster.endpoints.len() > 1 {
            self.tried |= 1u64.checked_shl(at as u32).unwrap_or(0);
        }
        let first = !std::mem::replace(&mut self.fresh, true);
        if untouched {
            self.attempts += 1;
            return self.attempts < MAX_ATTEMPTS;
        }
        first
    }

    /// The endpoint's own sidecar made this answer, and what it says allows another try.
    fn says_again(&mut self, response: &Response<Incoming>) -> bool {
        let said = |reason: Reason| {
            response.status() == reason.status()
                && response.headers().get(reason::HEADER).is_some_and(|r| r == reason.label())
        };
        // The app took no connection: nothing has happened yet, whatever the method.
        said(Reason::AppUnreachable)
            // The app closed on its sidecar as it might have on us: once, as there.
            || (self.repeatable && said(Reason::UpstreamClosed) && !std::mem::replace(&mut self.fresh, true))
    }
}

/// The same request once more, where its body allows it.
fn copy(request: &Request<Outgoing>) -> Option<Request<Outgoing>> {
    Some(with_head_of(request, request.body().again()?))
}

/// A request with the head of another.
pub fn with_head_of<A, B>(request: &Request<A>, body: B) -> Request<B> {
    let mut copy = Request::new(body);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    if let Some(upgrade) = request.extensions().get::<hyper::ext::Protocol>() {
        copy.extensions_mut().insert(upgrade.clone());
    }
    copy
}
