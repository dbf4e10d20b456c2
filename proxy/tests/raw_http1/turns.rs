//! Who speaks when: pipelining, early answers, half-close, `Expect` (RFC 9112 §9.3, §9.6, RFC 9110 §10.1.1).

use crate::{
    common::eventually,
    ground::{ALL, grounds},
    recorder::{OK, Play},
};
use sluice_proxy::limits::Limits;
use std::time::Duration;

fn post(path: &str, headers: &str, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: web\r\n{headers}\r\n{body}")
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    for ground in grounds(ALL, Limits::default()) {
        let mut client = ground.client();
        let mut all = String::new();
        for i in 0..50 {
            all += &match i % 3 {
                0 => format!("GET /{i} HTTP/1.1\r\nhost: web\r\n\r\n"),
                1 => post(&format!("/{i}"), "content-length: 3\r\n", "abc"),
                _ => post(&format!("/{i}"), "transfer-encoding: chunked\r\n", "3\r\nabc\r\n0\r\n\r\n"),
            };
        }
        client.send(&all);
        for i in 0..50 {
            assert_eq!(client.answer(false).map(|a| a.status), Some(200), "{i}");
        }
        let order: Vec<String> =
            ground.backend.seen().iter().map(|r| r.split(' ').nth(1).unwrap_or_default().to_owned()).collect();
        assert_eq!(order, (0..50).map(|i| format!("/{i}")).collect::<Vec<_>>());
        ground.running.stop();
    }
}

#[test]
fn what_follows_a_malformed_request_is_not_served() {
    for ground in grounds(ALL, Limits::default()) {
        for bad in ["GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nhost: web\r\nx y: z\r\n\r\n"] {
            ground.backend.begin(crate::recorder::ok());
            let mut client = ground.client();
            let good = "GET /first HTTP/1.1\r\nhost: web\r\n\r\n";
            let _ = client.try_send(format!("{good}{bad}{good}").as_bytes());
            assert_eq!(client.answer(false).map(|a| a.status), Some(200));
            let refused = client.answer(false).expect("an answer");
            assert_eq!((refused.status, refused.reason()), (400, "malformed_request"));
            assert!(client.ended());
            assert_eq!(ground.backend.seen().len(), 1);
        }
        ground.running.stop();
    }
}

/// The answer comes while the client is still sending; nothing of the body's rest is taken for a request.
#[test]
fn answers_may_come_before_the_request_has_ended() {
    let early = b"HTTP/1.1 413 No\r\ncontent-length: 2\r\n\r\nno".to_vec();
    for ground in grounds(ALL, Limits::default()) {
        for play in [Play::AtHead(early.clone()), Play::LastAtHead(early.clone())] {
            ground.backend.begin(play);
            let mut client = ground.client();
            client.send(post("/first", "content-length: 3000000\r\n", ""));
            let answer = client.answer(false).expect("an answer");
            assert_eq!((answer.status, answer.body.as_str()), (413, "no"));
            let rest = "GET /smuggled HTTP/1.1\r\nhost: web\r\n\r\n".repeat(1000);
            let _ = client.try_send(rest.as_bytes());
            client.half_close();
            assert!(client.ended(), "{:?}", client.rest());
        }
        let seen = ground.backend.seen();
        assert!(seen.iter().all(|r| r.starts_with("POST /first")), "{seen:?}");
        ground.running.stop();
    }
}

#[test]
fn a_client_may_end_its_half_after_its_request() {
    for ground in grounds(ALL, Limits::default()) {
        let mut client = ground.client();
        client.send(post("/first", "content-length: 2\r\n", "hi"));
        client.half_close();
        assert_eq!(client.answer(false).map(|a| a.status), Some(200));
        assert!(client.ended());
        ground.running.stop();
    }
}

