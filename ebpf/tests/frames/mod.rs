//! Frames, made and read by an obvious reference: every checksum is computed anew, none is patched.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// A TCP or UDP packet to make.
#[derive(Clone, Debug)]
pub struct Frame {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub sport: u16,
    pub dport: u16,
    pub proto: u8,
    /// Words of IPv4 options; for IPv6 a destination options header of so many times eight bytes.
    pub options: usize,
    pub payload: Vec<u8>,
    /// UDP over IPv4 may have none.
    pub checksum: bool,
    /// Of TCP.
    pub flags: u8,
    /// It may be sent on so many times.
    pub hops: u8,
    /// The link-layer address that it is sent to; `lo` has none.
    pub mac: [u8; 6],
    /// IPv4's "don't fragment".
    pub whole: bool,
}

/// The other machine at the link.
pub const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 2];

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

impl Default for Frame {
    fn default() -> Self {
        let none = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        Self {
            src: none,
            dst: none,
            sport: 0,
            dport: 0,
            proto: TCP,
            options: 0,
            payload: b"sluice".to_vec(),
            checksum: true,
            flags: SYN,
            hops: 64,
            mac: [0; 6],
            whole: false,
        }
    }
}

/// What was read of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub sport: u16,
    pub dport: u16,
    pub payload: Vec<u8>,
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// RFC 1071.
pub fn sum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut total: u64 = bytes.chunks(2).map(|c| u64::from(c[0]) << 8 | u64::from(*c.get(1).unwrap_or(&0))).sum();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

fn pseudo(src: IpAddr, dst: IpAddr, proto: u8, length: usize) -> Vec<u8> {
    let mut bytes = [octets(src), octets(dst)].concat();
    match src {
        IpAddr::V4(_) => bytes.extend([0, proto, (length >> 8) as u8, length as u8]),
        IpAddr::V6(_) => {
            bytes.extend((length as u32).to_be_bytes());
            bytes.extend([0, 0, 0, proto]);
        }
    }
    bytes
}

impl Frame {
    fn transport(&self) -> Vec<u8> {
        let mut bytes = [self.sport.to_be_bytes(), self.dport.to_be_bytes()].concat();
        let at = if self.proto == TCP {
            bytes.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
            16
        } else {
            bytes.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            bytes.extend([0, 0]);
            6
        };
        bytes.extend(&self.payload);
        if self.checksum {
            let check = sum(&[&pseudo(self.src, self.dst, self.proto, bytes.len()), &bytes]);
            let check = if check == 0 && self.proto == UDP { 0xffff } else { check };
            bytes[at..at + 2].copy_from_slice(&check.to_be_bytes());
        }
        bytes
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.network(&self.transport(), None)
    }

    /// The part of the packet from the `at`th unit of eight bytes on, two units long; `more` of them follow.
    pub fn fragment(&self, at: u16, more: u16, id: u16) -> Vec<u8> {
        let all = self.transport();
        let from = usize::from(at) * 8;
        let to = if more == 1 { (from + 16).min(all.len()) } else { all.len() };
        self.network(&all[from.min(all.len())..to], Some((at, more, id)))
    }

