//! What a connection carries, told from its first bytes: HTTP/1, HTTP/2 with prior knowledge, TLS, or bytes that are
//! none of these. The caller reads, asks again with more bytes on [`Detected::NeedMore`], and gives up waiting after a
//! time of its own (some protocols wait for the server to speak first).

use crate::hello;

pub use crate::hello::ClientHello;

/// The answer never needs more bytes than this; at the bound everything undecided is [`Detected::Opaque`].
pub const MAX_BYTES: usize = 16 * 1024;
/// Longest method looked at, as long as the longest registered one with room to spare.
const MAX_METHOD: usize = 32;
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
        Detected::NeedMore if bytes.len() >= MAX_BYTES => Detected::Opaque,
        found => found,
    }
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

/// A request line: method, target, `HTTP/1.x`. Empty lines before it are allowed (RFC 9112 §2.2).
fn http1(bytes: &[u8]) -> Detected {
    let blank = bytes.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
    if blank > 4 {
        return Detected::Opaque;
    }
    let bytes = &bytes[blank..];
    let method = bytes.iter().take(MAX_METHOD + 1).take_while(|b| token(**b)).count();
    match bytes.get(method) {
        None if method <= MAX_METHOD => return Detected::NeedMore,
        Some(b' ') if (1..=MAX_METHOD).contains(&method) => {}
        _ => return Detected::Opaque,
    }
    let rest = &bytes[method + 1..];
    match rest.iter().position(|b| *b == b'\n') {
        Some(end) => request_line(&rest[..end]),
        None if rest.iter().any(|b| *b < b' ' && *b != b'\r') => Detected::Opaque,
        None => Detected::NeedMore,
    }
}

fn request_line(line: &[u8]) -> Detected {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let version = line.rsplit(|b| *b == b' ').next().unwrap_or_default();
    if line.len() > version.len() + 1 && matches!(version, b"HTTP/1.1" | b"HTTP/1.0") {
        Detected::Http1
    } else {
        Detected::Opaque
    }
}

/// A character of a method (RFC 9110 §5.6.2).
fn token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
            (b"GET / HTTP/3.1\r\n", Detected::Opaque),
            (b"GET HTTP/1.1\r\n", Detected::Opaque),
            (b"HELO mail.example\r\n", Detected::Opaque),
            (b"EHLO\r\n", Detected::Opaque),
            (b"GET /\x00\x01", Detected::Opaque),
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
    fn waiting_is_bounded() {
        let mut long = b"GET /".to_vec();
        long.resize(MAX_BYTES, b'a');
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
