//! Opaque bytes between two streams, both ways, with half-close. All connections of a worker share one read buffer;
//! a connection owns memory only for bytes that the other side did not take at once.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Size of the shared read buffer, and so the most that one connection holds per direction.
const BUFFER: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER]);
}

/// Bytes moved in each direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    pub sent: u64,
    pub received: u64,
}

/// Copies between `near` and `far` until both have ended or one fails.
pub async fn pump<A, B>(near: &mut A, far: &mut B) -> io::Result<Moved>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut forth, mut back) = (Half::default(), Half::default());
    poll_fn(|cx| {
        let a = forth.poll(cx, near, far)?;
        let b = back.poll(cx, far, near)?;
        match (a, b) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(())),
            _ => Poll::<io::Result<()>>::Pending,
        }
    })
    .await?;
    Ok(Moved { sent: forth.moved, received: back.moved })
}

/// One direction.
#[derive(Default)]
struct Half {
    /// Read and not yet written, from `done` on.
    rest: Vec<u8>,
    done: usize,
    ended: bool,
    closed: bool,
    moved: u64,
}

impl Half {
    fn poll<R, W>(&mut self, cx: &mut Context<'_>, from: &mut R, to: &mut W) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        while !self.closed {
            ready!(self.write_rest(cx, to))?;
            if self.ended {
                ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                self.closed = true;
            } else if SCRATCH.with_borrow_mut(|s| self.read_and_write(cx, from, to, s))?.is_pending() {
                // What was written so far must not wait for the next read.
                let _ = Pin::new(to).poll_flush(cx)?;
                return Poll::Pending;
            }
        }
        Poll::Ready(Ok(()))
    }

    fn write_rest<W: AsyncWrite + Unpin>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<()>> {
        while self.done < self.rest.len() {
            let n = ready!(Pin::new(&mut *to).poll_write(cx, &self.rest[self.done..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.done += n;
        }
        // Idle connections own no buffer.
        self.rest = Vec::new();
        self.done = 0;
        Poll::Ready(Ok(()))
    }

    /// Reads once; pending when there is nothing to read.
    fn read_and_write<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        scratch: &mut [u8],
    ) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut buffer = ReadBuf::new(scratch);
        ready!(Pin::new(from).poll_read(cx, &mut buffer))?;
        let bytes = buffer.filled();
        self.ended = bytes.is_empty();
        self.moved += bytes.len() as u64;
        let written = match bytes {
            [] => 0,
            bytes => match Pin::new(to).poll_write(cx, bytes)? {
                Poll::Ready(n) => n,
                Poll::Pending => 0,
            },
        };
        self.rest.extend_from_slice(&bytes[written..]);
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    #[tokio::test]
    async fn bytes_and_half_close_pass_both_ways() {
        let (mut client, mut near) = duplex(100);
        let (mut far, mut server) = duplex(7);
        let pumped = tokio::spawn(async move { pump(&mut near, &mut far).await });
        let sent = vec![7u8; 200_000];
        let to_send = sent.clone();
        let served = tokio::spawn(async move {
            let mut got = Vec::new();
            server.read_to_end(&mut got).await.expect("read");
            // The client has closed its half; the answer still gets through.
            server.write_all(b"done").await.expect("write");
            got
        });
        client.write_all(&to_send).await.expect("write");
        client.shutdown().await.expect("shutdown");
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("read");
        assert_eq!(answer, "done");
        assert_eq!(served.await.expect("served"), sent);
        drop(client);
        let moved = pumped.await.expect("joined").expect("pumped");
        assert_eq!(moved, Moved { sent: 200_000, received: 4 });
    }
}
