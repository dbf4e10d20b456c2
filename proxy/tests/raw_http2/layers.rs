//! RFC 9113 §3 (how it starts), §4 (frames) and §6 (each kind of frame).

use crate::{
    frames::*,
    ground::{Entry, Ground, Want::*, case, play},
};

const PROTOCOL: crate::ground::Want = Connection(&[PROTOCOL_ERROR]);
/// The library says PROTOCOL_ERROR for some of these; either ends the connection.
const SIZE: crate::ground::Want = Connection(&[FRAME_SIZE_ERROR, PROTOCOL_ERROR]);

#[test]
fn it_starts_with_the_preface_and_settings() {
    for ground in Ground::all() {
        let mut client = ground.connect();
        client.send([PREFACE, &frame(PING, 0, 0, [0; 8])].concat());
        // §3.4: the first frame must be SETTINGS. The library does not insist, which harms nobody.
        client.until("an answer", |f| f.kind == PING && f.flags == ACK);
        let mut client = ground.connect();
        client.send([PREFACE, &frame(SETTINGS, 0, 0, [])].concat());
        client.until("settings", |f| f.kind == SETTINGS && f.flags == 0);
        client.until("the acknowledgement", |f| f.kind == SETTINGS && f.flags == ACK);
        if ground.entry == Entry::Known {
            let mut client = ground.connect();
            let _ = client.try_send(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n");
            assert!(client.ended());
        }
        ground.stop();
    }
}

#[test]
fn frames() {
    let big = |kind, flags, stream| frame(kind, flags, stream, vec![0; 16_385]);
    let reserved = frame(HEADERS, WHOLE, 1 | 1 << 31, request("GET", &[]));
    let begun = frame(HEADERS, END_STREAM, 1, request("GET", &[]));
    play(&[
        case("4.1", "an unknown kind is ignored", frame(0xbe, 0xff, 0, [1; 8]), Ignored),
        case("4.1", "an unknown kind on a stream is ignored", [frame(0xbe, 0, 1, [1; 8]), get(1)].concat(), Served(1)),
        case("4.1", "unknown flags are ignored", frame(PING, 0x16, 0, [1; 8]), Ignored),
        case("4.1", "the reserved bit is ignored", reserved, Served(1)),
        case("4.2", "a DATA of the largest size", [post(1, &[]), data(1, vec![0; 16_384])].concat(), Served(1)),
        case("4.2", "a DATA above it", [post(1, &[]), big(DATA, 0, 1)].concat(), SIZE),
        case("4.2", "a HEADERS above it", big(HEADERS, WHOLE, 1), SIZE),
        case("4.2", "an unknown kind above it", big(0xbe, 0, 0), SIZE),
        case(
            "4.3",
            "another frame within a header block",
            [begun.clone(), frame(PRIORITY, 0, 1, [0, 0, 0, 0, 1])].concat(),
            PROTOCOL,
        ),
        case("4.3", "another stream within a header block", [begun.clone(), get(3)].concat(), PROTOCOL),
        case("5.5", "an unknown kind within a header block", [begun, frame(0xbe, 0, 1, [])].concat(), PROTOCOL),
    ]);
}

#[test]
fn data_headers_and_continuations() {
    let whole = request("GET", &[]);
    let (first, second) = whole.split_at(7);
    let padded = [&[3][..], &whole, &[0; 3]].concat();
    let begun = frame(HEADERS, END_STREAM, 1, first);
    play(&[
        case("6.1", "DATA on stream 0", data(0, "x"), PROTOCOL),
        case(
            "6.1",
            "padding",
            [post(1, &[]), frame(DATA, PADDED | END_STREAM, 1, [2, b'x', 0, 0])].concat(),
            Served(1),
        ),
        case(
            "6.1",
            "padding as long as the frame",
            [post(1, &[]), frame(DATA, PADDED, 1, [4, 0, 0, 0])].concat(),
            PROTOCOL,
        ),
        case(
            "6.1",
            "padding without a length",
            [post(1, &[]), frame(DATA, PADDED, 1, [])].concat(),
            Connection(&[PROTOCOL_ERROR, FRAME_SIZE_ERROR]),
        ),
        case("6.2", "HEADERS on stream 0", frame(HEADERS, WHOLE, 0, &whole), PROTOCOL),
        case("6.2", "padding", frame(HEADERS, WHOLE | PADDED, 1, padded), Served(1)),
        case("6.2", "padding as long as the frame", frame(HEADERS, WHOLE | PADDED, 1, [5, 0, 0]), PROTOCOL),
        case(
            "6.2",
            "a priority",
            frame(HEADERS, WHOLE | HAS_PRIORITY, 1, [&[0, 0, 0, 0, 9][..], &whole].concat()),
            Served(1),
        ),
        case(
            "6.10",
            "a block in pieces",
            [begun.clone(), frame(CONTINUATION, END_HEADERS, 1, second)].concat(),
            Served(1),
        ),
        case(
            "6.10",
            "empty pieces",
            [begun.clone(), frame(CONTINUATION, 0, 1, []), frame(CONTINUATION, END_HEADERS, 1, second)].concat(),
            Served(1),
        ),
        case(
            "6.10",
            "CONTINUATION on stream 0",
            [begun.clone(), frame(CONTINUATION, END_HEADERS, 0, second)].concat(),
            PROTOCOL,
        ),
        case(
            "6.10",
            "CONTINUATION of another stream",
            [begun, frame(CONTINUATION, END_HEADERS, 3, second)].concat(),
            PROTOCOL,
        ),
        case(
            "6.10",
            "CONTINUATION of a complete block",
            [get(1), frame(CONTINUATION, END_HEADERS, 1, [])].concat(),
            PROTOCOL,
        ),
        case(
            "6.10",
            "CONTINUATION after DATA",
            [post(1, &[]), frame(DATA, 0, 1, "x"), frame(CONTINUATION, END_HEADERS, 1, [])].concat(),
            PROTOCOL,
        ),
    ]);
}

#[test]
fn priorities_resets_and_promises() {
    let on_itself = [&[0, 0, 0, 1, 9][..], &request("GET", &[])].concat();
    play(&[
        case("6.3", "PRIORITY on an idle stream", [frame(PRIORITY, 0, 1, [0, 0, 0, 0, 9]), get(1)].concat(), Served(1)),
        case("6.3", "PRIORITY on stream 0", frame(PRIORITY, 0, 0, [0, 0, 0, 0, 9]), PROTOCOL),
        case(
            "6.3",
            "PRIORITY of another length",
            [post(1, &[]), frame(PRIORITY, 0, 1, [0; 4])].concat(),
            Stream(&[FRAME_SIZE_ERROR, PROTOCOL_ERROR]),
        ),
        case(
            "5.3.1",
            "PRIORITY on itself",
            [post(1, &[]), frame(PRIORITY, 0, 1, [0, 0, 0, 1, 9])].concat(),
            Stream(&[PROTOCOL_ERROR]),
        ),
        case(
            "5.3.1",
            "HEADERS on itself",
            frame(HEADERS, WHOLE | HAS_PRIORITY, 1, on_itself),
            Stream(&[PROTOCOL_ERROR]),
        ),
        case("6.4", "RST_STREAM on stream 0", reset(0), PROTOCOL),
        case("6.4", "RST_STREAM of an idle stream", reset(1), PROTOCOL),
        case("6.4", "RST_STREAM of another length", [post(1, &[]), frame(RST_STREAM, 0, 1, [0; 3])].concat(), SIZE),
        case(
            "6.6",
            "PUSH_PROMISE from a client",
            [post(1, &[]), frame(PUSH_PROMISE, END_HEADERS, 1, [0, 0, 0, 2])].concat(),
            PROTOCOL,
        ),
    ]);
}

#[test]
fn settings_pings_and_goodbyes() {
    let settings = |id, value| frame(SETTINGS, 0, 0, setting(id, value));
    play(&[
        case("6.5", "an acknowledgement with a payload", frame(SETTINGS, ACK, 0, setting(1, 0)), SIZE),
        case("6.5", "on a stream", frame(SETTINGS, 0, 1, []), PROTOCOL),
        case("6.5", "of another length", frame(SETTINGS, 0, 0, [0; 3]), SIZE),
        case("6.5.2", "ENABLE_PUSH 2", settings(2, 2), PROTOCOL),
        case("6.5.2", "a window above 2^31-1", settings(4, 1 << 31), Connection(&[FLOW_CONTROL_ERROR, PROTOCOL_ERROR])),
        case("6.5.2", "a frame size below 2^14", settings(5, (1 << 14) - 1), PROTOCOL),
        case("6.5.2", "a frame size above 2^24-1", settings(5, 1 << 24), PROTOCOL),
        case("6.5.2", "an unknown setting is ignored", [settings(0xff, 1), get(1)].concat(), Served(1)),
        case("6.5.3", "an acknowledgement of nothing", frame(SETTINGS, ACK, 0, []), PROTOCOL),
        case("6.7", "a PING is answered", frame(PING, 0, 0, [7; 8]), Ignored),
        case("6.7", "an answer to no PING is ignored", frame(PING, ACK, 0, [7; 8]), Ignored),
        case("6.7", "a PING on a stream", frame(PING, 0, 1, [7; 8]), PROTOCOL),
        case("6.7", "a PING of another length", frame(PING, 0, 0, [7; 6]), SIZE),
        case("6.8", "GOAWAY on a stream", frame(GOAWAY, 0, 1, [0; 8]), PROTOCOL),
        case("6.8", "what came before a GOAWAY is served", [get(1), frame(GOAWAY, 0, 0, [0; 8])].concat(), ServedLast),
    ]);
}

#[test]
fn windows() {
    play(&[
        case("6.9", "an increment of 0", window(0, 0), PROTOCOL),
        case("6.9", "an increment of 0 on a stream", [post(1, &[]), window(1, 0)].concat(), Stream(&[PROTOCOL_ERROR])),
        case("6.9", "of another length", frame(WINDOW_UPDATE, 0, 0, [0; 3]), SIZE),
        case("6.9.1", "above 2^31-1", [window(0, (1 << 31) - 1)].concat(), Connection(&[FLOW_CONTROL_ERROR])),
        case(
            "6.9.1",
            "above it on a stream",
            [post(1, &[]), window(1, (1 << 31) - 1)].concat(),
            Stream(&[FLOW_CONTROL_ERROR]),
        ),
        case("6.9", "the reserved bit is ignored", [window(0, 1 << 31 | 1), get(1)].concat(), Served(1)),
    ]);
    for ground in Ground::all() {
        // §6.9.2: the answer's body comes as the client makes room for it, also after it began.
        let mut client = ground.client();
        client.send([frame(SETTINGS, 0, 0, setting(4, 0)), get(1)].concat());
        assert_eq!(client.status(1).0, 200);
        assert!(client.alive(), "nothing but the head");
        client.send(window(1, 1));
        assert_eq!(client.until("a byte", |f| f.kind == DATA).payload, b"o");
        client.send(frame(SETTINGS, 0, 0, setting(4, 5)));
        assert_eq!(client.until("the rest", |f| f.kind == DATA).payload, b"k");
        // A window that shrinks below what was used waits until it is above 0 again.
        let sizes = [setting(4, 1), setting(4, 0)].concat();
        client.send([frame(SETTINGS, 0, 0, sizes), get(3)].concat());
        assert_eq!(client.status(3).0, 200);
        client.send(window(3, 2));
        assert_eq!(client.until("all of it", |f| f.kind == DATA).payload, b"ok");
        ground.stop();
    }
}
