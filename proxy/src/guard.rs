//! The client's end of an HTTP/1 connection, as the HTTP library sees it. It adds what that lacks:
//!
//! - a bounded time for each head, counted from its first byte. The library's own bound begins with the end of the
//!   request before, and so would end idle connections, which the app may be about to use;
//! - the reason on answers that the library makes by itself, before there is a request to serve;
//! - whether nothing is under way, so that the library can be taken off the connection meanwhile (`idle`).
//!
//! The library tells when it waits for a head by asking its [`Timer`] for a sleep, and drops that when it has one.

use crate::reason::{self, Reason};
use bytes::Bytes;
use hyper::rt::{Sleep, Timer};
use std::{
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Where a connection is in its current head; shared by its stream, its timer and its service, which all run on one
/// thread (what is atomic is so only because the library asks for it).
#[derive(Debug, Default)]
pub struct Head {
    /// Sleeps that the library holds: it waits for a head while there is one.
    waiting: AtomicU32,
    /// A byte has come since it waits.
    begun: AtomicBool,
    /// The last bytes before were an empty line, so nothing of this head came with them.
    clean: AtomicBool,
    /// The request before had a body of a given length, which may end in any way.
    sized: AtomicBool,
    late: AtomicBool,
    /// All that was written has gone out.
    flushed: AtomicBool,
    /// Requests that have come.
    requests: AtomicU32,
    /// Index of the reason of the library's answer, plus 1.
    refused: AtomicU8,
}

impl Head {
    /// A request has come; `sized` when its body's end cannot be told from the last bytes.
    pub fn complete(&self, sized: bool) {
        self.sized.store(sized, Relaxed);
        self.requests.fetch_add(1, Relaxed);
    }

    /// Requests that have come until now.
    pub fn requests(&self) -> u32 {
        self.requests.load(Relaxed)
    }

    /// The library waits for a head of which no byte has come since it waits, and has written all that it had: it writes
    /// and flushes what it has in the same turn in which it begins to wait.
    pub fn idle(&self) -> bool {
        let waits = self.waiting.load(Relaxed) > 0 && !self.begun.load(Relaxed);
        waits && self.flushed.load(Relaxed) && !self.late.load(Relaxed)
    }

    /// Why the library has refused what the client sent.
    pub fn refused(&self) -> Option<Reason> {
        Reason::ALL.get(usize::from(self.refused.load(Relaxed)).checked_sub(1)?).copied()
    }

    fn read(&self, bytes: &[u8]) {
        self.clean.store(bytes.ends_with(b"\r\n\r\n") || bytes.ends_with(b"\n\n"), Relaxed);
        if self.waiting.load(Relaxed) > 0 {
            self.begun.store(true, Relaxed);
        }
    }

    /// How long the client may take from now on; `None`: as long as it likes.
    fn patience(&self, head: Duration) -> Option<Duration> {
        match (self.begun.load(Relaxed), self.clean.load(Relaxed), self.sized.load(Relaxed)) {
            (true, ..) => Some(head),
            (false, true, _) => None,
            // Part of it came with the end of the request before.
            (false, false, false) => Some(head),
            // The bytes do not tell; what the library holds does, when the connection is next looked at (`idle`).
            (false, false, true) => None,
        }
    }
}

/// Gives the library sleeps that end only for it to notice [`Head::late`].
#[derive(Debug)]
pub struct HeadTimer {
    head: Arc<Head>,
    patience: Duration,
    /// Any instant: the library adds its bound and hands the sum back.
    epoch: Instant,
}

impl HeadTimer {
    pub fn new(head: Arc<Head>, patience: Duration) -> Self {
        Self { head, patience, epoch: Instant::now() }
    }
}

impl Timer for HeadTimer {
    fn sleep(&self, _: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(self.epoch)
    }

    fn sleep_until(&self, _: Instant) -> Pin<Box<dyn Sleep>> {
        if self.head.waiting.fetch_add(1, Relaxed) == 0 {
            self.head.begun.store(false, Relaxed);
        }
        Box::pin(HeadSleep { head: self.head.clone(), patience: self.patience, armed: None })
    }

    fn now(&self) -> Instant {
        self.epoch
    }
}

/// Lives from when the library begins to wait for a head until it has it.
struct HeadSleep {
    head: Arc<Head>,
    patience: Duration,
    /// Only for heads that do not come at once.
    armed: Option<Armed>,
}

struct Armed {
    patience: Duration,
    sleep: Pin<Box<tokio::time::Sleep>>,
}

impl Sleep for HeadSleep {}

impl Future for HeadSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(patience) = self.head.patience(self.patience) else { return Poll::Pending };
        if self.armed.as_ref().is_none_or(|a| a.patience != patience) {
            self.armed = Some(Armed { patience, sleep: Box::pin(tokio::time::sleep(patience)) });
        }
        let Some(armed) = &mut self.armed else { return Poll::Pending };
        if armed.sleep.as_mut().poll(cx).is_ready() {
            // The stream ends the head in its next read; ending the sleep would close without an answer.
            if !self.head.late.swap(true, Relaxed) {
                cx.waker().wake_by_ref();
            }
        }
        Poll::Pending
    }
}

