//! Requests and answers of every shape reach the other side as they were.

use crate::{common::*, pair::*};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use sluice_proxy::run::Running;
use std::{
    io::{Read, Write},
    sync::{Arc, Barrier, mpsc},
    time::Duration,
};

#[test]
fn heads_arrive_as_they_were() {
    let app = start("v1");
    let mesh = Mesh::start(app.address);
    let mut client = mesh.connect();
    let headers =
        "x-kept: 1\r\nte: trailers\r\ncookie: a=1; b=2\r\nconnection: x-gone\r\nx-gone: 1\r\nkeep-alive: 5\r\n";
    let head = client.ask("GET", "/head", headers).body.to_ascii_lowercase();
    assert!(head.starts_with("get /head http/1.1\r\n"), "{head}");
    for there in ["host: web", "x-kept: 1", "te: trailers", "cookie: a=1; b=2"] {
        assert_eq!(head.matches(&format!("\r\n{there}\r\n")).count(), 1, "{there} in {head}");
    }
    for gone in ["x-gone", "keep-alive", "sluice-version", "connection"] {
        assert!(!head.contains(gone), "{gone} in {head}");
    }
    let absolute = client.ask("GET", "http://other.example/head", "").body;
    assert!(absolute.contains("host: other.example\r\n"), "{absolute}");
    // Longer than HTTP/2 takes by default.
    let long = format!("x-long: {}\r\n", "x".repeat(60_000));
    assert!(client.ask("GET", "/head", &long).body.contains(&long));
    assert_eq!(mesh.client.connected(), 1);
    mesh.stop();
}

#[test]
fn what_the_app_says_about_its_version_is_not_believed() {
    let app = start("v1");
    let mesh = Mesh::start(app.address);
    for forged in ["2", "1.0", "1.1"] {
        let head = mesh.connect().ask("GET", "/head", &format!("sluice-version: {forged}\r\n")).body;
        assert!(head.starts_with("GET /head HTTP/1.1\r\n") && !head.contains("sluice-version"), "{head}");
    }
    mesh.stop();
    // An app that only speaks HTTP/2 would not understand what the header asks for.
    let mesh = Mesh::start(http2_app(1));
    block_on(async {
        let request = Request::get("http://web.shop/").header("sluice-version", "1.1");
        let request = request.body(Full::default()).expect("a request");
        let answer = http2(mesh.at()).await.send_request(request).await.expect("an answer");
        assert_eq!((answer.status().as_u16(), &answer.headers()["x-names"]), (200, &"".parse().expect("a value")));
    });
    // Nor is a client without a sidecar.
    block_on(async {
        let request = Request::get("http://web.shop/").header("sluice-version", "1.1");
        let request = request.body(Full::default()).expect("a request");
        let answer = http2(mesh.server().running.inbound[0]).await.send_request(request).await.expect("an answer");
        assert_eq!((answer.status().as_u16(), &answer.headers()["x-names"]), (200, &"".parse().expect("a value")));
    });
    mesh.stop();
}

#[test]
fn answers_without_body_have_none() {
    let app = app(|mut stream, head| {
        let answer = match head.split(' ').nth(1) {
            Some("/204") => "HTTP/1.1 204 No Content\r\netag: x\r\n\r\n",
            Some("/304") => "HTTP/1.1 304 Not Modified\r\netag: x\r\ncontent-length: 5\r\n\r\n",
            _ => "HTTP/1.1 200 OK\r\netag: x\r\ncontent-length: 5\r\n\r\n",
        };
        stream.write_all(answer.as_bytes()).expect("write");
    });
    let mesh = Mesh::start(app);
    let mut client = mesh.connect();
    for (method, path, status) in
        [("GET", "/204", 204), ("GET", "/304", 304), ("HEAD", "/", 200), ("HEAD", "/304", 304)]
    {
        client.send(format!("{method} {path} HTTP/1.1\r\nhost: web\r\n\r\n"));
        let answer = client.answer(true).expect("an answer");
        assert_eq!((answer.status, answer.header("etag")), (status, Some("x")), "{method} {path}");
        if status == 200 {
            assert_eq!(answer.header("content-length"), Some("5"), "{method} {path}");
        }
        assert_eq!(answer.header("transfer-encoding"), None, "{method} {path}");
    }
    assert_eq!(mesh.client.connected(), 1);
    mesh.stop();
}

