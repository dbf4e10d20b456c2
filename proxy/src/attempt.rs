//! One request to one backend: which endpoint, over which connection, and what may be tried again when that fails.
//! A request is never sent twice where the first time may have counted.

use crate::{
    body::{Outgoing, empty},
    check,
    headers::Needs,
    live::LiveCluster,
    metrics::add,
    multiplex,
    paced::pace,
    reason::{self, Reason},
    upstream::{ConnectError, InFlight, Sender, Upstream},
    worker::Worker,
};
use http::{Request, Response, Version};
use hyper::body::{Body, Incoming};
use sluice_traffic::balance;
use std::{rc::Rc, time::Instant};

/// Endpoints tried for one request before it is given up, and connections that it may find closed before it was sent.
const MAX_ATTEMPTS: u32 = 3;

/// The answer, and the connection it came by. Tries other endpoints, and once another connection, where that cannot
/// make a request count twice.
pub async fn send(
    worker: &Rc<Worker>,
    cluster: &Rc<LiveCluster>,
    request: Request<Incoming>,
    needs: Needs,
    in_flight: &mut InFlight,
    inbound: bool,
) -> Result<(Response<Incoming>, Sender), Reason> {
    if !cluster.known {
        return Err(Reason::NoBackend);
    }
    let http2 = request.version() == Version::HTTP_2;
    let (mut request, body_fate) = pace(worker, request);
    let empty_body = request.body().is_end_stream();
    let repeatable = empty_body && request.method().is_idempotent();
    let mut tries = Tries { repeatable, http2, shareable: needs == Needs::Stream, ..Tries::default() };
    loop {
        let Some(at) = tries.pick(cluster, worker) else { return Err(tries.failure) };
        let upstream = &cluster.endpoints[at];
        in_flight.at(upstream);
        let (mut sender, reused) = match tries.connection(upstream, worker).await {
            Ok(got) => got,
            Err(error) => {
                tracing::debug!(%error, "no connection");
                tries.failure = if inbound { Reason::AppUnreachable } else { error.reason() };
                tries.next_endpoint(at, worker);
                continue;
            }
        };
        let spare = empty_body.then(|| copy_head(&request));
        match sender.try_send(request).await {
            Ok(mut response) => {
                // Only the endpoint's own sidecar may say why it answered: an app could have it from anywhere.
                if inbound || upstream.endpoint.identity.is_none() {
                    response.headers_mut().remove(reason::HEADER);
                }
                match spare {
                    Some(spare) if tries.says_again(&response) && tries.another_endpoint(at, cluster, worker) => {
                        request = spare;
                    }
                    _ => return check::answer(&response, needs).map(|()| (response, sender)),
                }
            }
            Err(mut failed) => {
                if let Some(reason) = body_fate.reason() {
                    return Err(reason);
                }
                let unsent = failed.take_message();
                tracing::debug!(error = %failed.error(), reused, "request failed");
                upstream.failed(&sender, failed.error());
                let malformed = failed.error().is_parse();
                let reason = if malformed { Reason::UpstreamMalformed } else { Reason::UpstreamClosed };
                let untouched = unsent.is_some() || multiplex::unprocessed(failed.error());
                let again = unsent.or(spare.filter(|_| untouched || tries.repeatable && !malformed));
                request = again.filter(|_| tries.another_connection(untouched, at, cluster, worker)).ok_or(reason)?;
            }
        }
    }
}

/// What was tried for one request.
struct Tries {
    /// Idempotent and without body: may be sent again, once, after a connection broke before any byte of the answer
    /// (RFC 9110 §9.2.2). A server that is ending resets what waits in its backlog, so fresh connections break, too.
    repeatable: bool,
    http2: bool,
    /// Other requests may be on its connection.
    shareable: bool,
    /// Endpoints not to try again, by index; those past 63 are not remembered.
    tried: u64,
    attempts: u32,
    /// No pooled connection any more.
    fresh: bool,
    failure: Reason,
}

impl Default for Tries {
    fn default() -> Self {
        Self {
            repeatable: false,
            http2: false,
            shareable: false,
            tried: 0,
            attempts: 0,
            fresh: false,
            failure: Reason::NoEndpoints,
        }
    }
}

impl Tries {
    fn pick(&self, cluster: &LiveCluster, worker: &Worker) -> Option<usize> {
        if self.attempts >= MAX_ATTEMPTS {
            return None;
        }
        let endpoints = &cluster.endpoints;
        let random = if endpoints.len() > 1 { worker.random() } else { 0 };
        let untried = |i: usize| i > 63 || self.tried & (1 << i) == 0;
        balance::pick(endpoints.len(), random, |i| endpoints[i].in_flight.get(), untried)
    }

    async fn connection(&self, upstream: &Rc<Upstream>, worker: &Rc<Worker>) -> Result<(Sender, bool), ConnectError> {
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

fn copy_head(request: &Request<Outgoing>) -> Request<Outgoing> {
    let mut copy = Request::new(empty());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    if let Some(upgrade) = request.extensions().get::<hyper::ext::Protocol>() {
        copy.extensions_mut().insert(upgrade.clone());
    }
    copy
}
