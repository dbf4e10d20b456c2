//! The node agent: one per node. It keeps the kernel's data path true to the cluster's state, is the node's relay of
//! that state to sidecars, answers DNS, and, stand-alone, runs the node's pods.

pub mod identity;
pub mod node;
pub mod pods;
pub mod relay;
pub mod server;
pub mod uplink;
pub mod view;
