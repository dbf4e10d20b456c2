//! Connections from outside the pod to the app: mTLS of a peer's sidecar is terminated here, requests and connections
//! are counted and handed to the app at the address that was dialled. Dialling one's own address leaves from the same
//! address, which is how capture knows to let it pass.

use crate::{
    admission::{self, Entry},
    http::{self, Protocol, Side},
    io::{Prefixed, first_bytes},
    metrics::add,
    outbound::reset,
    reason::Reason,
    tcp,
    tls::{self, Offer},
    upstream::connect_tcp,
    worker::Worker,
};
use bytes::Bytes;
use sluice_model::Identity;
use sluice_traffic::{
    access::Call,
    detect::{ClientHello, Detected},
};
use sluice_wire::{ALPN_H2, ALPN_TCP};
use std::{net::SocketAddr, rc::Rc, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

/// How long a client may keep silent before the connection counts as one where the server speaks first.
const DETECT_PATIENCE: Duration = Duration::from_millis(200);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves one connection to the app's `address` until it ends.
pub async fn serve(worker: &Rc<Worker>, mut stream: TcpStream, address: SocketAddr) {
    let Ok((bytes, found)) = first_bytes(&mut stream, DETECT_PATIENCE).await else { return };
    let live = worker.live();
    let (strict, opaque) = (live.config.inbound.strict, live.config.inbound.opaque_ports.contains(&address.port()));
    drop(live);
    match found {
        Detected::Tls(hello) if meshed(&hello) => {
            // Apart, since TLS makes it large, and plain connections need not pay for that.
            Box::pin(mesh(worker, stream, bytes, address, opaque)).await;
        }
        Detected::Http1 if strict => {
            let refuse = Side::Refuse(Reason::PlainRefused);
            http::serve(worker, Prefixed::new(bytes, stream), refuse, Protocol::Http1).await;
        }
        _ if strict => {
            worker.counters.refuse(Reason::PlainRefused);
            reset(&stream);
        }
        Detected::Http1 if !opaque => {
            let side = Side::Inbound(Entry::new(worker, address, None));
            http::serve(worker, Prefixed::new(bytes, stream), side, Protocol::Http1).await;
        }
        Detected::Http2 if !opaque => {
            let side = Side::Inbound(Entry::new(worker, address, None));
            http::serve(worker, Prefixed::new(bytes, stream), side, Protocol::Http2).await;
        }
        _ => {
            let mut stream = Prefixed::new(bytes, stream);
            if !join(worker, &mut stream, address, None).await {
                reset(stream.get_ref());
            }
        }
    }
}

/// The peer is a sidecar; any other TLS is the app's own.
fn meshed(hello: &ClientHello) -> bool {
    hello.offers(ALPN_TCP) || hello.offers(ALPN_H2)
}

async fn mesh(worker: &Rc<Worker>, stream: TcpStream, bytes: Bytes, address: SocketAddr, opaque: bool) {
    let Some(tls) = worker.tls() else {
        worker.counters.refuse(Reason::NoCertificate);
        return reset(&stream);
    };
    // What is opaque must arrive as it was sent.
    let offer = if opaque { Offer::Tcp } else { Offer::H2OrTcp };
    let accepting = tls.acceptor(offer).accept(Prefixed::new(bytes, stream));
    let mut stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, accepting).await {
        Ok(Ok(stream)) => stream,
        failed => {
            tracing::debug!(error = ?failed.map(|r| r.err()), %address, "peer did not prove who it is");
            return worker.counters.refuse(Reason::IdentityNotProven);
        }
    };
    if tls.is_outlived_by(stream.get_ref().1, tls::now_s()) {
        tracing::debug!(%address, "the certificate of the session that goes on has ended");
        return worker.counters.refuse(Reason::IdentityNotProven);
    }
    let caller = stream.get_ref().1.peer_certificates().and_then(|chain| tls::peer_identity(chain)).map(Arc::new);
    if opaque {
        join(worker, &mut stream, address, caller.as_deref()).await;
        return;
    }
    let entry = Entry::new(worker, address, caller);
    if stream.get_ref().1.alpn_protocol() == Some(ALPN_H2) {
        return http::serve(worker, stream, Side::Mesh(entry, tls), Protocol::Http2).await;
    }
    let Ok((bytes, found)) = first_bytes(&mut stream, DETECT_PATIENCE).await else { return };
    let mut stream = Prefixed::new(bytes, stream);
    match found {
        Detected::Http1 => http::serve(worker, stream, Side::Inbound(entry), Protocol::Http1).await,
        Detected::Http2 => http::serve(worker, stream, Side::Inbound(entry), Protocol::Http2).await,
        _ => {
            join(worker, &mut stream, address, entry.caller.as_deref()).await;
        }
    }
}

/// Opaque bytes to the app. False when they could not be passed on whole.
async fn join<S: AsyncRead + AsyncWrite + Unpin>(
    worker: &Worker,
    stream: &mut S,
    address: SocketAddr,
    caller: Option<&Identity>,
) -> bool {
    if let Err(reason) = admission::admit(worker, &Call { caller, port: address.port(), request: None }, None) {
        worker.counters.refuse(reason);
        return false;
    }
    let series = worker.inbound_series(address.port());
    add(&series.connections, 1);
    match connect_tcp(address).await {
        Ok(mut app) => {
            add(&series.open_connections, 1);
            let whole = tcp::pump(stream, &mut app).await.is_ok();
            series.open_connections.set(series.open_connections.get() - 1);
            whole
        }
        Err(error) => {
            tracing::debug!(%error, %address, "app takes no connection");
            worker.counters.refuse(Reason::AppUnreachable);
            false
        }
    }
}