    fn network(&self, body: &[u8], fragment: Option<(u16, u16, u16)>) -> Vec<u8> {
        let mut frame = [self.mac, SENDER].concat();
        let (at, more, id) = fragment.unwrap_or_default();
        match self.src {
            IpAddr::V4(_) => {
                frame.extend([8, 0]);
                let length = 20 + self.options * 4;
                let mut ip = vec![0x40 | (length / 4) as u8, 0];
                ip.extend(((length + body.len()) as u16).to_be_bytes());
                ip.extend(id.to_be_bytes());
                ip.extend((u16::from(self.whole) << 14 | more << 13 | at).to_be_bytes());
                ip.extend([self.hops, self.proto, 0, 0]);
                ip.extend([octets(self.src), octets(self.dst)].concat());
                ip.extend(vec![1; self.options * 4]); // no operation
                let check = sum(&[&ip]);
                ip[10..12].copy_from_slice(&check.to_be_bytes());
                frame.extend(ip);
            }
            IpAddr::V6(_) => {
                frame.extend([0x86, 0xdd]);
                let mut extensions: Vec<Vec<u8>> = vec![];
                let mut kinds = vec![];
                if self.options > 0 {
                    kinds.push(60);
                    // PadN of the rest.
                    let mut header = vec![0, (self.options - 1) as u8, 1, (self.options * 8 - 4) as u8];
                    header.resize(self.options * 8, 0);
                    extensions.push(header);
                }
                if fragment.is_some() {
                    kinds.push(44);
                    let mut header = vec![0, 0];
                    header.extend((at << 3 | more).to_be_bytes());
                    header.extend(u32::from(id).to_be_bytes());
                    extensions.push(header);
                }
                kinds.push(self.proto);
                for (header, next) in extensions.iter_mut().zip(&kinds[1..]) {
                    header[0] = *next;
                }
                let extensions = extensions.concat();
                frame.extend([0x60, 0, 0, 0]);
                frame.extend(((extensions.len() + body.len()) as u16).to_be_bytes());
                frame.extend([kinds[0], self.hops]);
                frame.extend([octets(self.src), octets(self.dst)].concat());
                frame.extend(extensions);
            }
        }
        frame.extend(body);
        frame
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn v4(bytes: &[u8], at: usize) -> Option<IpAddr> {
    Some(IpAddr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?))
}

fn v6(bytes: &[u8], at: usize) -> Option<IpAddr> {
    Some(IpAddr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?))
}

/// Source and destination of a frame.
pub fn addresses(frame: &[u8]) -> (IpAddr, IpAddr) {
    match word(frame, 12) {
        Some(0x0800) => (v4(frame, 26).expect("whole"), v4(frame, 30).expect("whole")),
        _ => (v6(frame, 22).expect("whole"), v6(frame, 38).expect("whole")),
    }
}

/// (source, destination, protocol, what follows) of a network header and its extensions; the header's checksum holds.
fn network(ip: &[u8]) -> Result<(IpAddr, IpAddr, u8, &[u8]), String> {
    let cut = || "cut short".to_owned();
    match ip.first().map(|b| b >> 4) {
        Some(4) => {
            let length = usize::from(ip[0] & 15) * 4;
            let header = ip.get(..length).filter(|_| length >= 20).ok_or_else(cut)?;
            if sum(&[header]) != 0 {
                return Err(format!("checksum of the IPv4 header: {header:02x?}"));
            }
            if word(ip, 6).ok_or_else(cut)? & 0x3fff != 0 {
                return Err("a fragment".into());
            }
            let total = usize::from(word(ip, 2).ok_or_else(cut)?);
            let body = ip.get(length..total).ok_or_else(cut)?;
            Ok((v4(ip, 12).ok_or_else(cut)?, v4(ip, 16).ok_or_else(cut)?, ip[9], body))
        }
        Some(6) => {
            let total = 40 + usize::from(word(ip, 4).ok_or_else(cut)?);
            let (mut next, mut body) = (*ip.get(6).ok_or_else(cut)?, ip.get(40..total).ok_or_else(cut)?);
            while next == 60 || next == 0 || next == 43 {
                next = *body.first().ok_or_else(cut)?;
                body = body.get((usize::from(*body.get(1).ok_or_else(cut)?) + 1) * 8..).ok_or_else(cut)?;
            }
            Ok((v6(ip, 8).ok_or_else(cut)?, v6(ip, 24).ok_or_else(cut)?, next, body))
        }
        _ => Err("no IP".into()),
    }
}

