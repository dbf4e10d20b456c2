//! Request lines and headers: what is no head, what is too long, and what leaves otherwise than it came
//! (RFC 9112 §2, §3, §5).

use crate::ground::{DETECTING, KNOWN, Want::*, case, play};

const MALFORMED: crate::ground::Want = Refused(400, "malformed_request");
const TOO_LARGE: crate::ground::Want = Refused(431, "head_too_large");

fn with(headers: &str) -> String {
    format!("GET /first HTTP/1.1\r\nhost: web\r\n{headers}\r\n")
}

#[test]
fn lines_and_characters() {
    play(&[
        case("a folded header", with("x: a\r\n b: folded\r\n"), MALFORMED),
        case("a folded header, by a tab", with("x: a\r\n\tb\r\n"), MALFORMED),
        case("a fold at the first header", "GET / HTTP/1.1\r\n host: web\r\n\r\n", MALFORMED),
        // RFC 9112 §2.2 allows to read a bare LF as a line's end; what is passed on has CR LF.
        case("lines that end with a bare LF", "GET /first HTTP/1.1\nhost: web\nx: y\n\n", Served(&[200]))
            .has(&["GET /first HTTP/1.1\r\n", "\r\nx: y\r\n"]),
        case("a bare CR ends no line", with("x: a\rtransfer-encoding: chunked\r\n"), MALFORMED),
        case("a space before the colon", with("content-length : 5\r\n"), MALFORMED),
        case("a tab before the colon", with("transfer-encoding\t: chunked\r\n"), MALFORMED),
        case("a space in a name", with("x y: z\r\n"), MALFORMED),
        case("no colon", with("nothing\r\n"), MALFORMED),
        case("no name", with(": value\r\n"), MALFORMED),
        case("a NUL in a value", with("x: a\0b\r\n"), MALFORMED),
        case("a NUL in a name", with("x\0: a\r\n"), MALFORMED),
        case("a control character in a value", with("x: a\x01b\r\n"), MALFORMED),
        case("a DEL in a value", with("x: a\x7fb\r\n"), MALFORMED),
        case("a tab in a value", with("x: a\tb\r\n"), Served(&[200])).has(&["x: a\tb\r\n"]),
        case("bytes above ASCII in a value", with("x: \u{e9}\r\n"), Served(&[200])).has(&["x: \u{e9}\r\n"]),
        case("bytes above ASCII in a name", with("\u{e9}: x\r\n"), MALFORMED),
        case("an underscore in a name", with("content_length: 7\r\nx_forwarded_for: a\r\n"), Served(&[200]))
            .has(&["\r\ncontent_length: 7\r\n", "\r\nx_forwarded_for: a\r\n"]),
        case("an empty value", with("x:\r\n"), Served(&[200])).has(&["\r\nx: \r\n"]),
        case("empty lines before the request line", format!("\r\n\r\n{}", with("")), Served(&[200])),
        case("two spaces in the request line", "GET  / HTTP/1.1\r\nhost: web\r\n\r\n", MALFORMED),
        case("a control character in the target", "GET /\x01 HTTP/1.1\r\nhost: web\r\n\r\n", MALFORMED),
        case("a method that is no token", "G(T / HTTP/1.1\r\nhost: web\r\n\r\n", MALFORMED).on(KNOWN),
        case("an unknown method", "PURGE /first HTTP/1.1\r\nhost: web\r\n\r\n", Served(&[200])).has(&["PURGE /first"]),
        case("methods have a case", "get /first HTTP/1.1\r\nhost: web\r\n\r\n", Served(&[200])).has(&["get /first"]),
    ]);
}

