//! The node-local resolver: service names from the snapshot (kubernetes/dns specification 1.1.0: A and AAAA of services
//! and of headless services' endpoints, PTR of both), everything else forwarded and cached.
//!
//! `message`, `zone`, `resolve` and `cache` are PURE; `server` owns the sockets.

pub mod cache;
pub mod message;
pub mod resolve;
pub mod server;
pub mod zone;
