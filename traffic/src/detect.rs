//! What a connection carries, told from its first bytes: HTTP/1, HTTP/2 with prior knowledge, TLS, or bytes that are
//! none of these. The caller reads, asks again with more bytes on [`Detected::NeedMore`], and gives up waiting after a
//! time of its own (some protocols wait for the server to speak first).

use crate::hello;

pub use crate::hello::ClientHello;

/// The answer never needs more bytes than this; at the bound what is undecided gets [`at_end`]'s answer.
pub const MAX_BYTES: usize = 16 * 1024;
/// Longest method looked at, as long as the longest registered one with room to spare.
const MAX_METHOD: usize = 32;
/// The methods of RFC 9110 §9 and RFC 5789, each with the space after it.
const METHODS: [&[u8]; 9] =
    [b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"CONNECT ", b"OPTIONS ", b"TRACE ", b"PATCH "];
/// A handshake record of any version.
const TLS: &[u8] = &[0x16, 3];
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detected {
    NeedMore,
    Http1,
    /// With prior knowledge: the connection preface.
    Http2,
    Tls(ClientHello),
    Opaque,
}

/// Judges the bytes received so far.
pub fn detect(bytes: &[u8]) -> Detected {
    let found = match bytes.first() {
        None => Detected::NeedMore,
        Some(0x16) => tls(bytes),
        Some(_) if starts_alike(bytes, HTTP2_PREFACE) => http2(bytes),
        Some(_) => http1(bytes),
    };
    match found {
        Detected::NeedMore if bytes.len() >= MAX_BYTES => at_end(bytes),
        found => found,
    }
}

/// Judges the bytes received so far where all is HTTP: which version of it.
pub fn version(bytes: &[u8]) -> Detected {
    match bytes {
        [] => Detected::NeedMore,
        _ if starts_alike(bytes, HTTP2_PREFACE) => http2(bytes),
        _ => Detected::Http1,
    }
}

/// The answer for bytes that say [`Detected::NeedMore`] when no more are waited for: a request that was only begun is
/// HTTP all the same, so that it is refused and not passed on unseen.
pub fn at_end(bytes: &[u8]) -> Detected {
    let bytes = after_blank_lines(bytes).unwrap_or_default();
    if METHODS.iter().any(|m| bytes.starts_with(m)) { Detected::Http1 } else { Detected::Opaque }
}

/// These bytes may well become something other than opaque ones: worth a longer wait than silence.
pub fn begun(bytes: &[u8]) -> bool {
    let Some(line) = after_blank_lines(bytes).filter(|l| !l.is_empty()) else { return false };
    let beginnings = METHODS.iter().copied().chain([HTTP2_PREFACE, TLS]);
    beginnings.into_iter().any(|b| starts_alike(line, b))
}

fn starts_alike(bytes: &[u8], preface: &[u8]) -> bool {
    let n = bytes.len().min(preface.len());
    bytes[..n] == preface[..n]
}

fn http2(bytes: &[u8]) -> Detected {
    if bytes.len() < HTTP2_PREFACE.len() { Detected::NeedMore } else { Detected::Http2 }
}

fn tls(bytes: &[u8]) -> Detected {
    match hello::parse(bytes) {
        hello::Parsed::NeedMore => Detected::NeedMore,
        hello::Parsed::Hello(h) => Detected::Tls(h),
        hello::Parsed::Other => Detected::Opaque,
    }
}

/// Empty lines before a request are allowed (RFC 9112 §2.2); `None` for too many.
fn after_blank_lines(bytes: &[u8]) -> Option<&[u8]> {
    let blank = bytes.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
    (blank <= 4).then(|| &bytes[blank..])
}

/// A request line: method, target, version.
fn http1(bytes: &[u8]) -> Detected {
    let Some(bytes) = after_blank_lines(bytes) else { return Detected::Opaque };
    let method = bytes.iter().take(MAX_METHOD + 1).take_while(|b| token(**b)).count();
    match bytes.get(method) {
        None if method <= MAX_METHOD => return Detected::NeedMore,
        Some(b' ') if (1..=MAX_METHOD).contains(&method) => {}
        _ => return Detected::Opaque,
    }
    let rest = &bytes[method + 1..];
    let end = rest.iter().position(|b| *b == b'\n');
    let line = &rest[..end.unwrap_or(rest.len())];
    if line.iter().any(|b| *b < b' ' && *b != b'\r') {
        // In no request line, however it goes on: judged alike in whatever pieces it comes.
        return at_end(bytes);
    }
    end.map_or(Detected::NeedMore, |_| request_line(line))
}

fn request_line(line: &[u8]) -> Detected {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let version = line.rsplit(|b| *b == b' ').next().unwrap_or_default();
    // Of any number: what is no version of HTTP/1 is refused by those who read it, and not passed on unseen.
    let is_version =
        matches!(version, [b'H', b'T', b'T', b'P', b'/', a, b'.', b] if a.is_ascii_digit() && b.is_ascii_digit());
    if line.len() > version.len() + 1 && is_version { Detected::Http1 } else { Detected::Opaque }
}

