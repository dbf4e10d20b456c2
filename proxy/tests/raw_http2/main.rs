//! HTTP/2 frame by frame: the musts of RFC 9113 and RFC 7541 in the order in which h2spec groups them, and the floods that
//! have brought servers down, through a real sidecar's outbound side (a port known to be HTTP/2, and one where it is
//! detected), its inbound side, and its side for other sidecars, where requests leave as HTTP/1.1. Nothing here uses an
//! HTTP/2 library on the client's end.

#[path = "../common/mod.rs"]
mod common;

mod apps;
mod floods;
mod frames;
mod ground;
mod headers;
mod hpack;
mod layers;
mod mesh;
mod streams;
