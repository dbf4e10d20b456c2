//! The node agent: one per node. It keeps the kernel's data path true to the cluster's state, is the node's relay of
//! that state to sidecars, answers DNS, and, stand-alone, runs the node's pods.

pub mod attest;
mod blocking;
pub mod check;
pub mod cni_config;
pub mod datapath;
mod error;
mod file;
pub mod flows;
pub mod handover;
mod health;
pub mod identity;
mod memory;
pub mod network;
pub mod node;
pub mod pods;
pub mod relay;
mod replay;
pub mod run;
pub mod server;
mod sidecar;
pub mod socket;
pub mod uplink;
pub mod view;
