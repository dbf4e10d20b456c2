//! A machine of the cluster, as other machines need to know it.

use crate::Name;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Where a node is reached and which pod addresses live behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// In no namespace.
    pub name: Name,
    /// Underlay addresses, at most one per family, the first preferred.
    pub addresses: Vec<IpAddr>,
    /// Pod ranges in CIDR notation (`10.244.1.0/24`), at most one per family.
    pub pod_cidrs: Vec<String>,
    /// `topology.kubernetes.io/zone`; empty when it has none.
    #[serde(default)]
    pub zone: String,
    /// The node's lease is live and its agent reports ready.
    pub ready: bool,
}
