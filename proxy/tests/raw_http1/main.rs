//! HTTP/1 byte by byte: what clients and backends may send, well-formed and not, through a real sidecar's outbound side
//! (a port that is known to be HTTP, and one where it is detected) and its inbound side, to a backend that keeps every
//! byte. Whatever comes, the sidecar answers or closes, and a backend sees the requests that it was meant to see.

#[path = "../common/mod.rs"]
mod common;

mod answers;
mod framing;
mod ground;
mod heads;
mod messages;
mod pace;
mod recorder;
mod targets;
mod turns;
