//! Byte streams: bytes already read put back in front ([`Prefixed`]), a connection to an upstream with or without TLS
//! ([`Wire`]), and the wait for the first bytes of a connection.

use crate::connections::Counted;
use bytes::{Buf, Bytes, BytesMut};
use sluice_traffic::detect::{self, Detected};
use sluice_wire::ALPN_H2;
use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::client::TlsStream;

/// A stream whose first bytes were read already and are read again.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: Bytes,
    inner: S,
}

impl<S> Prefixed<S> {
    pub fn new(prefix: Bytes, inner: S) -> Self {
        Self { prefix, inner }
    }

    pub fn get_ref(&self) -> &S {
        &self.inner
    }
}

/// Up to here, bytes of a vectored write are joined: one plain write of them costs less than describing the pieces.
const JOIN: usize = 1024;

/// Writes short messages as one piece.
fn write_joined<S: AsyncWrite + Unpin>(
    stream: &mut S,
    cx: &mut Context<'_>,
    bufs: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    if let [only] = bufs {
        return Pin::new(stream).poll_write(cx, only);
    }
    let total: usize = bufs.iter().map(|b| b.len()).sum();
    if total > JOIN {
        return Pin::new(stream).poll_write_vectored(cx, bufs);
    }
    let mut joined = [0; JOIN];
    let mut at = 0;
    for buf in bufs {
        joined[at..at + buf.len()].copy_from_slice(buf);
        at += buf.len();
    }
    Pin::new(stream).poll_write(cx, &joined[..total])
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let n = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix[..n]);
        self.prefix.advance(n);
        if self.prefix.is_empty() {
            // Frees the buffer of the first read for the life of the connection.
            self.prefix = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        write_joined(&mut self.inner, cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A connection to an upstream, counted there until it is dropped.
#[derive(Debug)]
pub struct Wire {
    stream: Stream,
    _open: Counted,
}

#[derive(Debug)]
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Wire {
    pub fn plain(stream: TcpStream, open: Counted) -> Self {
        Self { stream: Stream::Plain(stream), _open: open }
    }

    pub fn tls(stream: TlsStream<TcpStream>, open: Counted) -> Self {
        Self { stream: Stream::Tls(Box::new(stream)), _open: open }
    }

    /// Waits for the other side's first bytes after the handshake, which none are read of. In TLS 1.3 it looks at our certificate when
    /// we are through, and were we to send at once, its reset for what it has not read could overtake what it says of that.
    pub async fn heard(&self) -> io::Result<()> {
        match &self.stream {
            Stream::Plain(_) => Ok(()),
            Stream::Tls(s) => match s.get_ref().0.peek(&mut [0]).await? {
                0 => Err(io::ErrorKind::UnexpectedEof.into()),
                _ => Ok(()),
            },
        }
    }

    /// The other side is a sidecar and chose to take requests multiplexed.
    pub fn is_multiplexed(&self) -> bool {
        match &self.stream {
            Stream::Plain(_) => false,
            Stream::Tls(s) => s.get_ref().1.alpn_protocol() == Some(ALPN_H2),
        }
    }
}

/// Runs the same poll on whichever stream it is.
macro_rules! either {
    ($self:ident, $method:ident, $($arg:expr),*) => {
        match &mut $self.get_mut().stream {
            Stream::Plain(s) => Pin::new(s).$method($($arg),*),
            Stream::Tls(s) => Pin::new(s.as_mut()).$method($($arg),*),
        }
    };
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self, poll_read, cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, poll_write, cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Plain(s) => write_joined(s, cx, bufs),
            Stream::Tls(s) => write_joined(s.as_mut(), cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(s) => s.is_write_vectored(),
            Stream::Tls(s) => s.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, poll_flush, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, poll_shutdown, cx)
    }
}

/// How long the first bytes may take to be complete once they have begun like a protocol known here: longer than TCP
/// takes to send a lost packet again. Else a ClientHello of two packets would at times be taken for opaque bytes, and
/// whoever sends a request in small pieces could have it passed on unseen.
const BEGUN_PATIENCE: Duration = Duration::from_secs(5);

/// Reads until the bytes tell what the connection carries, or `patience` is over: then they count as opaque, as in
/// protocols where the server speaks first. The bytes read come back with the answer.
pub async fn first_bytes<S: AsyncRead + Unpin>(stream: &mut S, patience: Duration) -> io::Result<(Bytes, Detected)> {
    look(stream, patience, detect::detect).await
}

/// The same of a connection that carries HTTP: of another version than 2 is all that does not begin like it.
pub async fn first_of_http<S: AsyncRead + Unpin>(stream: &mut S, patience: Duration) -> io::Result<(Bytes, Detected)> {
    look(stream, patience, detect::version).await
}

type Judge = fn(&[u8]) -> Detected;

async fn look<S: AsyncRead + Unpin>(stream: &mut S, patience: Duration, judge: Judge) -> io::Result<(Bytes, Detected)> {
    let mut bytes = BytesMut::with_capacity(1024);
    let found = match tokio::time::timeout(patience, decide(stream, &mut bytes, judge)).await {
        Ok(found) => found?,
        Err(_) if detect::begun(&bytes) => {
            let more = tokio::time::timeout(BEGUN_PATIENCE, decide(stream, &mut bytes, judge)).await;
            more.unwrap_or_else(|_| Ok(detect::at_end(&bytes)))?
        }
        Err(_) => Detected::Opaque,
    };
    Ok((bytes.freeze(), found))
}

async fn decide<S: AsyncRead + Unpin>(stream: &mut S, bytes: &mut BytesMut, judge: Judge) -> io::Result<Detected> {
    loop {
        let room = detect::MAX_BYTES - bytes.len();
        if (&mut *stream).take(room as u64).read_buf(bytes).await? == 0 {
            return Ok(detect::at_end(bytes));
        }
        match judge(bytes) {
            Detected::NeedMore => {}
            found => return Ok(found),
        }
    }
}