#[test]
fn versions() {
    play(&[
        case("HTTP/2.0", "GET / HTTP/2.0\r\nhost: web\r\n\r\n", MALFORMED),
        case("HTTP/1.2", "GET / HTTP/1.2\r\nhost: web\r\n\r\n", MALFORMED),
        case("HTTP/3.0", "GET / HTTP/3.0\r\nhost: web\r\n\r\n", MALFORMED),
        case("http/1.1", "GET / http/1.1\r\nhost: web\r\n\r\n", MALFORMED).on(KNOWN),
        case("the beginning of HTTP/2's preface", "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", MALFORMED),
        // Where HTTP is detected these are opaque bytes, which any protocol of one's own may begin with.
        case("HTTP/0.9", "GET /first\r\n", MALFORMED).on(KNOWN),
        // RFC 9112 §9.3: persistent only when asked for.
        case("HTTP/1.0", "GET /first HTTP/1.0\r\nhost: web\r\n\r\n", ServedLast(&[200])).has(&["/first HTTP/1.1\r\n"]),
        case("HTTP/1.0 without Host", "GET /first HTTP/1.0\r\n\r\n", ServedLast(&[200])).has(&["\r\nhost: \r\n"]),
        case(
            "HTTP/1.0 kept alive",
            "GET /first HTTP/1.0\r\nhost: web\r\nconnection: keep-alive\r\n\r\n",
            Served(&[200]),
        ),
        case("HTTP/1.1 closed", with("connection: close\r\n"), ServedLast(&[200])).lacks(&["connection: close"]),
    ]);
}

#[test]
fn sizes() {
    let line = |n: usize| format!("GET /{} HTTP/1.1\r\nhost: web\r\n\r\n", "a".repeat(n));
    let long_method = format!("{} / HTTP/1.1\r\nhost: web\r\n\r\n", "A".repeat(100_000));
    play(&[
        case("a header of 32 KiB", with(&format!("x: {}\r\n", "a".repeat(32_000))), Served(&[200])),
        case("a header longer than all heads", with(&format!("x: {}\r\n", "a".repeat(100_000))), TOO_LARGE),
        case("a name longer than all heads", with(&format!("{}: x\r\n", "a".repeat(100_000))), TOO_LARGE),
        case("a head of just more than 64 KiB", with(&format!("x: {}\r\n", "a".repeat(65_536))), TOO_LARGE),
        case("99 headers", with(&"x: y\r\n".repeat(98)), Served(&[200])),
        case("101 headers", with(&"x: y\r\n".repeat(100)), TOO_LARGE),
        case("headers longer than all heads", with(&format!("x: {}\r\n", "a".repeat(1000)).repeat(90)), TOO_LARGE),
        case("a target of 32 KiB", line(32_000), Served(&[200])),
        case("a target longer than all heads", line(100_000), TOO_LARGE),
        case("a method longer than all heads", &long_method, TOO_LARGE).on(KNOWN),
    ]);
}

/// RFC 9110 §7.6.1: what `Connection` names belongs to the connection, unless a client could so strip what others
/// rely on.
#[test]
fn what_connection_names() {
    let stripped = "connection: x-own, x-forwarded-for, content-length, authorization, host\r\nx-own: 1\r\n\
                    x-forwarded-for: 10.0.0.1\r\nauthorization: Bearer x\r\ncontent-length: 2\r\n\r\nhi";
    let twice = "connection: x-own\r\nconnection: close, x-other\r\nx-own: 1\r\nx-other: 2\r\n";
    play(&[
        case("own and others' headers", format!("POST /first HTTP/1.1\r\nhost: web\r\n{stripped}"), Served(&[200]))
            .has(&["x-forwarded-for: 10.0.0.1", "authorization: Bearer x", "content-length: 2", "host: web"])
            .lacks(&["x-own", "connection:"]),
        case("two lines", with(twice), ServedLast(&[200])).lacks(&["x-own", "x-other"]),
        case("names in vain", with("connection: , ,x y,\r\n"), Served(&[200])).lacks(&["connection:"]),
        case("proxy-connection", with("proxy-connection: close\r\nkeep-alive: timeout=1\r\n"), Served(&[200]))
            .lacks(&["proxy-connection", "keep-alive"]),
        case("te", with("te: gzip\r\n"), Served(&[200])).lacks(&["te: gzip"]),
    ]);
}

#[test]
fn what_is_not_http_passes_where_it_is_detected() {
    play(&[case("opaque bytes", "HELO x\r\n", MALFORMED).on(KNOWN)]);
    for ground in crate::ground::grounds(DETECTING, sluice_proxy::limits::Limits::default()) {
        let mut client = ground.client();
        client.send("HELO x\r\n");
        crate::common::eventually("the bytes arrive", || ground.backend.bytes() == b"HELO x\r\n");
        drop(client);
        ground.running.stop();
    }
}
