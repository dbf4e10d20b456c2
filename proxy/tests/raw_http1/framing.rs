//! Where a request ends: everything that two readers might read differently (RFC 9112 §6, §7).

use crate::ground::{Case, Want::*, case, play};

/// A second request that must never be seen as one.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nhost: web\r\n\r\n";

/// A POST with these headers and body.
fn post(headers: &str, body: &str) -> String {
    format!("POST /first HTTP/1.1\r\nhost: web\r\n{headers}\r\n{body}")
}

fn chunked(body: &str) -> String {
    post("transfer-encoding: chunked\r\n", body)
}

const MALFORMED: crate::ground::Want = Refused(400, "malformed_request");
const CODING: crate::ground::Want = Refused(501, "unknown_transfer_coding");

#[test]
fn lengths_and_codings() {
    let te = "transfer-encoding: chunked\r\n";
    let zero = format!("0\r\n\r\n{SMUGGLED}");
    play(&[
        // RFC 9112 §6.3: with both, the coding counts, the length is not passed on, and the connection ends.
        case("CL, then TE", post(&format!("content-length: 4\r\n{te}"), &zero), ServedLast(&[200]))
            .lacks(&["content-length", "/smuggled"]),
        case("TE, then CL", post(&format!("{te}content-length: 4\r\n"), &zero), ServedLast(&[200]))
            .lacks(&["content-length", "/smuggled"]),
        case("TE with a CL that covers it", post(&format!("{te}content-length: 44\r\n"), &zero), ServedLast(&[200]))
            .lacks(&["content-length", "/smuggled"]),
        case("equal CLs count as one", post("content-length: 2\r\ncontent-length: 2\r\n", "hi"), Served(&[200]))
            .has(&["content-length: 2\r\n"]),
        case("differing CLs", post("content-length: 2\r\ncontent-length: 40\r\n", SMUGGLED), MALFORMED),
        case("a list of equal CLs", post("content-length: 2, 2\r\n", "hi"), MALFORMED),
        case("a list of CLs", post("content-length: 2, 40\r\n", SMUGGLED), MALFORMED),
        case("a signed CL", post("content-length: +2\r\n", "hi"), MALFORMED),
        case("a negative CL", post("content-length: -2\r\n", "hi"), MALFORMED),
        case("a hexadecimal CL", post("content-length: 0x2\r\n", "hi"), MALFORMED),
        case("a CL with a space within", post("content-length: 1 0\r\n", "0123456789"), MALFORMED),
        case("an empty CL", post("content-length:\r\n", ""), MALFORMED),
        case("a CL above 64 bits", post("content-length: 18446744073709551618\r\n", "hi"), MALFORMED),
        case("spaces around a CL mean nothing", post("content-length: \t 2 \r\n", "hi"), Served(&[200]))
            .has(&["content-length: 2\r\n"]),
        case("leading zeros mean nothing", post("content-length: 0002\r\n", "hi"), Served(&[200])),
        case("chunked, identity", post("transfer-encoding: chunked, identity\r\n", "0\r\n\r\n"), MALFORMED),
        case("identity, chunked", post("transfer-encoding: identity, chunked\r\n", &zero), CODING),
        case("gzip, chunked", post("transfer-encoding: gzip, chunked\r\n", &zero), CODING),
        case("chunked twice", post("transfer-encoding: chunked, chunked\r\n", &zero), CODING),
        case("xchunked", post("transfer-encoding: xchunked\r\n", &zero), MALFORMED),
        case("identity", post("transfer-encoding: identity\r\n", SMUGGLED), MALFORMED),
        case("identity beside CL", post("transfer-encoding: identity\r\ncontent-length: 2\r\n", "hi"), MALFORMED),
        case("two TE headers", post(&format!("{te}{te}"), &zero), CODING),
        case("TE of two kinds", post(&format!("{te}transfer-encoding: identity\r\n"), &zero), MALFORMED),
        case("TE of two kinds, turned", post(&format!("transfer-encoding: identity\r\n{te}"), &zero), CODING),
        case("an empty TE", post("transfer-encoding:\r\n", &zero), MALFORMED),
        case("a TE with a parameter", post("transfer-encoding: chunked;q=1\r\n", &zero), MALFORMED),
        case("a TE in quotes", post("transfer-encoding: \"chunked\"\r\n", &zero), MALFORMED),
        case("a TE after a vertical tab", post("transfer-encoding: \x0bchunked\r\n", &zero), MALFORMED),
        case("case means nothing", post("Transfer-Encoding: CHUNKED\r\n", "0\r\n\r\n"), Served(&[200])),
        case("TE in HTTP/1.0", format!("POST / HTTP/1.0\r\nhost: web\r\n{te}\r\n{zero}"), MALFORMED),
        case("a GET may have a body", "GET / HTTP/1.1\r\nhost: web\r\ncontent-length: 2\r\n\r\nhi", Served(&[200]))
            .has(&["\r\n\r\nhi"]),
        case("a body that looks like a request", post("content-length: 37\r\n", SMUGGLED), Served(&[200])),
    ]);
    assert_eq!(SMUGGLED.len(), 37);
}

