//! A request's body on its way to the upstream: bounded in how long it may stand still, and remembering how it broke,
//! so that the client's fault is not taken for the upstream's.

use crate::{
    body::{BodyError, Outgoing},
    reason::Reason,
    worker::Worker,
};
use bytes::Bytes;
use http::{Request, Version};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use std::{
    cell::Cell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::Sleep;

/// Why a body did not come to its end.
#[derive(Clone, Debug, Default)]
pub struct Fate(Option<Rc<Cell<Option<Reason>>>>);

impl Fate {
    /// What was wrong with the body, if it was the body.
    pub fn reason(&self) -> Option<Reason> {
        self.0.as_ref().and_then(|fate| fate.get())
    }
}

/// See the module.
#[derive(Debug)]
pub struct Paced {
    body: Incoming,
    idle: Duration,
    /// Bytes that may still come.
    left: u64,
    /// Only while the client is waited for.
    sleep: Option<Pin<Box<Sleep>>>,
    fate: Rc<Cell<Option<Reason>>>,
}

/// The body stands still for too long.
#[derive(Debug, thiserror::Error)]
#[error("no more of the request's body for {0:?}")]
pub struct Idle(Duration);

/// Longer than the rule allows.
#[derive(Debug, thiserror::Error)]
#[error("the request's body is longer than the route allows")]
pub struct TooLong;

/// Gives a request the body that upstreams are sent, of at most `most` bytes. Streams of HTTP/2 may be silent: only
/// HTTP/1's are bounded in time.
pub fn pace(worker: &Worker, request: Request<Incoming>, most: Option<u64>) -> (Request<Outgoing>, Fate) {
    if request.body().is_end_stream() {
        return (request.map(|_| Outgoing::Empty), Fate::default());
    }
    let idle = if request.version() == Version::HTTP_2 { Duration::MAX } else { worker.limits.body_idle };
    let fate = Rc::<Cell<_>>::default();
    let left = most.unwrap_or(u64::MAX);
    let request = request.map(|body| Outgoing::Incoming(Paced { body, idle, left, sleep: None, fate: fate.clone() }));
    (request, Fate(Some(fate)))
}

impl Body for Paced {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let me = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut me.body).poll_frame(cx) {
            me.sleep = None;
            let length = |f: &Frame<Bytes>| f.data_ref().map_or(0, |d| d.len() as u64);
            let more = frame.as_ref().and_then(|f| f.as_ref().ok()).map_or(0, length);
            if more > me.left {
                me.fate.set(Some(Reason::BodyTooLarge));
                return Poll::Ready(Some(Err(TooLong.into())));
            }
            me.left -= more;
            return Poll::Ready(frame.map(|f| {
                f.map_err(|error| {
                    me.fate.set(Some(Reason::MalformedRequest));
                    error.into()
                })
            }));
        }
        if me.idle == Duration::MAX {
            return Poll::Pending;
        }
        let sleep = me.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(me.idle)));
        sleep.as_mut().poll(cx).map(|()| {
            me.fate.set(Some(Reason::RequestTimeout));
            Some(Err(Idle(me.idle).into()))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