#[test]
fn bodies_stream_both_ways() {
    let app = start("v1");
    let mesh = Mesh::start(app.address);
    let mut client = mesh.connect();
    assert_eq!(client.get("/chunked").body, "abcdefg");
    client.send("POST /head HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n");
    client.send("0\r\n\r\n");
    let head = client.answer(false).expect("an answer").body;
    assert!(head.contains("transfer-encoding: chunked") && !head.contains("content-length"), "{head}");
    let large = "x".repeat(3_000_000);
    client.send(format!("POST /head HTTP/1.1\r\nhost: web\r\ncontent-length: {}\r\n\r\n{large}", large.len()));
    let head = client.answer(false).expect("an answer").body;
    assert!(head.contains("content-length: 3000000\r\n") && !head.contains("chunked"), "{head}");
    client.send("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n");
    assert_eq!(client.answer(true).expect("an answer").status, 100);
    client.send("hi");
    assert_eq!(client.answer(false).expect("an answer").status, 200);
    assert_eq!(mesh.client.connected(), 1);
    mesh.stop();
}

#[test]
fn a_body_is_seen_before_it_is_complete() {
    let (to_app, said) = mpsc::channel();
    let app = app(move |mut stream, _| {
        let mut part = [0; 64];
        let n = stream.read(&mut part).expect("read");
        to_app.send(String::from_utf8_lossy(&part[..n]).into_owned()).expect("the test waits");
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n";
        stream.write_all(head.as_bytes()).expect("write");
        // The rest only after the client has the first part.
        while !part.windows(5).any(|w| w == b"0\r\n\r\n") {
            part = [0; 64];
            assert!(stream.read(&mut part).expect("read") > 0);
        }
        stream.write_all(b"4\r\nlast\r\n0\r\n\r\n").expect("write");
    });
    let mesh = Mesh::start(app);
    let mut client = mesh.connect();
    client.send("POST / HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n4\r\nsaid\r\n");
    assert!(said.recv().expect("the app has it").contains("said"));
    assert!(client.take_until("first\r\n").is_some());
    client.send("0\r\n\r\n");
    assert!(client.take_until("last\r\n0\r\n\r\n").is_some());
    mesh.stop();
}

#[test]
fn trailers_pass_both_ways() {
    let (to_test, seen) = mpsc::channel();
    let app = app(move |mut stream, _| {
        let (mut body, mut part) = (String::new(), [0; 256]);
        while !body.ends_with("\r\n\r\n") {
            let n = stream.read(&mut part).expect("read");
            assert!(n > 0, "{body}");
            body += &String::from_utf8_lossy(&part[..n]);
        }
        to_test.send(body).expect("the test waits");
        let head = "HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(format!("{head}2\r\nok\r\n0\r\nx-sum: 7\r\n\r\n").as_bytes()).expect("write");
    });
    let mesh = Mesh::start(app);
    let mut client = mesh.connect();
    let head = "POST / HTTP/1.1\r\nhost: web\r\nte: trailers\r\ntrailer: x-mine\r\ntransfer-encoding: chunked\r\n\r\n";
    client.send(format!("{head}2\r\nhi\r\n0\r\nx-mine: 3\r\n\r\n"));
    let body = seen.recv().expect("the app has it");
    assert!(body.contains("hi\r\n0\r\n") && body.contains("x-mine: 3\r\n"), "{body:?}");
    let answer = client.take_until("x-sum: 7\r\n\r\n");
    assert!(answer.is_some_and(|a| a.contains("2\r\nok\r\n0\r\n")));
    mesh.stop();
}