#[test]
fn chunks() {
    let long_extension = format!("1;{}\r\na\r\n0\r\n\r\n", "x".repeat(100_000));
    let many_extensions = "1;a=b\r\nx\r\n".repeat(10_000) + "0\r\n\r\n";
    let long_trailer = format!("0\r\nx-long: {}\r\n\r\n", "x".repeat(100_000));
    let many_trailers = format!("0\r\n{}\r\n", "x: y\r\n".repeat(200));
    let cut = |name, body: &str| case(name, chunked(body), MALFORMED).lacks(&["/smuggled"]);
    let then = |body: &str| format!("{body}{SMUGGLED}");
    let good = |name, body: &str| case(name, chunked(body), Served(&[200]));
    play(&[
        good("upper and lower case sizes", "A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n").has(&["0123456789"]),
        good("leading zeros", "0000000005\r\nhello\r\n0000\r\n\r\n").has(&["hello"]),
        good("an extension goes", "5;name=value\r\nhello\r\n0;last\r\n\r\n").has(&["hello"]).lacks(&["name=value"]),
        good("a quoted extension goes", "5;a=\"b;c\"\r\nhello\r\n0\r\n\r\n").lacks(&["b;c"]),
        cut("an extension without end", &long_extension),
        cut("extensions without end", &many_extensions),
        // What some servers take for the end of the size and others do not.
        cut("an extension with a bare LF", &then("5;a\nhello\r\n0\r\n\r\n")),
        cut("a size ended by a bare LF", &then("5\nhello\r\n0\r\n\r\n")),
        cut("a size ended by a bare CR", &then("5\rhello\r\n0\r\n\r\n")),
        cut("a chunk ended by a bare LF", &then("5\r\nhello\n0\r\n\r\n")),
        cut("a chunk longer than its size", &then("4\r\nhello\r\n0\r\n\r\n")),
        cut("a size above 64 bits", &then("10000000000000005\r\nhello\r\n0\r\n\r\n")),
        cut("a size that wraps", &then("fffffffffffffffff\r\nhello\r\n0\r\n\r\n")),
        cut("a negative size", &then("-5\r\nhello\r\n0\r\n\r\n")),
        cut("a signed size", &then("+5\r\nhello\r\n0\r\n\r\n")),
        cut("a size with 0x", &then("0x5\r\nhello\r\n0\r\n\r\n")),
        cut("no size", &then("\r\nhello\r\n0\r\n\r\n")),
        cut("a size of other characters", &then("g\r\nhello\r\n0\r\n\r\n")),
        cut("a space before the size", &then(" 5\r\nhello\r\n0\r\n\r\n")),
        cut("trailers without end", &long_trailer),
        cut("too many trailers", &many_trailers),
        cut("a malformed trailer", "0\r\nx y: z\r\n\r\n"),
        // RFC 9110 §6.5.1: trailers may be dropped, and those that frame or route must not count.
        good("trailers that nobody announced", "2\r\nhi\r\n0\r\nx-sum: 7\r\n\r\n").has(&["hi"]),
        good("forbidden trailers go", "2\r\nhi\r\n0\r\ncontent-length: 9\r\nhost: other\r\n\r\n")
            .lacks(&["content-length", "other"]),
        Case { send: announced().into(), ..good("announced trailers pass", "") }.has(&["0\r\nx-sum: 7\r\n\r\n"]),
    ]);
}

fn announced() -> String {
    post("transfer-encoding: chunked\r\ntrailer: x-sum, host\r\n", "2\r\nhi\r\n0\r\nx-sum: 7\r\nhost: other\r\n\r\n")
}
