//! The sidecars of a table of cases, a client that speaks in frames, and how a case is played and judged.

use crate::{apps::App, common::*, frames::*};
use sluice_model::AppProtocol;
use sluice_proxy::run::{Listen, Running};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// Where a client connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    Known,
    Detected,
    Inbound,
}

pub struct Ground {
    pub entry: Entry,
    pub running: Running,
    pub app: App,
}

impl Ground {
    pub fn new(entry: Entry) -> Self {
        let app = App::start();
        let protocol = if entry == Entry::Known { AppProtocol::Http2 } else { AppProtocol::Detect };
        let mut settings = settings(service("web", "10.96.0.1", protocol, &[app.address]));
        if entry == Entry::Inbound {
            settings.listen = Listen::At { outbound: vec![], inbound: vec![(LOCAL, app.address)] };
        }
        let running = Running::start(settings).expect("the sidecar starts");
        Self { entry, running, app }
    }

    pub fn all() -> [Self; 3] {
        [Entry::Known, Entry::Detected, Entry::Inbound].map(Self::new)
    }

    pub fn address(&self) -> SocketAddr {
        let listening = if self.entry == Entry::Inbound { &self.running.inbound } else { &self.running.outbound };
        listening[0]
    }

    /// A connection that has sent nothing.
    pub fn connect(&self) -> Conn<TcpStream> {
        Conn::new(TcpStream::connect(self.address()).expect("connect"))
    }

    /// A connection after the exchange of settings.
    pub fn client(&self) -> Conn<TcpStream> {
        let mut client = self.connect();
        client.begin();
        client
    }

    pub fn stop(self) {
        self.running.stop();
    }
}

/// A connection of frames.
pub struct Conn<S> {
    stream: S,
    buffer: Vec<u8>,
}

impl Conn<TcpStream> {
    fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).expect("nodelay");
        Self::over(stream.try_clone().expect("clone"), &stream)
    }
}

/// How long a frame is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

impl<S: Read + Write> Conn<S> {
    pub fn over(stream: S, tcp: &TcpStream) -> Self {
        tcp.set_read_timeout(Some(PATIENCE)).expect("timeout");
        // A peer that neither reads nor closes must not hold up the test.
        tcp.set_write_timeout(Some(PATIENCE / 5)).expect("timeout");
        Self { stream, buffer: Vec::new() }
    }

    /// Preface and settings: a table of size 0, so that answers can be read one by one.
    pub fn begin(&mut self) {
        self.send([PREFACE, &frame(SETTINGS, 0, 0, setting(1, 0))].concat());
        assert_eq!(self.next().map(|f| f.kind), Some(SETTINGS));
        self.send(frame(SETTINGS, ACK, 0, []));
        self.until("the acknowledgement", |f| f.kind == SETTINGS && f.flags == ACK);
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).expect("send");
    }

    /// The other side may have closed already.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        self.stream.write_all(bytes.as_ref()).and_then(|()| self.stream.flush())
    }

    /// The next frame; `None` at the end.
    pub fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some((frame, length)) = parse(&self.buffer) {
                self.buffer.drain(..length);
                return Some(frame);
            }
            let mut part = [0; 16 * 1024];
            match self.stream.read(&mut part) {
                Ok(0) => return None,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => panic!("nothing came, and no end either"),
                Err(_) => return None,
                Ok(n) => self.buffer.extend_from_slice(&part[..n]),
            }
        }
    }

    pub fn until(&mut self, what: &str, wanted: impl Fn(&Frame) -> bool) -> Frame {
        loop {
            match self.next() {
                Some(frame) if wanted(&frame) => return frame,
                Some(frame) if frame.kind == GOAWAY => panic!("{what}: GOAWAY {}", frame.code()),
                Some(_) => {}
                None => panic!("{what}: the connection ended"),
            }
        }
    }

    /// The code with which a stream, or the whole connection, was ended; `None` for an answer.
    pub fn refused(&mut self, stream: u32) -> Option<u32> {
        let ends = |f: &Frame| f.kind == GOAWAY || f.stream == stream && matches!(f.kind, HEADERS | RST_STREAM);
        let frame = std::iter::from_fn(|| self.next()).find(ends).expect("an end");
        (frame.kind != HEADERS).then(|| frame.code())
    }

    /// The answer's head on a stream, or its reset.
    pub fn next_of(&mut self, stream: u32) -> Frame {
        self.until("an end", |f| f.stream == stream && matches!(f.kind, HEADERS | RST_STREAM))
    }

    /// The status of the answer on a stream, and why the sidecar made it.
    pub fn status(&mut self, stream: u32) -> (u16, String) {
        let frame = self.next_of(stream);
        assert_eq!(frame.kind, HEADERS, "an answer, not a reset");
        let headers = decode(&frame.payload);
        let value = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
        let status = value(":status").expect("a status").parse().expect("a number");
        (status, value("x-sluice-reason").unwrap_or_else(|| "none".into()))
    }

    /// Whether a PING is answered, past whatever else comes.
    pub fn alive(&mut self) -> bool {
        if self.try_send(frame(PING, 0, 0, b"are you?")).is_err() {
            return false;
        }
        while let Some(frame) = self.next() {
            if frame.kind == PING && frame.flags == ACK && frame.payload == b"are you?" {
                return true;
            }
            if frame.kind == GOAWAY {
                return false;
            }
        }
        false
    }

    pub fn ended(&mut self) -> bool {
        while self.next().is_some() {}
        true
    }
}

