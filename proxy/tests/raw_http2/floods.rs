//! Peers that make work: each is cut off, or costs no more than it is allowed. RFC 9113 §10.5 and the known attacks.

use crate::{
    frames::*,
    ground::{Conn, Ground},
};
use std::net::TcpStream;

/// Sends `piece` over and over, up to `times`; the code with which the peer ended that, if it did.
fn flood(client: &mut Conn<TcpStream>, times: usize, mut piece: impl FnMut(usize) -> Vec<u8>) -> Option<u32> {
    for i in 0..times {
        if client.try_send(piece(i)).is_err() {
            break;
        }
    }
    let _ = client.try_send(frame(PING, 0, 0, b"the last"));
    loop {
        match client.next() {
            Some(f) if f.kind == GOAWAY => return Some(f.code()),
            Some(f) if f.kind == PING && f.payload == b"the last" => return None,
            Some(_) => {}
            // A reset can overtake the GOAWAY.
            None => return Some(ENHANCE_YOUR_CALM),
        }
    }
}

/// Others are served beside it and after it.
fn serves(ground: &Ground) {
    let mut client = ground.client();
    client.send(get(1));
    assert_eq!(client.status(1), (200, "none".to_owned()), "{:?}", ground.entry);
}

/// CVE-2024-27316 and its kin: a header block that does not end.
#[test]
fn continuations_without_end() {
    for ground in Ground::all() {
        let mut client = ground.client();
        client.send(frame(HEADERS, END_STREAM, 1, request("GET", &[])));
        let ended = flood(&mut client, 10_000, |_| frame(CONTINUATION, 0, 1, header("x", [b'y'; 1000])));
        assert!(ended.is_some(), "10 MB of headers");
        let mut client = ground.client();
        client.send(frame(HEADERS, END_STREAM, 1, request("GET", &[])));
        let ended = flood(&mut client, 200_000, |_| frame(CONTINUATION, 0, 1, []));
        assert!(ended.is_some(), "empty ones");
        serves(&ground);
        assert_eq!(ground.app.take().len(), 1);
        ground.stop();
    }
}

/// CVE-2023-44487: streams that are reset as soon as they are open.
#[test]
fn rapid_resets() {
    for ground in Ground::all() {
        let mut client = ground.client();
        let ended = flood(&mut client, 50_000, |i| {
            let stream = 2 * i as u32 + 1;
            [get(stream), reset(stream)].concat()
        });
        assert_eq!(ended, Some(ENHANCE_YOUR_CALM));
        serves(&ground);
        let seen = ground.app.take().len();
        assert!(seen < 10_000, "{seen} requests reached the app");
        ground.stop();
    }
}

/// CVE-2025-8671 ("MadeYouReset"): the same with resets that the server is made to send.
#[test]
fn resets_that_the_peer_provokes() {
    for ground in Ground::all() {
        let mut client = ground.client();
        let ended = flood(&mut client, 50_000, |i| {
            let stream = 2 * i as u32 + 1;
            [get(stream), window(stream, 0)].concat()
        });
        assert!(ended.is_some());
        serves(&ground);
        ground.stop();
    }
}

/// Frames that carry nothing: cut off, or answered without anything piling up.
#[test]
fn frames_that_carry_nothing() {
    for ground in Ground::all() {
        let mut client = ground.client();
        client.send(post(1, &[]));
        let ended = flood(&mut client, 200_000, |_| frame(DATA, 0, 1, []));
        assert_eq!(ended, Some(ENHANCE_YOUR_CALM), "empty DATA");
        let mut client = ground.client();
        flood(&mut client, 20_000, |_| frame(PRIORITY, 0, 1, [0, 0, 0, 0, 1]));
        serves(&ground);
        ground.stop();
    }
}

/// CVE-2019-9512, -9515: questions whose answers are not read. The sidecar stops reading before it holds much.
#[test]
fn questions_whose_answers_nobody_reads() {
    for ground in Ground::all() {
        for question in [frame(PING, 0, 0, [7; 8]), frame(SETTINGS, 0, 0, setting(1, 0))] {
            let mut client = ground.client();
            let many = question.repeat(1000);
            // 170 MB of answers; a write that takes no more is the bound that is looked for.
            let taken = (0..10_000).take_while(|_| client.try_send(&many).is_ok()).count();
            assert!(taken < 10_000, "took all {taken} thousand");
            serves(&ground);
        }
        ground.stop();
    }
}

/// §10.5.1: a list above what was announced is answered, and the connection goes on. The library makes that answer,
/// which therefore has no reason.
#[test]
fn header_lists_are_bounded() {
    for ground in Ground::all() {
        let mut client = ground.client();
        let large = [request("GET", &[]), header("x", vec![b'y'; 70_000])].concat();
        let mut pieces = large.chunks(16_000);
        client.send(frame(HEADERS, END_STREAM, 1, pieces.next().expect("a piece")));
        let last = pieces.len() - 1;
        for (i, piece) in pieces.enumerate() {
            client.send(frame(CONTINUATION, if i == last { END_HEADERS } else { 0 }, 1, piece));
        }
        assert_eq!(client.status(1).0, 431);
        client.send(get(3));
        assert_eq!(client.status(3), (200, "none".to_owned()));
        assert_eq!(ground.app.take().len(), 1);
        ground.stop();
    }
}

/// A body sent without regard for the windows: whether it is read in time or refused, others are served. Which of the two
/// depends on how fast the app reads, so the error itself is not looked for here.
#[test]
fn a_body_without_regard_for_windows_holds_up_nobody() {
    for ground in Ground::all() {
        let mut client = ground.client();
        client.send(post(1, &[]));
        let all: Vec<u8> = frame(DATA, 0, 1, [0; 16_384]).repeat(4096);
        let _ = client.try_send(&all);
        serves(&ground);
        ground.stop();
    }
}
