//! RFC 9113 §8.2 and §8.3: names, values and pseudo-headers.

use crate::{
    frames::*,
    ground::{Case, Ground, Want::*, case, play},
};

const MALFORMED: crate::ground::Want = Stream(&[PROTOCOL_ERROR]);
const REFUSED: crate::ground::Want = Refused(400, "malformed_request");

fn whole(section: &'static str, name: &'static str, block: Vec<u8>, want: crate::ground::Want) -> Case {
    case(section, name, frame(HEADERS, WHOLE, 1, block), want)
}

fn with(section: &'static str, name: &'static str, more: &[(&str, &str)], want: crate::ground::Want) -> Case {
    whole(section, name, request("GET", more), want)
}

#[test]
fn names_and_values() {
    play(&[
        with("8.2", "an upper-case name", &[("X-Upper", "y")], MALFORMED),
        with("8.2.1", "a space in a name", &[("x y", "z")], MALFORMED),
        with("8.2.1", "a colon in a name", &[("x:y", "z")], MALFORMED),
        with("8.2.1", "a control character in a name", &[("x\x01", "z")], MALFORMED),
        with("8.2.1", "an empty name", &[("", "z")], MALFORMED),
        with("8.2.1", "a CR in a value", &[("x", "a\rb")], MALFORMED),
        with("8.2.1", "an LF in a value", &[("x", "a\nhost: b")], MALFORMED),
        with("8.2.1", "a NUL in a value", &[("x", "a\0b")], MALFORMED),
        with("8.2.2", "connection", &[("connection", "close")], MALFORMED),
        with("8.2.2", "keep-alive", &[("keep-alive", "1")], MALFORMED),
        with("8.2.2", "proxy-connection", &[("proxy-connection", "close")], MALFORMED),
        with("8.2.2", "transfer-encoding", &[("transfer-encoding", "chunked")], MALFORMED),
        with("8.2.2", "upgrade", &[("upgrade", "h2c")], MALFORMED),
        with("8.2.2", "te other than trailers", &[("te", "gzip")], MALFORMED),
        with("8.2.2", "te: trailers", &[("te", "trailers")], Served(1)),
        with("8.2", "an underscore in a name", &[("x_y", "z")], Served(1)),
        with("8.2.3", "cookies in pieces", &[("cookie", "a=b"), ("cookie", "c=d")], Served(1)),
    ]);
}

#[test]
fn pseudo_headers() {
    let s = |pairs: &[(&str, &str)]| block(pairs);
    let (method, scheme, path, authority) =
        ((":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "web.shop"));
    play(&[
        whole("8.3", "after a header", s(&[method, scheme, ("x", "y"), path, authority]), MALFORMED),
        whole("8.3", "unknown", s(&[method, scheme, path, authority, (":x", "y")]), MALFORMED),
        whole("8.3", "an answer's", s(&[method, scheme, path, authority, (":status", "200")]), MALFORMED),
        whole("8.3", "method twice", s(&[method, method, scheme, path, authority]), MALFORMED),
        whole("8.3", "scheme twice", s(&[method, scheme, scheme, path, authority]), MALFORMED),
        whole("8.3", "path twice", s(&[method, scheme, path, path, authority]), MALFORMED),
        whole("8.3", "authority twice", s(&[method, scheme, path, authority, authority]), MALFORMED),
        whole("8.3.1", "no method", s(&[scheme, path, authority]), MALFORMED),
        whole("8.3.1", "no scheme", s(&[method, path, authority]), MALFORMED),
        whole("8.3.1", "no path", s(&[method, scheme, authority]), MALFORMED),
        whole("8.3.1", "an empty path", s(&[method, scheme, (":path", ""), authority]), MALFORMED),
        whole("8.3.1", "a path without a slash", s(&[method, scheme, (":path", "x"), authority]), AnyRefusal),
        whole("8.3.1", "a star for GET", s(&[method, scheme, (":path", "*"), authority]), AnyRefusal),
        whole(
            "8.3.1",
            "a star for OPTIONS",
            s(&[(":method", "OPTIONS"), scheme, (":path", "*"), authority]),
            Served(1),
        ),
        whole("8.3.1", "a path with a space", s(&[method, scheme, (":path", "/ HTTP/1.1"), authority]), AnyRefusal),
        whole("8.3.1", "a path with a line end", s(&[method, scheme, (":path", "/\r\nx: y"), authority]), AnyRefusal),
        whole("8.3.1", "an absolute path", s(&[method, scheme, (":path", "http://other/"), authority]), AnyRefusal),
        whole("8.3.1", "a method that is no token", s(&[(":method", "G T"), scheme, path, authority]), MALFORMED),
        whole("8.3.1", "an authority with a user", s(&[method, scheme, path, (":authority", "u@web")]), AnyRefusal),
        whole(
            "8.3.1",
            "an authority with a line end",
            s(&[method, scheme, path, (":authority", "web\r\nx: y")]),
            AnyRefusal,
        ),
        whole("8.3.1", "an authority that is none", s(&[method, scheme, path, (":authority", "a b")]), AnyRefusal),
        whole("8.3.1", "an unknown scheme", s(&[method, (":scheme", "ftp"), path, authority]), AnyRefusal),
        with("8.3.1", "another Host", &[("host", "admin.shop")], REFUSED),
        with("8.3.1", "the same Host", &[("host", "web.shop")], Served(1)),
        with("8.3.1", "two Hosts", &[("host", "web.shop"), ("host", "web.shop")], REFUSED),
        whole("8.3.1", "Host alone", s(&[method, scheme, path, ("host", "web.shop")]), Served(1)),
        whole("8.3.1", "neither authority nor Host", s(&[method, scheme, path]), REFUSED),
        whole(
            "8.5",
            "CONNECT with a path",
            s(&[(":method", "CONNECT"), scheme, path, ("x", "y"), (":authority", "a:1")]),
            MALFORMED,
        ),
        whole("8.5", "CONNECT without authority", s(&[(":method", "CONNECT")]), AnyRefusal),
        whole("8.5", "CONNECT without port", s(&[(":method", "CONNECT"), authority]), AnyRefusal),
    ]);
}

/// What is served arrives as it was sent.
#[test]
fn what_is_passed_on() {
    for ground in Ground::all() {
        let mut client = ground.client();
        client.send(frame(HEADERS, WHOLE, 1, request("GET", &[("x_y", "z"), ("cookie", "a=b"), ("cookie", "c=d")])));
        assert_eq!(client.status(1).0, 200);
        let seen = ground.app.take();
        let head = &seen[0].head;
        assert_eq!(
            (head.uri.to_string().as_str(), &head.headers["x_y"]),
            ("http://web.shop/first", &"z".parse().expect("a value"))
        );
        assert_eq!(head.headers.get_all("cookie").iter().count(), 2);
        ground.stop();
    }
}