#[test]
fn an_answer_may_come_before_the_request_is_complete() {
    let app = app(|mut stream, _| {
        let answer = "HTTP/1.1 413 Content Too Large\r\ncontent-length: 3\r\n\r\nbig";
        stream.write_all(answer.as_bytes()).expect("write");
        // Reads on, as servers do that want the client to see their answer.
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let mesh = Mesh::start(app);
    let mut client = mesh.connect();
    client.send("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 1000000\r\n\r\nsome");
    let answer = client.answer(false).expect("an answer");
    assert_eq!((answer.status, answer.body.as_str()), (413, "big"));
    // The connection between the sidecars is not harmed by what was not sent.
    let answer = mesh.connect().get("/");
    assert_eq!((answer.status, mesh.client.connected()), (413, 1));
    mesh.stop();
}

#[test]
fn an_answer_that_breaks_off_never_looks_complete() {
    let received = Arc::new(Barrier::new(2));
    let begun = received.clone();
    let app = app(move |mut stream, head| {
        let framing = match head.contains(" /length ") {
            true => "content-length: 9\r\n\r\n",
            false => "transfer-encoding: chunked\r\n\r\n5\r\n",
        };
        stream.write_all(format!("HTTP/1.1 200 OK\r\n{framing}hello").as_bytes()).expect("write");
        begun.wait();
    });
    let mesh = Mesh::start(app);
    for path in ["/length", "/chunked"] {
        let mut client = mesh.connect();
        client.send(format!("GET {path} HTTP/1.1\r\nhost: web\r\n\r\n"));
        assert!(client.take_until("hello").is_some(), "{path}");
        received.wait();
        let rest = client.rest();
        assert!(!rest.contains('0'), "{path}: {rest:?}");
    }
    assert_eq!(mesh.client.connected(), 1, "the others on the connection go on");
    mesh.stop();
}

#[test]
fn a_request_that_breaks_off_never_looks_complete() {
    let (to_test, seen) = mpsc::channel();
    let app = app(move |mut stream, _| {
        let mut all = Vec::new();
        let ended = stream.read_to_end(&mut all);
        to_test.send((ended.is_ok(), String::from_utf8_lossy(&all).into_owned())).expect("the test waits");
    });
    let mesh = Mesh::start(app);
    for framing in ["content-length: 9", "transfer-encoding: chunked"] {
        let mut client = mesh.connect();
        client.send(format!("POST / HTTP/1.1\r\nhost: web\r\n{framing}\r\n\r\n5\r\nhe"));
        eventually("the request is under way", || mesh.server().scrape().series.values().any(|t| t.in_flight > 0));
        drop(client);
        let (_, body) = seen.recv().expect("the app sees an end");
        assert!(!body.contains('0'), "{framing}: {body:?}");
    }
    assert_eq!(mesh.client.connected(), 1, "the others on the connection go on");
    mesh.stop();
}

#[test]
fn a_request_that_is_given_up_ends_at_the_app() {
    // Never answers: it waits for a second request.
    let mesh = Mesh::start(http2_app(2));
    block_on(async {
        let mut sender = http2(mesh.at()).await;
        let request = Request::get("http://web.shop/together").body(Full::default()).expect("a request");
        let asked = tokio::spawn(sender.send_request(request));
        let (client, server) = (&mesh.client.running, &mesh.server().running);
        until_in_flight(&[client, server], 1).await;
        asked.abort();
        until_in_flight(&[client, server], 0).await;
    });
    assert_eq!(mesh.client.connected(), 1, "the others on the connection go on");
    mesh.stop();
}

/// Waits until each of these sidecars has `n` requests in flight.
async fn until_in_flight(sidecars: &[&Running], n: u64) {
    let wait = async {
        for sidecar in sidecars {
            while sidecar.scrape().await.series.values().map(|t| t.in_flight).sum::<u64>() != n {
                tokio::task::yield_now().await;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), wait).await.expect("within ten seconds");
}

#[test]
fn grpc_passes_with_its_trailers() {
    let mesh = Mesh::start(http2_app(1));
    block_on(async {
        let sender = http2(mesh.at()).await;
        let ask = |mut sender: hyper::client::conn::http2::SendRequest<Full<Bytes>>| async move {
            let request = Request::post("http://web.shop/pkg.Service/Method").header("te", "trailers");
            let request = request.body(Full::new(Bytes::from_static(b"hello"))).expect("a request");
            let answer = sender.send_request(request).await.expect("an answer");
            assert_eq!(answer.headers()["x-url"], "http://web.shop/pkg.Service/Method");
            let all = answer.into_body().collect().await.expect("a body");
            assert_eq!(all.trailers().expect("trailers")["grpc-status"], "0");
            assert_eq!(all.to_bytes(), "hello");
        };
        futures::future::join_all((0..300).map(|_| ask(sender.clone()))).await;
    });
    assert_eq!((mesh.client.connected(), mesh.server().accepted()), (1, 1));
    mesh.stop();
}

#[test]
fn large_bodies_pass_beside_one_that_nobody_reads() {
    let size = 4_000_000;
    let app = app(move |mut stream, _| {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n");
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&vec![b'x'; size]));
    });
    let mesh = Mesh::start(app);
    let mut slow: Vec<Client> = (0..8).map(|_| mesh.connect()).collect();
    slow.iter_mut().for_each(|c| c.send("GET / HTTP/1.1\r\nhost: web\r\n\r\n"));
    eventually("all are under way", || mesh.server().scrape().series.values().any(|t| t.requests >= 8));
    // The others are not held up, and what was left lying is whole.
    assert_eq!(mesh.connect().get("/").body.len(), size);
    for client in &mut slow {
        assert_eq!(client.answer(false).expect("an answer").body.len(), size);
    }
    assert_eq!(mesh.client.connected(), 1);
    mesh.stop();
}
