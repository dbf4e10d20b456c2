//! Bodies: the request's on its way to the upstream, and the answer's on its way back, which knows when the request
//! has ended.

use crate::{paced::Paced, upstream::InFlight};
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::{sync::mpsc, time::Sleep};

/// Why a request's body ended too early: for the connection it was on, which is given up.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// Pieces of a body that may wait for a mirror. A mirror that is slower is given up, never waited for.
const COPY_QUEUE: usize = 64;

/// A request's body on its way out.
#[derive(Debug)]
pub enum Outgoing {
    Empty,
    /// As it comes in.
    Incoming(Paced),
    /// All of it, so that it can be sent again.
    Whole(Option<Bytes>),
    /// As it comes in, with a copy for each mirror.
    Copied(Box<Copied>),
    /// Such a copy.
    Copy(mpsc::Receiver<Piece>),
}

#[derive(Debug)]
pub struct Copied {
    body: Box<Outgoing>,
    copies: Vec<mpsc::Sender<Piece>>,
}

/// A copy ends whole only with its [`Piece::End`]: one that breaks off is no message.
#[derive(Debug)]
pub enum Piece {
    Data(Bytes),
    End,
}

impl Outgoing {
    /// The body, and a copy of it for another request.
    pub fn copied(self) -> (Self, Self) {
        match self {
            Self::Empty => (Self::Empty, Self::Empty),
            Self::Whole(bytes) => (Self::Whole(bytes.clone()), Self::Whole(bytes)),
            mut body => {
                let (copy, pieces) = mpsc::channel(COPY_QUEUE);
                if let Self::Copied(copied) = &mut body {
                    copied.copies.push(copy);
                    return (body, Self::Copy(pieces));
                }
                (Self::Copied(Box::new(Copied { body: Box::new(body), copies: vec![copy] })), Self::Copy(pieces))
            }
        }
    }

    /// Can be sent again: the same once more.
    pub fn again(&self) -> Option<Self> {
        match self {
            Self::Empty => Some(Self::Empty),
            Self::Whole(bytes) => Some(Self::Whole(bytes.clone())),
            _ => None,
        }
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Incoming(body) => Pin::new(body).poll_frame(cx),
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Copied(copied) => copied.poll(cx),
            Self::Copy(pieces) => match ready!(pieces.poll_recv(cx)) {
                Some(Piece::Data(bytes)) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
                Some(Piece::End) => Poll::Ready(None),
                None => Poll::Ready(Some(Err("the request that this is a copy of broke off".into()))),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Incoming(body) => body.is_end_stream(),
            Self::Whole(bytes) => bytes.is_none(),
            // Their ends are passed on as well.
            Self::Copied(_) | Self::Copy(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Incoming(body) => body.size_hint(),
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Copied(copied) => copied.body.size_hint(),
            Self::Copy(_) => SizeHint::default(),
        }
    }
}

impl Copied {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut *self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.copies.retain(|c| c.try_send(Piece::Data(data.clone())).is_ok());
                }
            }
            // A queue without room for the end means a mirror that is far behind: its copy breaks off.
            None => self.copies.drain(..).for_each(|c| drop(c.try_send(Piece::End))),
            Some(Err(_)) => self.copies.clear(),
        }
        Poll::Ready(frame)
    }
}

/// An answer's body.
#[derive(Debug)]
pub enum Answer {
    /// From the upstream. The second part goes when the request has ended; after the third, it has ended in any case.
    Upstream(Incoming, Option<Box<InFlight>>, Option<Pin<Box<Sleep>>>),
    /// Of our own making.
    Text(Option<Bytes>),
}

impl Answer {
    /// Ends at `deadline` at the latest.
    pub fn until(self, deadline: tokio::time::Instant) -> Self {
        match self {
            Self::Upstream(body, in_flight, _) => {
                Self::Upstream(body, in_flight, Some(Box::pin(tokio::time::sleep_until(deadline))))
            }
            text => text,
        }
    }

    pub fn text(text: impl Into<Bytes>) -> Self {
        Self::Text(Some(text.into()).filter(|t| !t.is_empty()))
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Text(text) => Poll::Ready(text.take().map(|t| Ok(Frame::data(t)))),
            Self::Upstream(body, in_flight, deadline) => {
                if deadline.as_mut().is_some_and(|d| d.as_mut().poll(cx).is_ready()) {
                    return Poll::Ready(Some(Err("the rule's time for the request is over".into())));
                }
                let frame = ready!(Pin::new(&mut *body).poll_frame(cx)).map(|f| f.map_err(Into::into));
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
            Self::Upstream(body, ..) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, |t| t.len() as u64)),
            Self::Upstream(body, ..) => body.size_hint(),
        }
    }
}
