//! Reads the TLS ClientHello at the start of a connection (RFC 8446 §4.1.2): the server name and the ALPN protocols.
//! It verifies nothing else and decrypts nothing. Every length comes from the network and is checked.

/// What the client asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientHello {
    pub server_name: Option<String>,
    pub alpn: Vec<Vec<u8>>,
}

impl ClientHello {
    /// Empty when none is asked for.
    pub fn server_name(&self) -> &str {
        self.server_name.as_deref().unwrap_or_default()
    }

    pub fn offers(&self, protocol: &[u8]) -> bool {
        self.alpn.iter().any(|p| p == protocol)
    }
}

/// How far the bytes go.
pub(crate) enum Parsed {
    NeedMore,
    Hello(ClientHello),
    /// Not a ClientHello.
    Other,
}

const HANDSHAKE_RECORD: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;

pub(crate) fn parse(bytes: &[u8]) -> Parsed {
    let message = match handshake_bytes(bytes) {
        Ok(m) => m,
        Err(()) => return Parsed::Other,
    };
    let mut r = Reader(&message);
    let Some(kind) = r.u8() else { return Parsed::NeedMore };
    if kind != CLIENT_HELLO {
        return Parsed::Other;
    }
    let Some(length) = r.u24() else { return Parsed::NeedMore };
    match r.take(length) {
        None => Parsed::NeedMore,
        Some(body) => client_hello(body).map_or(Parsed::Other, Parsed::Hello),
    }
}

/// The payloads of the leading handshake records joined, the last one possibly cut short.
fn handshake_bytes(mut bytes: &[u8]) -> Result<Vec<u8>, ()> {
    let mut joined = Vec::with_capacity(bytes.len());
    while let Some((&kind, rest)) = bytes.split_first() {
        let version_ok = rest.first().is_none_or(|v| *v == 3) && rest.get(1).is_none_or(|v| *v <= 4);
        if kind != HANDSHAKE_RECORD || !version_ok {
            return if joined.is_empty() { Err(()) } else { Ok(joined) };
        }
        let Some(header) = bytes.get(..5) else { break };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        let payload = &bytes[5..];
        joined.extend_from_slice(&payload[..length.min(payload.len())]);
        bytes = payload.get(length..).unwrap_or_default();
    }
    Ok(joined)
}

fn client_hello(body: &[u8]) -> Option<ClientHello> {
    let mut r = Reader(body);
    r.take(2 + 32)?; // version, random
    let session = r.u8()?;
    r.take(session.into())?;
    let ciphers = r.u16()?;
    r.take(ciphers.into())?;
    let compressions = r.u8()?;
    r.take(compressions.into())?;
    let mut hello = ClientHello::default();
    let Some(length) = r.u16() else { return Some(hello) };
    let mut extensions = Reader(r.take(length.into())?);
    while let Some(kind) = extensions.u16() {
        let length = extensions.u16()?;
        let data = extensions.take(length.into())?;
        match kind {
            SERVER_NAME => hello.server_name = server_name(data),
            ALPN => hello.alpn = alpn(data)?,
            _ => {}
        }
    }
    Some(hello)
}

fn server_name(data: &[u8]) -> Option<String> {
    let mut r = Reader(data);
    r.u16()?;
    let kind = r.u8()?;
    let length = r.u16()?;
    let name = r.take(length.into())?;
    if kind != 0 {
        return None;
    }
    std::str::from_utf8(name).ok().map(str::to_owned)
}

fn alpn(data: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut r = Reader(data);
    r.u16()?;
    let mut protocols = Vec::new();
    while let Some(length) = r.u8() {
        protocols.push(r.take(length.into())?.to_vec());
    }
    Some(protocols)
}

/// Takes big-endian values from the front; `None` when too few bytes are left.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|b| b[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|b| u16::from_be_bytes([b[0], b[1]]))
    }

    fn u24(&mut self) -> Option<usize> {
        self.take(3).map(|b| usize::from(b[0]) << 16 | usize::from(b[1]) << 8 | usize::from(b[2]))
    }
}
