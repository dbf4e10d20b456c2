//! How long and how large what a client sends may be before it is refused. Numbers that operators may change are in
//! [`Limits`]; the others are constants, here or beside the code that keeps to them. `docs/protocols.md` lists them all.

use std::time::Duration;

/// Longest head of an HTTP/1 message, request line included, and longest header list of HTTP/2 (RFC 9113 §6.5.2): the
/// first travels in the second between sidecars. Larger than servers take by default (nginx 32 KiB, HAProxy and Node
/// 16 KiB, Envoy 60 KiB), so that the app decides, and small enough that 16,384 connections hold 1 GiB at worst.
pub const MAX_HEAD: usize = 64 * 1024;
/// Most headers of an HTTP/1 message: what the parser has room for without allocating. More are answered with 431.
pub const MAX_HEADERS: usize = 100; // the parser's own number, which tests hold it to

/// What a client's slowness may cost. HTTP/1 only: streams of HTTP/2 may rightly be silent for hours (gRPC), and hold
/// no connection of the app's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From the first byte of a request to the end of its head. Idle connections, which have sent no byte of a next
    /// request, are not meant.
    pub head: Duration,
    /// Between two pieces of a request's body while the upstream waits for more.
    pub body_idle: Duration,
    /// A gateway's client's connection, of either version, on which no request has come for this long is ended.
    pub idle: Duration,
}

impl Default for Limits {
    /// Heads as hyper and nginx (30 to 60 s); bodies as Envoy's idle streams; idle connections longer than the minute after
    /// which load balancers usually give theirs up, so that they do it first.
    fn default() -> Self {
        Self { head: Duration::from_secs(30), body_idle: Duration::from_secs(300), idle: Duration::from_secs(180) }
    }
}
