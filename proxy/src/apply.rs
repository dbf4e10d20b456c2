//! A request on its way through a rule that asks for more than a backend: faults, redirects, sizes, other heads, mirrors,
//! and bodies kept so that they can be sent again.

use crate::{
    attempt::{send, with_head_of},
    body::{Answer, Outgoing},
    headers::Needs,
    http::refuse,
    live::Choice,
    metrics::add,
    outbound::host,
    paced::{Fate, pace},
    reason::{self, Reason},
    rule::{Asks, Routed},
    upstream::InFlight,
    worker::Worker,
};
use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Request, Response, StatusCode, header, uri::Scheme};
use hyper::body::{Body, Incoming};
use std::{
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    time::{Duration, Instant},
};

/// Bodies up to this are kept so that a rule's retries can send them again; longer ones are sent once.
const MAX_KEPT: u64 = 64 * 1024;
/// Copies under way at a time in one worker; more requests go without.
const MAX_MIRRORING: u32 = 256;
/// How long a mirror may take to answer.
const MIRROR_PATIENCE: Duration = Duration::from_secs(15);

/// Does what the rule asks before a request is sent; an answer instead, where it asks for one. `scheme` and `port` are those
/// by which it came.
pub async fn prepare(
    worker: &Rc<Worker>,
    routed: &Routed,
    asks: &Asks,
    mut request: Request<Incoming>,
    (scheme, port): (&Scheme, u16),
) -> Result<(Request<Outgoing>, Fate), Box<Response<Answer>>> {
    inject_faults(worker, asks).await?;
    if let Some((status, location)) = asks.redirect(scheme, host(&request), port, request.uri()) {
        return Err(redirect(worker, status, location).into());
    }
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse::<u64>().ok());
    if asks.max_body.is_some_and(|max| length.is_some_and(|l| l > max)) {
        return Err(refuse(worker, Reason::BodyTooLarge).into());
    }
    routed.change_request(&mut request);
    let (request, fate) = pace(worker, request, asks.max_body);
    let (parts, mut body) = request.into_parts();
    if asks.retry.is_some() && length.is_some_and(|l| l > 0 && l <= MAX_KEPT) {
        body = match whole(body).await {
            Some(bytes) => Outgoing::Whole(Some(bytes)),
            None => return Err(refuse(worker, fate.reason().unwrap_or(Reason::MalformedRequest)).into()),
        };
    }
    for (mirror, cluster) in asks.mirrors.iter().filter(|(m, _)| m.share.takes(worker.random())) {
        if worker.mirroring.get() >= MAX_MIRRORING {
            tracing::debug!(mirror = %mirror.service, "too many copies are under way");
            continue;
        }
        let (original, copy) = body.copied();
        body = original;
        let choice = Choice { cluster: cluster.clone(), series: Rc::default(), key: routed.choice.key.clone() };
        let head = Request::from_parts(parts.clone(), ());
        tokio::task::spawn_local(mirror_to(worker.clone(), choice, with_head_of(&head, copy)));
    }
    Ok((Request::from_parts(parts, body), fate))
}

async fn inject_faults(worker: &Worker, asks: &Asks) -> Result<(), Box<Response<Answer>>> {
    if let Some((ms, share)) = asks.fault.delay
        && share.takes(worker.random())
    {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
    match asks.fault.abort {
        Some((status, share)) if share.takes(worker.random()) => {
            let mut response = refuse(worker, Reason::FaultInjected);
            *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
            Err(response.into())
        }
        _ => Ok(()),
    }
}

fn redirect(worker: &Worker, status: u16, location: Option<HeaderValue>) -> Response<Answer> {
    let (Some(location), Ok(status)) = (location, StatusCode::from_u16(status)) else {
        return refuse(worker, Reason::BadRedirect);
    };
    let mut response = Response::new(Answer::text(Bytes::new()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::LOCATION, location);
    response.headers_mut().insert(reason::HEADER, HeaderValue::from_static("redirect"));
    response
}

/// All of a body that is known to be short.
async fn whole(mut body: Outgoing) -> Option<Bytes> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        if let Ok(data) = frame.ok()?.into_data() {
            bytes.extend_from_slice(&data);
        }
    }
    Some(bytes.freeze())
}

/// Sends a copy and reads its answer to the end, for nobody.
async fn mirror_to(worker: Rc<Worker>, choice: Choice, request: Request<Outgoing>) {
    worker.mirroring.set(worker.mirroring.get() + 1);
    add(&worker.counters.mirrored, 1);
    let sent = async {
        let routed = Routed::plain(choice);
        let mut in_flight = InFlight::new(routed.choice.series.clone(), Instant::now(), None);
        let sent =
            send(&worker, &routed, None, (request, &Fate::default()), Needs::Stream, &mut in_flight, false).await;
        let Ok((response, sender)) = sent else { return };
        in_flight.answered(response.status().as_u16(), Some(sender));
        let mut body = response.into_body();
        while let Some(Ok(_)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {}
        in_flight.end();
    };
    // One that is slower is given up; what it would have answered is nobody's matter.
    let _ = tokio::time::timeout(MIRROR_PATIENCE, sent).await;
    worker.mirroring.set(worker.mirroring.get() - 1);
}
