//! Frames and header blocks, made and read by hand.

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;
pub const HAS_PRIORITY: u8 = 32;
/// A request without body in one frame.
pub const WHOLE: u8 = END_HEADERS | END_STREAM;

/// Error codes (RFC 9113 §7).
pub const PROTOCOL_ERROR: u32 = 1;
pub const FLOW_CONTROL_ERROR: u32 = 3;
pub const STREAM_CLOSED: u32 = 5;
pub const FRAME_SIZE_ERROR: u32 = 6;
pub const REFUSED_STREAM: u32 = 7;
pub const COMPRESSION_ERROR: u32 = 9;
pub const ENHANCE_YOUR_CALM: u32 = 11;

#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The error code of a RST_STREAM or GOAWAY.
    pub fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        let code = self.payload.get(at..at + 4).expect("a code");
        u32::from_be_bytes(code.try_into().expect("four bytes"))
    }
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: impl AsRef<[u8]>) -> Vec<u8> {
    let payload = payload.as_ref();
    let length = u32::try_from(payload.len()).expect("a length").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The first frame of `bytes` and its length.
pub fn parse(bytes: &[u8]) -> Option<(Frame, usize)> {
    let head = bytes.get(..9)?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
    let payload = bytes.get(9..9 + length)?.to_vec();
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    Some((Frame { kind: head[3], flags: head[4], stream, payload }, 9 + length))
}

pub fn setting(id: u16, value: u32) -> Vec<u8> {
    [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()
}

pub fn window(stream: u32, by: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, by.to_be_bytes())
}

pub fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, 8u32.to_be_bytes())
}

/// A header that enters no table, both parts plain.
pub fn header(name: &str, value: impl AsRef<[u8]>) -> Vec<u8> {
    [&[0][..], &string(name.as_bytes()), &string(value.as_ref())].concat()
}

/// A string without Huffman code (RFC 7541 §5.2).
pub fn string(bytes: &[u8]) -> Vec<u8> {
    [&integer(bytes.len(), 7), bytes].concat()
}

/// RFC 7541 §5.1, with zeros before the prefix.
fn integer(value: usize, bits: u32) -> Vec<u8> {
    let most = (1 << bits) - 1;
    if value < most {
        return vec![value as u8];
    }
    let (mut rest, mut all) = (value - most, vec![most as u8]);
    while rest >= 128 {
        all.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    all.push(rest as u8);
    all
}

/// A header block of these, in order.
pub fn block(headers: &[(&str, &str)]) -> Vec<u8> {
    headers.iter().flat_map(|(n, v)| header(n, v)).collect()
}

const TARGET: [(&str, &str); 3] = [(":scheme", "http"), (":path", "/first"), (":authority", "web.shop")];

/// A request's block: its method, the usual target and more headers.
pub fn request(method: &str, more: &[(&str, &str)]) -> Vec<u8> {
    block(&[&[(":method", method)], &TARGET[..], more].concat())
}

pub fn get(stream: u32) -> Vec<u8> {
    frame(HEADERS, WHOLE, stream, request("GET", &[]))
}

/// A POST whose body is still to come.
pub fn post(stream: u32, more: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, request("POST", more))
}

pub fn data(stream: u32, bytes: impl AsRef<[u8]>) -> Vec<u8> {
    frame(DATA, END_STREAM, stream, bytes)
}

/// The headers of a block that uses no dynamic table. Of the static table only statuses are known.
pub fn decode(mut block: &[u8]) -> Vec<(String, String)> {
    let mut all = Vec::new();
    while let Some(&first) = block.first() {
        if first & 0x80 != 0 {
            let index = take_integer(&mut block, 7);
            let status = ["200", "204", "206", "304", "400", "404", "500"].get(index.wrapping_sub(8));
            all.push((if status.is_some() { ":status" } else { "?" }.into(), (*status.unwrap_or(&"?")).into()));
        } else if first & 0xe0 == 0x20 {
            assert_eq!(take_integer(&mut block, 5), 0, "the table that we asked for");
        } else {
            let index = take_integer(&mut block, if first & 0x40 != 0 { 6 } else { 4 });
            let name = match index {
                0 => take_string(&mut block),
                8..=14 => ":status".into(),
                _ => "?".into(),
            };
            all.push((name, take_string(&mut block)));
        }
    }
    all
}

fn take_integer(block: &mut &[u8], bits: u32) -> usize {
    let most = (1usize << bits) - 1;
    let mut value = usize::from(block[0]) & most;
    *block = &block[1..];
    let mut shift = 0;
    while value >= most {
        let next = block[0];
        *block = &block[1..];
        value += usize::from(next & 127) << shift;
        shift += 7;
        if next & 128 == 0 {
            break;
        }
    }
    value
}

fn take_string(block: &mut &[u8]) -> String {
    let coded = block[0] & 128 != 0;
    let length = take_integer(block, 7);
    let (bytes, rest) = block.split_at(length);
    *block = rest;
    if coded { huffman(bytes) } else { String::from_utf8_lossy(bytes).into_owned() }
}

/// The short codes of RFC 7541 Appendix B, by their lengths; within one length and from each to the next they count up.
const CODES: [(u32, &[u8]); 3] =
    [(5, b"012aceiost"), (6, b" %-./3456789=A_bdfghlmnpru"), (7, b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz")];

fn huffman(bytes: &[u8]) -> String {
    let mut bits = bytes.iter().flat_map(|b| (0..8).rev().map(move |i| u32::from(b >> i & 1)));
    let mut text = String::new();
    loop {
        let (mut code, mut first, mut length) = (0, 0u32, 0);
        let found = CODES.iter().find_map(|(bits_of, letters)| {
            while length < *bits_of {
                code = code << 1 | bits.next()?;
                length += 1;
            }
            let at = code.checked_sub(first).filter(|at| (*at as usize) < letters.len());
            first = (first + letters.len() as u32) << 1;
            at.map(|at| char::from(letters[at as usize]))
        });
        match found {
            Some(letter) => text.push(letter),
            // The padding, or a letter that no test looks for.
            None => return text,
        }
    }
}

#[test]
fn strings_are_read_as_the_rfc_writes_them() {
    // RFC 7541 Appendix C.4.1 and C.4.3.
    assert_eq!(huffman(&[0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff]), "www.example.com");
    assert_eq!(huffman(&[0x25, 0xa8, 0x49, 0xe9, 0x5b, 0xa9, 0x7d, 0x7f]), "custom-key");
    assert_eq!(decode(&header("a", "b")), [("a".to_owned(), "b".to_owned())]);
    assert_eq!(integer(1337, 5), [31, 154, 10]);
}
