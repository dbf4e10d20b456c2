//! An app that speaks HTTP/2 and keeps what it got: the sidecar's other end of a connection of requests.

use crate::common::LOCAL;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    thread::JoinHandle,
};
use tokio::{net::TcpListener, sync::oneshot};

/// A request that came whole.
#[derive(Debug)]
pub struct Seen {
    pub head: http::request::Parts,
    pub body: Bytes,
    pub trailers: Option<HeaderMap>,
}

type Log = Arc<Mutex<Vec<Seen>>>;

pub struct App {
    pub address: SocketAddr,
    log: Log,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl App {
    /// Answers `ok` to each request when it has all of it.
    pub fn start() -> Self {
        let listener = std::net::TcpListener::bind(LOCAL).expect("bind");
        listener.set_nonblocking(true).expect("nonblocking");
        let address = listener.local_addr().expect("an address");
        let (stop, stopped) = oneshot::channel();
        let log = Log::default();
        let logged = log.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let listener = TcpListener::from_std(listener).expect("a listener");
                tokio::select! {
                    () = serve(listener, logged) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, log, stop: Some(stop), thread: Some(thread) }
    }

    /// What came since the last time.
    pub fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut self.log.lock().expect("the log"))
    }
}

impl Drop for App {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the app ends");
        }
    }
}

async fn serve(listener: TcpListener, log: Log) {
    while let Ok((stream, _)) = listener.accept().await {
        let log = log.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let log = log.clone();
            async move {
                let (head, body) = request.into_parts();
                // Cut short: there is nobody to answer.
                if let Ok(all) = body.collect().await {
                    let trailers = all.trailers().cloned();
                    log.lock().expect("the log").push(Seen { head, body: all.to_bytes(), trailers });
                }
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"ok"))))
            }
        });
        tokio::spawn(http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service));
    }
}
