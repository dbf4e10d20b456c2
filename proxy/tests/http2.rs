//! HTTP/2 with prior knowledge through the sidecar: requests of one connection are divided, trailers pass (gRPC).

mod common;

use bytes::Bytes;
use common::*;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client::conn::http2 as client, server::conn::http2 as server, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use sluice_model::*;
use std::{collections::BTreeMap, convert::Infallible, net::SocketAddr, time::Duration};
use tokio::net::{TcpListener, TcpStream};

/// A server whose answers carry its name, the request's body and a trailer.
async fn serve(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind(LOCAL).await.expect("bind");
    let address = listener.local_addr().expect("an address");
    serve_on(listener, name);
    address
}

fn serve_on(listener: TcpListener, name: &'static str) {
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.expect("accept");
            let service = service_fn(move |request: Request<Incoming>| async move {
                let host = request.uri().authority().map(|a| a.to_string()).unwrap_or_default();
                let body = request.into_body().collect().await.expect("a body").to_bytes();
                let trailers =
                    HeaderMap::from_iter([("grpc-status".parse().expect("a name"), "0".parse().expect("a value"))]);
                let body = Full::new(body).with_trailers(std::future::ready(Some(Ok::<_, Infallible>(trailers))));
                let answer = Response::builder().header("x-version", name).header("x-host", host).body(body);
                Ok::<_, Infallible>(answer.expect("an answer"))
            });
            tokio::spawn(server::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service));
        }
    });
}

async fn connect(to: SocketAddr) -> client::SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(to).await.expect("connect");
    let handshake = client::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (sender, connection) = handshake.expect("a handshake");
    tokio::spawn(connection);
    sender
}

fn request(body: &'static str) -> Request<Full<Bytes>> {
    let request = Request::post("http://web.shop/pkg.Service/Method").header("te", "trailers");
    request.body(Full::new(Bytes::from_static(body.as_bytes()))).expect("a request")
}

#[tokio::test]
async fn requests_of_one_connection_are_divided_and_trailers_pass() {
    for app_protocol in [AppProtocol::Detect, AppProtocol::Http, AppProtocol::Http2] {
        let web = service("web", "10.96.0.1", app_protocol, &[serve("v1").await]);
        let v2 = service("v2", "10.96.0.2", app_protocol, &[serve("v2").await]);
        let running = sidecar([web, v2, vec![split(&[("web", 3), ("v2", 1)])]].concat());
        let sender = connect(running.outbound[0]).await;
        let ask = |mut sender: client::SendRequest<Full<Bytes>>| async move {
            let answer = sender.send_request(request("hello")).await.expect("an answer");
            let version = answer.headers()["x-version"].to_str().expect("text").to_owned();
            assert_eq!(answer.headers()["x-host"], "web.shop");
            let all = answer.into_body().collect().await.expect("a body");
            assert_eq!(all.trailers().expect("trailers")["grpc-status"], "0");
            assert_eq!(all.to_bytes(), "hello");
            version
        };
        // All at once over one connection.
        let versions = futures::future::join_all((0..400).map(|_| ask(sender.clone()))).await;
        let mut counts = BTreeMap::new();
        versions.into_iter().for_each(|v| *counts.entry(v).or_insert(0) += 1);
        assert_eq!(counts, BTreeMap::from([("v1".to_owned(), 300), ("v2".to_owned(), 100)]));
        let scrape = running.scrape().await;
        assert!(scrape.series.values().all(|t| t.in_flight == 0));
        tokio::task::spawn_blocking(|| running.stop()).await.expect("stopped");
    }
}

#[tokio::test]
async fn answers_of_our_own_are_http2_as_well() {
    let running = sidecar(service("web", "10.96.0.1", AppProtocol::Detect, &[nowhere()]));
    let mut sender = connect(running.outbound[0]).await;
    let answer = sender.send_request(request("")).await.expect("an answer");
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["x-sluice-reason"]),
        (503, &"connect_failed".parse().expect("a value"))
    );
    tokio::task::spawn_blocking(|| running.stop()).await.expect("stopped");
}

/// Who dials an endpoint that is silent, and gives up, leaves nothing to those who come when it speaks again.
#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_nobody_waits_for_is_forgotten() {
    let (silent, _filling) = silent();
    let address = silent.local_addr().expect("an address");
    let running = sidecar(service("web", "10.96.0.1", AppProtocol::Http2, &[address]));
    let mut sender = connect(running.outbound[0]).await;
    let unanswered = tokio::time::timeout(Duration::from_millis(200), sender.send_request(request("first"))).await;
    assert!(unanswered.is_err(), "nobody answers: {unanswered:?}");
    let connections =
        |n: u32| Client::connect(running.admin).get("/pools").body.contains(&format!("\"connections\":{n}"));
    assert!(connections(1), "it is being dialled");
    eventually("the attempt is over", || connections(0));
    silent.set_nonblocking(true).expect("non-blocking");
    serve_on(TcpListener::from_std(silent).expect("a listener"), "v1");
    let answer = sender.send_request(request("second")).await.expect("an answer");
    assert_eq!(answer.status(), 200);
    tokio::task::spawn_blocking(|| running.stop()).await.expect("stopped");
}
