//! The API's listeners: TLS, the caller's certificate, HTTP/1.1 and HTTP/2, and an orderly end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use super::auth;
use super::http::{Api, serve};
use crate::ca::{Authority, CaError, Pair};

/// Connections at a time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 20_000;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for requests in flight when the service stops.
pub const DRAIN: Duration = Duration::from_secs(5);

/// Server side of TLS: our certificate; clients may show one of the same authority.
pub fn server_tls(authority: &Authority, serving: &Pair) -> Result<Arc<rustls::ServerConfig>, CaError> {
    let malformed = |cause: String| CaError::Malformed { what: "serving certificate", cause };
    let (chain, key) = serving.to_rustls()?;
    let roots = Arc::new(authority.roots()?);
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots, provider())
        .allow_unauthenticated()
        .build()
        .map_err(|e| malformed(e.to_string()))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| malformed(e.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|e| malformed(e.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Client side of TLS towards nodes, with our own certificate.
pub fn client_tls(authority: &Authority, client: &Pair) -> Result<Arc<rustls::ClientConfig>, CaError> {
    let malformed = |cause: String| CaError::Malformed { what: "client certificate", cause };
    let (chain, key) = client.to_rustls()?;
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| malformed(e.to_string()))?
        .with_root_certificates(authority.roots()?)
        .with_client_auth_cert(chain, key)
        .map_err(|e| malformed(e.to_string()))?;
    Ok(Arc::new(config))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Serves a listener until the service stops, then lets requests in flight end.
pub async fn run(api: Arc<Api>, tls: Arc<rustls::ServerConfig>, listener: TcpListener) {
    let acceptor = TlsAcceptor::from(tls);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { break };
        let accepted = tokio::select! {
            () = api.stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (api, acceptor) = (api.clone(), acceptor.clone());
                tokio::spawn(async move {
                    if let Err(error) = connection(api, acceptor, stream).await {
                        tracing::debug!(%peer, %error, "connection ended");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                // Out of descriptors, usually: waiting lets some go.
                tracing::warn!(%error, "accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    // All slots are free when all connections have ended. What is not done by then is cut; clients repeat it elsewhere.
    let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
    let _ = tokio::time::timeout(DRAIN, slots.acquire_many(all)).await;
}

async fn connection(
    api: Arc<Api>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    stream.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await??;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let user = certificate.and_then(|certificate| auth::from_certificate(certificate));
    let stop = api.stop.clone();
    let service = service_fn(move |request| {
        let (api, user) = (api.clone(), user.clone());
        async move { Ok::<_, std::convert::Infallible>(serve(api, user, request).await) }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http2().max_concurrent_streams(1_000);
    let mut connection = std::pin::pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

/// Listening sockets passed by a supervisor (`LISTEN_FDS`, `LISTEN_PID`), as systemd does: descriptors 3 and up.
pub fn inherited() -> std::io::Result<Vec<std::net::TcpListener>> {
    let mut passed = listenfd::ListenFd::from_env();
    (0..passed.len()).filter_map(|index| passed.take_tcp_listener(index).transpose()).collect()
}

/// Binds an address.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}