#[test]
fn a_request_cut_short_is_answered_or_closed_and_never_whole() {
    for ground in grounds(ALL, Limits::default()) {
        for (cut, status) in [
            (post("/first", "content-length: 10\r\n", "hi"), Some(400)),
            (post("/first", "transfer-encoding: chunked\r\n", "2\r\nhi\r\n"), Some(400)),
            (post("/first", "transfer-encoding: chunked\r\n", "2\r\nhi\r\n0\r\n"), Some(400)),
            (post("/first", "transfer-encoding: chunked\r\n", "a\r\nhi"), Some(400)),
            ("GET /first HTTP/1.1\r\nhost: web\r\n".into(), None),
            ("GET /first HTTP/1.1\r\nhos".into(), None),
            ("GET /fir".into(), None),
        ] {
            ground.backend.begin(crate::recorder::ok());
            let mut client = ground.client();
            client.send(&cut);
            client.half_close();
            let answer = client.answer(false);
            assert_eq!(answer.as_ref().map(|a| a.status), status, "{cut:?}: {answer:?}");
            if let Some(answer) = answer {
                assert_eq!(answer.reason(), "malformed_request");
            }
            assert!(client.ended());
            assert_eq!(ground.backend.seen(), Vec::<String>::new(), "{cut:?}");
        }
        ground.running.stop();
    }
}

#[test]
fn a_backend_that_ends_its_half_without_an_answer_is_said_so() {
    for ground in grounds(ALL, Limits::default()) {
        ground.backend.begin(Play::HalfClose);
        let mut client = ground.client();
        client.send(post("/first", "content-length: 2\r\n", "hi"));
        let answer = client.answer(false).expect("an answer");
        assert_eq!((answer.status, answer.reason()), (502, "upstream_closed"));
        eventually("it was sent", || ground.backend.seen().len() + ground.backend.cut().len() > 0);
        assert_eq!(ground.backend.seen().len() + ground.backend.cut().len(), 1, "sent once");
        ground.running.stop();
    }
}

/// The sidecar asks for the body by itself as soon as the backend has the head (RFC 9110 §10.1.1 allows it).
#[test]
fn bodies_are_asked_for() {
    let expecting = post("/first", "expect: 100-continue\r\ncontent-length: 2\r\n", "");
    for ground in grounds(ALL, Limits::default()) {
        for play in [Play::Continue, Play::Answer(OK.to_vec())] {
            ground.backend.begin(play);
            let mut client = ground.client();
            client.send(&expecting);
            assert_eq!(client.answer(true).map(|a| a.status), Some(100));
            client.send("hi");
            assert_eq!(client.answer(false).map(|a| a.status), Some(200));
            let seen = ground.backend.seen();
            assert!(seen.len() == 1 && seen[0].contains("expect: 100-continue") && seen[0].ends_with("hi"), "{seen:?}");
        }
        // A backend that refuses at once: its answer comes, and what the client sends then is no request.
        ground.backend.begin(Play::LastAtHead(b"HTTP/1.1 417 No\r\ncontent-length: 0\r\n\r\n".to_vec()));
        let mut client = ground.client();
        client.send(&expecting);
        let mut answer = client.answer(true).expect("an answer");
        if answer.status == 100 {
            answer = client.answer(false).expect("an answer");
        }
        assert_eq!(answer.status, 417);
        // Without a body there is nothing to ask for.
        ground.backend.begin(crate::recorder::ok());
        let mut client = ground.client();
        client.send("GET /first HTTP/1.1\r\nhost: web\r\nexpect: 100-continue\r\n\r\n");
        assert_eq!(client.answer(false).map(|a| a.status), Some(200));
        ground.running.stop();
    }
}

/// A client that goes while it waits takes its request with it only if nothing else is known: it has ended its half, too.
#[test]
fn a_client_that_resets_leaves_nothing_behind() {
    for ground in grounds(ALL, Limits::default()) {
        ground.backend.begin(Play::Silent);
        let client = ground.client();
        let mut sending = client;
        sending.send(post("/first", "content-length: 10\r\n", "hi"));
        eventually("the backend has the head", || !ground.backend.bytes().is_empty());
        sending.patience(Duration::from_millis(1));
        sending.reset();
        eventually("the backend's connection ends", || ground.backend.cut().len() == 1);
        ground.running.stop();
    }
}
