//! Bodies: the request's on its way to the upstream, and the answer's on its way back, which knows when the request
//! has ended.

use crate::{paced::Paced, upstream::InFlight};
use bytes::Bytes;
use http_body_util::Either;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

/// A request's body: as it came in, or empty.
pub type Outgoing = Either<Paced, http_body_util::Empty<Bytes>>;

pub fn empty() -> Outgoing {
    Either::Right(http_body_util::Empty::new())
}

/// An answer's body.
#[derive(Debug)]
pub enum Answer {
    /// From the upstream. The second part goes when the request has ended.
    Upstream(Incoming, Option<Box<InFlight>>),
    /// Of our own making.
    Text(Option<Bytes>),
}

impl Answer {
    pub fn text(text: impl Into<Bytes>) -> Self {
        Self::Text(Some(text.into()).filter(|t| !t.is_empty()))
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Text(text) => Poll::Ready(text.take().map(|t| Ok(Frame::data(t)))),
            Self::Upstream(body, in_flight) => {
                let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
                let ended = match &frame {
                    None => true,
                    Some(Ok(_)) => body.is_end_stream(),
                    Some(Err(_)) => false,
                };
                if let Some(in_flight) = in_flight.take_if(|_| ended) {
                    in_flight.end();
                }
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Text(text) => text.is_none(),
            Self::Upstream(body, _) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, |t| t.len() as u64)),
            Self::Upstream(body, _) => body.size_hint(),
        }
    }
}
