//! Where HTTP/1.1 messages end, read strictly: the yardstick for what the sidecar passes on.

/// The length of the head with its empty line.
pub fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4)
}

/// The value of a header of a head.
pub fn value<'a>(head: &'a [u8], name: &str) -> Option<&'a str> {
    let head = std::str::from_utf8(head).ok()?;
    head.split("\r\n").skip(1).find_map(|line| {
        let (n, v) = line.split_once(':')?;
        n.eq_ignore_ascii_case(name).then(|| v.trim())
    })
}

/// The length of the first request, body included; `None` while it is not complete.
pub fn request_end(bytes: &[u8]) -> Option<usize> {
    let head = head_end(bytes)?;
    if value(&bytes[..head], "transfer-encoding").is_some_and(|t| t.eq_ignore_ascii_case("chunked")) {
        return chunks_end(&bytes[head..]).map(|n| head + n);
    }
    let length = value(&bytes[..head], "content-length").map_or(0, |l| l.parse().expect("a length"));
    (bytes.len() >= head + length).then_some(head + length)
}

fn chunks_end(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let line = bytes[at..].windows(2).position(|w| w == b"\r\n")?;
        let size = std::str::from_utf8(&bytes[at..at + line]).expect("a chunk size");
        let size = usize::from_str_radix(size, 16).expect("the sidecar writes no extensions");
        at += line + 2;
        if size == 0 {
            return trailers_end(&bytes[at..]).map(|n| at + n);
        }
        at += size + 2;
        if bytes.len() < at {
            return None;
        }
        assert_eq!(&bytes[at - 2..at], b"\r\n", "a chunk's end");
    }
}

fn trailers_end(bytes: &[u8]) -> Option<usize> {
    if bytes.starts_with(b"\r\n") { Some(2) } else { head_end(bytes) }
}