/// A character of a method (RFC 9110 §5.6.2).
fn token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn http_is_of_one_version_or_the_other() {
        for (bytes, want) in [
            (&b""[..], Detected::NeedMore),
            (b"P", Detected::NeedMore),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", Detected::NeedMore),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Detected::Http2),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nmore", Detected::Http2),
            (b"PO", Detected::Http1),
            (b"PRI /", Detected::Http1),
            (b"\x16\x03", Detected::Http1),
        ] {
            assert_eq!(version(bytes), want, "{bytes:?}");
        }
    }

    fn extension(kind: u16, data: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &(data.len() as u16).to_be_bytes(), data].concat()
    }

    fn client_hello(extensions: &[u8]) -> Vec<u8> {
        let body = [
            &[3, 3][..],
            &[7; 32],
            &[0],
            &[0, 2, 0x13, 1],
            &[1, 0],
            &(extensions.len() as u16).to_be_bytes(),
            extensions,
        ]
        .concat();
        [&[1, 0], &(body.len() as u16).to_be_bytes()[..], &body].concat()
    }

    fn record(payload: &[u8]) -> Vec<u8> {
        [&[22, 3, 1][..], &(payload.len() as u16).to_be_bytes(), payload].concat()
    }

    fn sample() -> Vec<u8> {
        let name = [&[0, 6, 0, 0, 3][..], b"web"].concat();
        let alpn = [&[0, 14, 9][..], b"sluice-h2", &[3], b"foo"].concat();
        client_hello(&[extension(0, &name), extension(43, &[2, 3, 4]), extension(16, &alpn)].concat())
    }

    #[test]
    fn first_bytes_tell() {
        let cases: &[(&[u8], Detected)] = &[
            (b"", Detected::NeedMore),
            (b"G", Detected::NeedMore),
            (b"GET /path", Detected::NeedMore),
            (b"GET / HTTP/1.1\r\n", Detected::Http1),
            (b"\r\nGET / HTTP/1.1\r\n", Detected::Http1),
            (b"PURGE * HTTP/1.0\n", Detected::Http1),
            (b"M-SEARCH * HTTP/1.1\r\nHost:", Detected::Http1),
            (b"GET / HTTP/3.1\r\n", Detected::Http1),
            (b"GET / HTTP/1.10\r\n", Detected::Opaque),
            (b"GET /\r\n", Detected::Opaque),
            (b"OPTIONS sip:a@b SIP/2.0\r\n", Detected::Opaque),
            (b"GET HTTP/1.1\r\n", Detected::Opaque),
            (b"HELO mail.example\r\n", Detected::Opaque),
            (b"EHLO\r\n", Detected::Opaque),
            (b"GET /\x00\x01", Detected::Http1),
            (b"SET /\x00\x01", Detected::Opaque),
            (b"SET /\x00\x01 HTTP/1.1\r\n", Detected::Opaque),
            (b"*1\r\n$4\r\nPING\r\n", Detected::Opaque),
            (b"\x00\x00\x00\x01", Detected::Opaque),
            (b"PRI * HTTP/2.0\r\n", Detected::NeedMore),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00", Detected::Http2),
            (b"PRINT / HTTP/1.1\r\n", Detected::Http1),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Detected::Opaque),
            (b"\x16\x03", Detected::NeedMore),
            (b"\x16\x09\x01", Detected::Opaque),
            (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", Detected::Opaque),
        ];
        for (bytes, expected) in cases {
            assert_eq!(detect(bytes), *expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn a_client_hello_names_server_and_protocols() {
        let Detected::Tls(hello) = detect(&record(&sample())) else { panic!("not TLS") };
        assert_eq!(hello.server_name.as_deref(), Some("web"));
        assert!(hello.offers(b"sluice-h2") && hello.offers(b"foo") && !hello.offers(b"h2"));
    }

    #[test]
    fn a_client_hello_may_come_in_pieces() {
        let hello = sample();
        let split = [record(&hello[..10]), record(&hello[10..])].concat();
        for n in 1..split.len() {
            assert_eq!(detect(&split[..n]), Detected::NeedMore, "{n} bytes");
        }
        assert_eq!(detect(&split), detect(&record(&hello)));
    }

    #[test]
    fn beginnings_are_waited_for_and_silence_is_not() {
        for yes in [&b"G"[..], b"GE", b"GET /", b"\r\nPOST ", b"PRI * H", b"\x16", b"\x16\x03\x01"] {
            assert!(begun(yes), "{yes:?}");
        }
        for no in [&b""[..], b"ruok", b"GETX", b"\r\n", b"\x16\x04", b"\x00"] {
            assert!(!begun(no), "{no:?}");
        }
        assert_eq!(
            (at_end(b"GET /x HT"), at_end(b"GET"), at_end(b"\x16\x03")),
            (Detected::Http1, Detected::Opaque, Detected::Opaque)
        );
    }

    #[test]
    fn waiting_is_bounded() {
        let mut long = b"GET /".to_vec();
        long.resize(MAX_BYTES, b'a');
        assert_eq!(detect(&long), Detected::Http1);
        long[..5].copy_from_slice(b"SET /");
        assert_eq!(detect(&long), Detected::Opaque);
        assert_eq!(detect(&[b'A'; MAX_METHOD + 1]), Detected::Opaque);
        let huge = [&[22, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff][..], &[0; MAX_BYTES]].concat();
        assert_eq!(detect(&huge), Detected::Opaque);
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_an_answer_stays(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut: prop::sample::Index) {
            let cut = cut.index(bytes.len() + 1);
            let early = detect(&bytes[..cut]);
            prop_assert!(early == Detected::NeedMore || early == detect(&bytes));
        }

        #[test]
        fn no_broken_hello_panics(at: prop::sample::Index, with: u8) {
            let mut bytes = record(&sample());
            let at = at.index(bytes.len());
            bytes[at] = with;
            detect(&bytes);
        }

        #[test]
        fn every_request_line_is_http(method in "[A-Z]{1,16}", path in "/[a-z0-9/?=&%.-]{0,80}") {
            prop_assert_eq!(detect(format!("{method} {path} HTTP/1.1\r\n").as_bytes()), Detected::Http1);
        }
    }
}
