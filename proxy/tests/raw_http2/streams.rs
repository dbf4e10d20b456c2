//! RFC 9113 §5: what may come on a stream, and when.

use crate::{
    frames::*,
    ground::{Ground, Want::*, case, play},
};

/// The library says PROTOCOL_ERROR for some of these.
const CLOSED: crate::ground::Want = OneOf(&[STREAM_CLOSED, PROTOCOL_ERROR]);
const PROTOCOL: crate::ground::Want = Connection(&[PROTOCOL_ERROR]);

#[test]
fn states() {
    let end = data(1, "x");
    let trailers = frame(HEADERS, WHOLE, 1, header("x", "y"));
    play(&[
        case("5.1", "idle: DATA", data(1, "x"), PROTOCOL),
        case("5.1", "idle: WINDOW_UPDATE", window(1, 1), PROTOCOL),
        case("5.1", "idle: CONTINUATION", frame(CONTINUATION, END_HEADERS, 1, []), PROTOCOL),
        case("5.1", "half-closed: WINDOW_UPDATE", [get(1), window(1, 1)].concat(), Served(1)),
        case("5.1", "half-closed: PRIORITY", [get(1), frame(PRIORITY, 0, 1, [0, 0, 0, 0, 1])].concat(), Served(1)),
        case("5.1", "half-closed: DATA", [get(1), end.clone()].concat(), CLOSED),
        case("5.1", "half-closed: HEADERS", [get(1), trailers.clone()].concat(), CLOSED),
        case("5.1", "half-closed by DATA: DATA", [post(1, &[]), end.clone(), end.clone()].concat(), CLOSED),
        case("5.1", "closed: DATA", [post(1, &[]), reset(1), end].concat(), CLOSED),
        case(
            "5.1",
            "closed: HEADERS",
            [post(1, &[]), reset(1), trailers].concat(),
            OneOf(&[STREAM_CLOSED, PROTOCOL_ERROR]),
        ),
        case("5.1", "closed: WINDOW_UPDATE", [post(1, &[]), reset(1), window(1, 1)].concat(), Ignored),
        case("5.1", "closed: RST_STREAM", [post(1, &[]), reset(1), reset(1)].concat(), Ignored),
        case("5.1.1", "an even number", get(2), PROTOCOL),
        case(
            "5.1.1",
            "a number below the last",
            [get(5), get(3)].concat(),
            Connection(&[PROTOCOL_ERROR, STREAM_CLOSED]),
        ),
        case("5.1.1", "a number left out", [get(101), get(103)].concat(), Ignored),
        case(
            "5.1.1",
            "DATA on a stream that was left out",
            [get(5), data(1, "x")].concat(),
            OneOf(&[PROTOCOL_ERROR, STREAM_CLOSED]),
        ),
    ]);
}