impl Drop for HeadSleep {
    fn drop(&mut self) {
        self.head.waiting.fetch_sub(1, Relaxed);
    }
}

/// Ends any unfinished head as malformed, in whichever part of it: NUL is allowed nowhere.
const BREAK: &[u8] = b"\0\r\n\r\n";
/// How the library's own answers end, and how they begin.
const END: &[u8] = b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
const BEGINNINGS: [(&[u8], Reason); 3] = [
    (b"HTTP/1.1 400 Bad Request", Reason::MalformedRequest),
    (b"HTTP/1.1 414 URI Too Long", Reason::HeadTooLarge),
    (b"HTTP/1.1 431 Request Header Fields Too Large", Reason::HeadTooLarge),
];

/// See the module.
#[derive(Debug)]
pub struct Guard<S> {
    inner: S,
    head: Arc<Head>,
    /// Read already, and to be read again.
    again: Bytes,
    /// Written in place of the library's answer, from the second field on.
    instead: Option<(Vec<u8>, usize)>,
}

impl<S> Guard<S> {
    pub fn new(inner: S, head: Arc<Head>) -> Self {
        head.flushed.store(true, Relaxed);
        Self { inner, head, again: Bytes::new(), instead: None }
    }
}

impl<S: AsyncRead + Unpin> Guard<S> {
    /// Waits for what the client sends next, without room for it until then. It is read again afterwards; `false`: the
    /// client has ended.
    pub async fn wait(&mut self) -> bool {
        let first = poll_fn(|cx| {
            let mut part = [0; 1024];
            let mut buf = ReadBuf::new(&mut part);
            ready!(Pin::new(&mut self.inner).poll_read(cx, &mut buf))?;
            Poll::Ready(Ok::<_, io::Error>(Bytes::copy_from_slice(buf.filled())))
        });
        self.again = first.await.unwrap_or_default();
        !self.again.is_empty()
    }

    /// What the library has read too much.
    pub fn put_back(&mut self, bytes: Bytes) {
        self.again = bytes;
    }
}

impl<S: AsyncWrite + Unpin> Guard<S> {
    /// Whether the last of `bufs` ends with an answer of the library's own; then what is to be written for all of them
    /// is in `instead`.
    fn replaced(&mut self, bufs: &[IoSlice<'_>]) -> bool {
        if self.instead.is_some() {
            return true;
        }
        let Some(last) = bufs.iter().rev().find(|b| !b.is_empty()) else { return false };
        if self.head.waiting.load(Relaxed) == 0 {
            return false;
        }
        let Some(before) = last.strip_suffix(END) else { return false };
        let Some((beginning, reason)) = BEGINNINGS.iter().find(|(b, _)| before.ends_with(b)) else { return false };
        let reason = if self.head.late.load(Relaxed) { Reason::RequestTimeout } else { *reason };
        self.head.refused.store(reason as u8 + 1, Relaxed);
        let mut all: Vec<u8> = bufs.iter().flat_map(|b| b.iter().copied()).collect();
        all.truncate(all.len() - END.len() - beginning.len());
        all.extend_from_slice(answer(reason, beginning).as_bytes());
        self.instead = Some((all, 0));
        true
    }

    fn poll_instead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some((bytes, done)) = self.instead.as_mut().filter(|(bytes, done)| *done < bytes.len()) {
            match ready!(Pin::new(&mut self.inner).poll_write(cx, &bytes[*done..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => *done += n,
            }
        }
        self.instead = None;
        Poll::Ready(Ok(()))
    }
}

/// As any other answer of our own.
fn answer(reason: Reason, library: &[u8]) -> String {
    let late = format!("HTTP/1.1 {}", reason.status());
    let line = if reason == Reason::HeadTooLarge { String::from_utf8_lossy(library) } else { late.into() };
    let body = format!("sluice: {}\n", reason.label());
    format!(
        "{line}\r\nconnection: close\r\n{}: {}\r\ncontent-length: {}\r\n\r\n{body}",
        reason::HEADER,
        reason.label(),
        body.len()
    )
}

impl<S: AsyncRead + Unpin> AsyncRead for Guard<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.head.late.load(Relaxed) && self.head.waiting.load(Relaxed) > 0 {
            let n = BREAK.len().min(buf.remaining());
            buf.put_slice(&BREAK[..n]);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        if self.again.is_empty() {
            ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        } else {
            let n = self.again.len().min(buf.remaining());
            buf.put_slice(&self.again[..n]);
            // The last of it frees the rest.
            self.again = self.again.split_off(n);
        }
        if let bytes @ [_, ..] = &buf.filled()[before..] {
            self.head.read(bytes);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guard<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let me = self.get_mut();
        me.head.flushed.store(false, Relaxed);
        if me.replaced(&[IoSlice::new(buf)]) {
            return me.poll_instead(cx).map_ok(|()| buf.len());
        }
        Pin::new(&mut me.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let me = self.get_mut();
        me.head.flushed.store(false, Relaxed);
        if me.replaced(bufs) {
            return me.poll_instead(cx).map_ok(|()| bufs.iter().map(|b| b.len()).sum());
        }
        Pin::new(&mut me.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.inner).poll_flush(cx))?;
        self.head.flushed.store(self.instead.is_none(), Relaxed);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
