//! The feed: objects are compiled into snapshots, each node's agent gets the differences on one stream, and what agents
//! and sidecars acknowledge comes back into the routes' statuses.
//!
//! One immutable snapshot is shared by all streams; a stream holds a cursor (what it sent last) and a scope (the node).

mod counters;
mod feed;
mod scope;
mod server;
mod status;
mod tracker;
mod traffic;

pub use counters::Counters;
pub use feed::{Published, run as run_feed};
pub use server::{Server, Shared};
pub use status::run as run_status;
pub use tracker::{HolderState, NodeState, Programmed, Tracker};
pub use traffic::Traffic;
