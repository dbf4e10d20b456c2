//! A connection of HTTP/1 that nothing happens on: the HTTP library holds two buffers of 8 KiB for it, a sidecar may have ten
//! thousand of them. So the library is taken off it, and put on it again when the client sends something.

use crate::{
    guard::{Guard, Head, HeadTimer},
    limits::MAX_HEAD,
    worker::Worker,
};
use hyper::{
    body::{Body, Incoming},
    server::conn::http1,
    service::HttpService,
};
use hyper_util::rt::TokioIo;
use std::{
    error::Error,
    pin::{self, pin},
    rc::Rc,
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    time::Instant,
};

/// How often a connection is looked at; when nothing has happened on it since, it is idle.
const LOOK: Duration = Duration::from_secs(2);

/// Serves a connection until it ends by itself or, after `ending`, with the request that is on it.
pub async fn serve<S, V, B>(
    worker: Rc<Worker>,
    stream: S,
    head: Arc<Head>,
    mut service: V,
    ending: impl Future<Output = ()>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    V: HttpService<Incoming, ResBody = B> + Unpin,
    V::Error: Into<Box<dyn Error + Send + Sync>>,
    V::Future: Unpin,
    B: Body + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let mut ending = pin!(ending);
    let mut stream = Guard::new(stream, head.clone());
    loop {
        let mut builder = http1::Builder::new();
        builder.half_close(true).auto_date_header(false);
        builder.max_buf_size(MAX_HEAD).max_header_size(MAX_HEAD);
        // How long, the timer knows by itself.
        builder.timer(HeadTimer::new(head.clone(), worker.limits.head)).header_read_timeout(Duration::ZERO);
        let mut connection = builder.serve_connection(TokioIo::new(stream), service).with_upgrades();
        let mut look = pin!(tokio::time::sleep(LOOK));
        let mut seen = head.requests();
        loop {
            tokio::select! {
                biased;
                // How it ended was seen by the requests on it.
                _ = &mut connection => return,
                () = ending.as_mut() => {
                    pin::Pin::new(&mut connection).graceful_shutdown();
                    let _ = connection.await;
                    return;
                }
                () = look.as_mut() => {}
            }
            if std::mem::replace(&mut seen, head.requests()) == head.requests() && head.idle() {
                break;
            }
            look.as_mut().reset(Instant::now() + LOOK);
        }
        // Nobody has taken the connection over: it waits for a head.
        let Some(parts) = connection.into_parts() else { return };
        (stream, service) = (parts.io.into_inner(), parts.service);
        let more = parts.read_buf;
        if !more.is_empty() {
            stream.put_back(more);
            continue;
        }
        // Empty, and yet all of the buffer.
        drop(more);
        let _idle = worker.idle();
        let more = tokio::select! {
            more = stream.wait() => more,
            () = ending.as_mut() => false,
        };
        if !more {
            // Within TLS that says that nothing is missing. Who has gone does not hear it.
            let _ = stream.shutdown().await;
            return;
        }
    }
}