/// A TCP or UDP packet, with all its checksums right.
pub fn read(frame: &[u8]) -> Result<Read, String> {
    let cut = || "cut short".to_owned();
    let (src, dst, proto, body) = network(frame.get(14..).ok_or_else(cut)?)?;
    let none = proto == UDP && word(body, 6) == Some(0);
    if !none && sum(&[&pseudo(src, dst, proto, body.len()), body]) != 0 {
        return Err(format!("checksum of protocol {proto} from {src} to {dst}"));
    }
    let start = match proto {
        TCP => usize::from(body.get(12).ok_or_else(cut)? >> 4) * 4,
        UDP => 8,
        other => return Err(format!("protocol {other}")),
    };
    let payload = body.get(start..).ok_or_else(cut)?.to_vec();
    Ok(Read { src, dst, sport: word(body, 0).ok_or_else(cut)?, dport: word(body, 2).ok_or_else(cut)?, payload })
}

/// A packet of a protocol that is neither TCP nor UDP, whose header these bytes are. Of IPv6 with so many extension headers.
pub fn other(frame: &Frame, body: &[u8]) -> Vec<u8> {
    frame.network(body, None)
}

/// An echo request, or its answer, and the same in two parts.
pub fn echo(frame: &Frame, request: bool, id: u16, payload: usize) -> (Vec<u8>, [Vec<u8>; 2]) {
    let kind = match (frame.src.is_ipv4(), request) {
        (true, true) => 8,
        (true, false) => 0,
        (false, true) => 128,
        (false, false) => 129,
    };
    let mut body = [&[kind, 0, 0, 0][..], &id.to_be_bytes(), &[0, 1]].concat();
    body.resize(8 + payload, 0x5a);
    let proto = if frame.src.is_ipv4() { 1 } else { 58 };
    let frame = Frame { proto, ..frame.clone() };
    let check = match frame.src {
        IpAddr::V4(_) => sum(&[&body]),
        IpAddr::V6(_) => sum(&[&pseudo(frame.src, frame.dst, proto, body.len()), &body]),
    };
    body[2..4].copy_from_slice(&check.to_be_bytes());
    let parts = [frame.network(&body[..16], Some((0, 1, id))), frame.network(&body[16..], Some((2, 0, id)))];
    (frame.network(&body, None), parts)
}

/// The identifier of an echo whose checksum holds.
pub fn read_echo(frame: &[u8]) -> Result<u16, String> {
    let cut = || "cut short".to_owned();
    let (src, dst, proto, body) = network(frame.get(14..).ok_or_else(cut)?)?;
    let check = match src {
        IpAddr::V4(_) => sum(&[body]),
        IpAddr::V6(_) => sum(&[&pseudo(src, dst, proto, body.len()), body]),
    };
    if check != 0 {
        return Err(format!("checksum of an echo: {frame:02x?}"));
    }
    word(body, 4).ok_or_else(cut)
}

/// Kind, code and the 32 bits that follow the checksum of an ICMP packet.
pub fn icmp_kind(frame: &[u8]) -> Option<(u8, u8, u32)> {
    let at = if word(frame, 12) == Some(0x0800) { 34 } else { 54 };
    let rest = frame.get(at + 4..at + 8)?;
    Some((frame[at], frame[at + 1], u32::from_be_bytes(rest.try_into().ok()?)))
}

/// "Port unreachable" about a packet, which is quoted whole.
pub fn icmp_error(src: IpAddr, dst: IpAddr, about: &[u8]) -> Vec<u8> {
    let (proto, kind, code) = if src.is_ipv4() { (1, 3, 3) } else { (58, 1, 4) };
    let mut body = vec![kind, code, 0, 0, 0, 0, 0, 0];
    body.extend(about);
    let check = match src {
        IpAddr::V4(_) => sum(&[&body]),
        IpAddr::V6(_) => sum(&[&pseudo(src, dst, proto, body.len()), &body]),
    };
    body[2..4].copy_from_slice(&check.to_be_bytes());
    Frame { src, dst, proto, ..Frame::default() }.network(&body, None)
}