/// What must come of the frames of a case.
#[derive(Clone, Debug)]
pub enum Want {
    /// GOAWAY with one of these codes, and the end.
    Connection(&'static [u32]),
    /// Stream 1 is reset with one of these codes, or the connection ends as above: RFC 9113 §5.4.2 lets an endpoint do
    /// that to a peer that it does not trust. The app saw nothing.
    Stream(&'static [u32]),
    /// As before, but stream 1 was whole already and may be served.
    OneOf(&'static [u32]),
    /// Stream 1 is answered with this by the sidecar, the app saw nothing, and the connection lives.
    Refused(u16, &'static str),
    /// One of the last two, with whatever code or status of a client's error.
    AnyRefusal,
    /// Stream 1 is answered by the app, which saw this many requests, and the connection lives.
    Served(usize),
    /// Stream 1 is answered by the app, and then the connection ends.
    ServedLast,
    /// Nothing but life.
    Ignored,
}

pub struct Case {
    pub section: &'static str,
    pub name: &'static str,
    pub frames: Vec<u8>,
    pub want: Want,
}

pub fn case(section: &'static str, name: &'static str, frames: impl AsRef<[u8]>, want: Want) -> Case {
    Case { section, name, frames: frames.as_ref().to_vec(), want }
}

/// What came of a case.
#[derive(Debug)]
enum Outcome {
    Goaway(u32),
    Reset(u32),
    Answer(u16, String),
    Alive,
    End,
}

impl Case {
    fn judge(&self, ground: &Ground) -> Result<(), String> {
        ground.app.take();
        let mut client = ground.client();
        let _ = client.try_send(&self.frames);
        let outcome = self.outcome(&mut client);
        let fits = match (&self.want, &outcome) {
            (Want::Connection(codes) | Want::Stream(codes) | Want::OneOf(codes), Outcome::Goaway(code)) => {
                codes.contains(code) && client.ended()
            }
            (Want::Stream(codes) | Want::OneOf(codes), Outcome::Reset(code)) => codes.contains(code),
            (Want::Refused(status, reason), Outcome::Answer(s, r)) => status == s && reason == r && client.alive(),
            (Want::AnyRefusal, Outcome::Reset(PROTOCOL_ERROR)) => client.alive(),
            (Want::AnyRefusal, Outcome::Answer(400, _)) => client.alive(),
            (Want::Served(_), Outcome::Answer(200, reason)) => reason == "none" && client.alive(),
            (Want::ServedLast, Outcome::Answer(200, reason)) => reason == "none" && client.ended(),
            (Want::Ignored, Outcome::Alive) => true,
            _ => false,
        };
        let seen = ground.app.take();
        let fits_app = match self.want {
            Want::Served(n) => seen.len() == n,
            Want::Stream(_) | Want::Refused(..) | Want::AnyRefusal => seen.is_empty(),
            // What came before on the connection may have been served.
            Want::Connection(_) | Want::OneOf(_) | Want::Ignored | Want::ServedLast => true,
        };
        if fits && fits_app { Ok(()) } else { Err(format!("{:?} wanted, {outcome:?} got, seen {seen:?}", self.want)) }
    }

    fn outcome(&self, client: &mut Conn<TcpStream>) -> Outcome {
        // Answers to this come after those to the frames before, or show that there are none.
        if matches!(self.want, Want::Connection(_) | Want::Stream(_) | Want::OneOf(_) | Want::Ignored) {
            let _ = client.try_send(frame(PING, 0, 0, b"the last"));
        }
        while let Some(f) = client.next() {
            match f.kind {
                GOAWAY => return Outcome::Goaway(f.code()),
                RST_STREAM if f.stream == 1 => return Outcome::Reset(f.code()),
                HEADERS
                    if f.stream == 1 && !matches!(self.want, Want::Connection(_) | Want::OneOf(_) | Want::Ignored) =>
                {
                    let headers = decode(&f.payload);
                    let value = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
                    let status = value(":status").and_then(|s| s.parse().ok()).unwrap_or(0);
                    return Outcome::Answer(status, value("x-sluice-reason").unwrap_or("none").into());
                }
                PING if f.payload == b"the last" && !matches!(self.want, Want::Stream(_) | Want::OneOf(_)) => {
                    return Outcome::Alive;
                }
                _ => {}
            }
        }
        Outcome::End
    }
}

/// Plays every case at each entry; one failure hides no other.
pub fn play(cases: &[Case]) {
    let mut failures = Vec::new();
    for ground in Ground::all() {
        for case in cases {
            let judged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| case.judge(&ground)));
            if let Err(error) = judged.unwrap_or_else(|_| Err("panicked".to_owned())) {
                failures.push(format!("{:?}: §{} {}: {error}", ground.entry, case.section, case.name));
            }
        }
        // Whatever came, others are served.
        let mut client = ground.client();
        client.send(get(1));
        assert_eq!(client.status(1), (200, "none".to_owned()));
        ground.stop();
    }
    assert!(failures.is_empty(), "{} of the cases:\n{}", failures.len(), failures.join("\n"));
}
