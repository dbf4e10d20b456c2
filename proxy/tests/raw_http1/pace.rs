//! Clients that take their time: heads and bodies that stand still end after a bounded time, idle connections do not.

use crate::{
    common::Client,
    ground::{ALL, Entry, Ground, grounds},
    recorder::ok,
};
use sluice_proxy::limits::Limits;
use std::time::{Duration, Instant};

/// Short enough to wait for, and longer than a busy machine takes for what is on time.
const HEAD: Duration = Duration::from_millis(1500);
const LIMITS: Limits = Limits { head: HEAD, body_idle: Duration::from_millis(1500), idle: Duration::from_secs(180) };

fn late(client: &mut Client, ground: &Ground, what: &str) {
    let begun = Instant::now();
    let answer = client.answer(false).unwrap_or_else(|| panic!("{:?}: {what}: no answer", ground.entry));
    assert_eq!((answer.status, answer.reason()), (408, "request_timeout"), "{:?}: {what}", ground.entry);
    assert!(client.ended(), "{what}");
    // Where HTTP is detected, the wait for the first bytes comes first.
    assert!(begun.elapsed() < HEAD + Duration::from_secs(8), "{what}: {:?}", begun.elapsed());
    assert_eq!(ground.backend.seen(), Vec::<String>::new(), "{what}");
}

#[test]
fn a_head_that_stands_still_is_refused() {
    for ground in grounds(ALL, LIMITS) {
        for part in ["GET /first", "GET /first HTTP/1.1\r\n", "GET /first HTTP/1.1\r\nhost: we"] {
            ground.backend.begin(ok());
            let mut client = ground.client();
            client.send(part);
            late(&mut client, &ground, part);
        }
        assert_eq!(ground.counted("request_timeout"), 3);
        ground.running.stop();
    }
}

/// Slowloris: each byte comes in time, the head does not.
#[test]
fn a_head_that_trickles_is_refused() {
    for ground in grounds(ALL, LIMITS) {
        ground.backend.begin(ok());
        let mut client = ground.client();
        client.send("GET /first HTTP/1.1\r\nhost: web\r\n");
        client.patience(Duration::from_millis(50));
        let begun = Instant::now();
        while !client.ready() {
            assert!(begun.elapsed() < Duration::from_secs(10), "still open");
            let _ = client.try_send(b"x: y\r\n");
        }
        client.patience(Duration::from_secs(10));
        late(&mut client, &ground, "trickle");
        ground.running.stop();
    }
}

#[test]
fn the_next_head_is_bounded_too_and_the_pause_before_it_is_not() {
    for ground in grounds(ALL, LIMITS) {
        let requests = [
            "GET /first HTTP/1.1\r\nhost: web\r\n\r\n",
            "POST /first HTTP/1.1\r\nhost: web\r\ncontent-length: 2\r\n\r\nhi",
            "POST /first HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        ];
        let mut idle: Vec<Client> = requests.iter().map(|_| ground.client()).collect();
        for (client, request) in idle.iter_mut().zip(requests) {
            client.send(request);
            assert_eq!(client.answer(false).map(|a| a.status), Some(200));
        }
        let together = requests.map(|r| format!("{r}GET /se"));
        for part in &together {
            let mut client = ground.client();
            client.send(part);
            assert_eq!(client.answer(false).map(|a| a.status), Some(200));
            ground.backend.begin(ok());
            // After a body of a given length the bytes do not tell, and it is found when the connection is looked at.
            late(&mut client, &ground, part);
        }
        // The pause was longer than a head may take: the waits above have seen to that.
        for (client, request) in idle.iter_mut().zip(requests) {
            client.send(request);
            assert_eq!(client.answer(false).map(|a| a.status), Some(200), "{:?} {request}", ground.entry);
            client.send("GET /sec");
            ground.backend.begin(ok());
            late(client, &ground, request);
        }
        ground.running.stop();
    }
}

#[test]
fn a_body_that_stands_still_is_refused() {
    for ground in grounds(ALL, LIMITS) {
        for part in [
            "content-length: 10\r\n\r\nhi",
            "transfer-encoding: chunked\r\n\r\n2\r\nhi\r\n",
            "content-length: 1\r\n\r\n",
        ] {
            ground.backend.begin(ok());
            let mut client = ground.client();
            client.send(format!("POST /first HTTP/1.1\r\nhost: web\r\n{part}"));
            late(&mut client, &ground, part);
        }
        assert_eq!(ground.counted("request_timeout"), 3);
        ground.running.stop();
    }
}

#[test]
fn an_answer_may_take_its_time() {
    for ground in grounds(&[Entry::Known, Entry::Inbound], LIMITS) {
        ground.backend.begin(crate::recorder::Play::Silent);
        let mut client = ground.client();
        client.send("POST /first HTTP/1.1\r\nhost: web\r\ncontent-length: 2\r\n\r\nhi");
        client.patience(LIMITS.head + Duration::from_secs(1));
        assert!(!client.ready(), "nothing came, and the connection stays");
        ground.running.stop();
    }
}