#[test]
fn requests_and_their_ends() {
    let trailers = |flags, block: Vec<u8>| frame(HEADERS, flags, 1, block);
    let body = frame(DATA, 0, 1, "x");
    play(&[
        case("8.1", "trailers", [post(1, &[]), body.clone(), trailers(WHOLE, header("x", "y"))].concat(), Served(1)),
        case(
            "8.1",
            "trailers without an end",
            [post(1, &[]), body.clone(), trailers(END_HEADERS, header("x", "y"))].concat(),
            Stream(&[PROTOCOL_ERROR]),
        ),
        // The library drops it instead, so it reaches nobody: see below.
        case(
            "8.1",
            "a pseudo-header in trailers",
            [post(1, &[]), body.clone(), trailers(WHOLE, header(":path", "/x"))].concat(),
            Served(1),
        ),
        case(
            "8.1",
            "trailers instead of a body",
            [post(1, &[]), trailers(WHOLE, header("x", "y"))].concat(),
            Served(1),
        ),
        case(
            "8.1.1",
            "a content-length that is right",
            [post(1, &[("content-length", "1")]), data(1, "x")].concat(),
            Served(1),
        ),
        case(
            "8.1.1",
            "above the body",
            [post(1, &[("content-length", "9")]), data(1, "x")].concat(),
            Stream(&[PROTOCOL_ERROR]),
        ),
        case(
            "8.1.1",
            "below the body",
            [post(1, &[("content-length", "1")]), data(1, "xyz")].concat(),
            Stream(&[PROTOCOL_ERROR]),
        ),
        case(
            "8.1.1",
            "below the body, in pieces",
            [post(1, &[("content-length", "1")]), body.clone(), data(1, "yz")].concat(),
            Stream(&[PROTOCOL_ERROR]),
        ),
        case(
            "8.1.1",
            "and no body",
            frame(HEADERS, WHOLE, 1, request("POST", &[("content-length", "9")])),
            Stream(&[PROTOCOL_ERROR]),
        ),
        case(
            "8.1.1",
            "above the body before trailers",
            [post(1, &[("content-length", "9")]), body.clone(), trailers(WHOLE, header("x", "y"))].concat(),
            Stream(&[PROTOCOL_ERROR]),
        ),
        case(
            "8.1.1",
            "that is no number",
            [post(1, &[("content-length", "+1")]), data(1, "x")].concat(),
            Stream(&[PROTOCOL_ERROR]),
        ),
        case(
            "8.1.1",
            "two that differ",
            [post(1, &[("content-length", "1"), ("content-length", "2")]), data(1, "x")].concat(),
            Stream(&[PROTOCOL_ERROR]),
        ),
    ]);
}

#[test]
fn trailers_and_bodies_arrive() {
    for ground in Ground::all() {
        let mut client = ground.client();
        let trailers = frame(HEADERS, WHOLE, 1, header("x-sum", "7"));
        client
            .send([post(1, &[("te", "trailers")]), frame(DATA, 0, 1, "ab"), frame(DATA, 0, 1, "c"), trailers].concat());
        assert_eq!(client.status(1), (200, "none".to_owned()));
        let seen = ground.app.take();
        assert_eq!((seen.len(), &seen[0].body[..]), (1, &b"abc"[..]));
        assert_eq!(seen[0].trailers.as_ref().expect("trailers")["x-sum"], "7");
        assert_eq!(seen[0].head.headers["te"], "trailers");
        let block = [header(":path", "/other"), header("x-sum", "8")].concat();
        client.send([post(3, &[]), frame(HEADERS, WHOLE, 3, block)].concat());
        assert_eq!(client.status(3).0, 200);
        let seen = ground.app.take();
        assert_eq!((seen[0].head.uri.path(), seen[0].trailers.as_ref().map_or(0, |t| t.len())), ("/first", 1));
        ground.stop();
    }
}

/// §5.1.2: what is above the limit that was announced is refused unprocessed, and the rest goes on.
#[test]
fn streams_above_the_limit_are_refused() {
    for ground in Ground::all() {
        let mut client = ground.connect();
        client.send([PREFACE, &frame(SETTINGS, 0, 0, setting(1, 0))].concat());
        let settings = client.next().expect("settings").payload;
        let limit = settings.chunks(6).find(|s| s[..2] == [0, 3]).expect("MAX_CONCURRENT_STREAMS");
        let limit = u32::from_be_bytes(limit[2..].try_into().expect("four bytes"));
        assert!((100..=1024).contains(&limit), "{limit}");
        client.send(frame(SETTINGS, ACK, 0, []));
        assert!(client.alive());
        // Each waits for its body.
        (0..limit).for_each(|i| client.send(post(2 * i + 1, &[])));
        let above = 2 * limit + 1;
        client.send(post(above, &[]));
        let refused = client.until("a refusal", |f| f.kind == RST_STREAM);
        assert_eq!((refused.stream, refused.code()), (above, REFUSED_STREAM));
        client.send(data(1, "x"));
        assert_eq!(client.status(1), (200, "none".to_owned()));
        client.send(get(above + 2));
        assert_eq!(client.status(above + 2), (200, "none".to_owned()));
        drop(client);
        ground.stop();
    }
}
