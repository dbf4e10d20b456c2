//! The CNI plugin's parts. The plugin alone writes leases; the agent uses [`store`] to read them and to take the lock
//! that both share.
//!
//! [`spec`], [`config`], [`result`], [`ipam`] and [`bandwidth`] are pure. [`command`] is the verbs, each safe to
//! repeat. [`wiring`] acts on links and maps, [`packets`] puts programs on links, `garbage` takes away what is left of them. No runtime, no threads but the
//! ones that enter a namespace: a process lives for one verb.

pub mod bandwidth;
pub mod command;
pub mod config;
mod error;
mod garbage;
pub mod ipam;
pub mod loopback;
pub mod packets;
pub mod result;
pub mod spec;
pub mod store;
pub mod wiring;

pub use error::Error;
pub use store::{Lease, PodRef, Store};

/// Where leases are kept unless the configuration says otherwise.
pub const STATE_DIR: &str = "/var/lib/sluice/cni";
/// Name of the agent's network configuration in the runtime's folder.
pub const CONFLIST: &str = "10-sluice.conflist";
/// Where the BPF file system is mounted unless the configuration says otherwise.
pub const BPFFS: &str = "/sys/fs/bpf";