/// (source, destination) of an ICMP error, and what it is about; its checksums hold, and that of the quoted IPv4 header.
pub fn read_icmp_error(frame: &[u8]) -> Result<((IpAddr, IpAddr), Read), String> {
    let cut = || "cut short".to_owned();
    let (src, dst, proto, body) = network(frame.get(14..).ok_or_else(cut)?)?;
    let check = match src {
        IpAddr::V4(_) => sum(&[body]),
        IpAddr::V6(_) => sum(&[&pseudo(src, dst, proto, body.len()), body]),
    };
    if check != 0 || !matches!((proto, body[0]), (1, 3) | (58, 1 | 2)) {
        return Err(format!("no ICMP error with a right checksum: {frame:02x?}"));
    }
    let quoted = &body[8..];
    let at = if src.is_ipv4() { usize::from(quoted[0] & 15) * 4 } else { 40 };
    if src.is_ipv4() && sum(&[&quoted[..at]]) != 0 {
        return Err("checksum of the quoted header".into());
    }
    let (from, to) = if src.is_ipv4() { (v4(quoted, 12), v4(quoted, 16)) } else { (v6(quoted, 8), v6(quoted, 24)) };
    let (from, to) = (from.ok_or_else(cut)?, to.ok_or_else(cut)?);
    let ports = (word(quoted, at).ok_or_else(cut)?, word(quoted, at + 2).ok_or_else(cut)?);
    Ok(((src, dst), Read { src: from, dst: to, sport: ports.0, dport: ports.1, payload: vec![] }))
}

const ASKER: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// Who has `target`? An ARP request or a neighbour solicitation.
pub fn solicitation(from: IpAddr, target: IpAddr) -> Vec<u8> {
    match target {
        IpAddr::V4(_) => {
            let mut frame = [&[0xff; 6][..], &ASKER, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &ASKER].concat();
            frame.extend(octets(from));
            frame.extend([0; 6]);
            frame.extend(octets(target));
            frame
        }
        IpAddr::V6(a) => {
            let [.., x, y, z] = a.octets();
            let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(x), u16::from_be_bytes([y, z]));
            let mut body = vec![135, 0, 0, 0, 0, 0, 0, 0];
            body.extend(octets(target));
            body.extend([1, 1]);
            body.extend(ASKER);
            let check = sum(&[&pseudo(from, to.into(), 58, body.len()), &body]);
            body[2..4].copy_from_slice(&check.to_be_bytes());
            let mut frame = Frame { src: from, dst: to.into(), proto: 58, ..Frame::default() }.network(&body, None);
            frame[..12].copy_from_slice(&[&[0x33, 0x33, 0xff, x, y, z][..], &ASKER].concat());
            frame[14 + 7] = 255;
            frame
        }
    }
}

/// (address, link-layer address, who is told) of an answer.
pub fn read_advertisement(frame: &[u8]) -> Result<(IpAddr, [u8; 6], IpAddr), String> {
    let cut = || "cut short".to_owned();
    let mac = |at: usize| frame.get(at..at + 6).and_then(|m| <[u8; 6]>::try_from(m).ok()).ok_or_else(cut);
    if mac(0)? != ASKER {
        return Err("not to the asker".into());
    }
    if word(frame, 12) == Some(0x0806) {
        if word(frame, 20) != Some(2) || mac(6)? != mac(22)? || mac(32)? != ASKER {
            return Err(format!("no ARP reply: {frame:02x?}"));
        }
        return Ok((v4(frame, 28).ok_or_else(cut)?, mac(22)?, v4(frame, 38).ok_or_else(cut)?));
    }
    let (src, dst, proto, body) = network(&frame[14..])?;
    if proto != 58 || frame[21] != 255 || body[0] != 136 || body[4] != 0x60 || body[24..26] != [2, 1] {
        return Err(format!("no advertisement: {frame:02x?}"));
    }
    if sum(&[&pseudo(src, dst, 58, body.len()), body]) != 0 || mac(6)? != mac(14 + 40 + 26)? {
        return Err(format!("checksum or link-layer address: {frame:02x?}"));
    }
    let target = v6(body, 8).ok_or_else(cut)?;
    if target == src { Ok((target, mac(6)?, dst)) } else { Err("the source is not the target".into()) }
}

/// SplitMix64: the same numbers in every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }
}
