//! A pod, as the data plane knows it.

use crate::{Identity, Name};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    pub name: Name,
    /// The pod's UID: a new pod of the same name is another workload.
    pub uid: String,
    /// The node it is bound to.
    pub node: String,
    /// At most one per family; empty until the plugin has answered. Host-network pods carry none.
    pub addresses: Vec<IpAddr>,
    pub identity: Identity,
    /// A sidecar was injected: its TCP is captured and it is closed while no sidecar lives.
    pub meshed: bool,
    /// The gateway, of its namespace, whose listeners it serves: its program asks the node's agent as a sidecar does, and
    /// nothing of the pod is captured.
    #[serde(default)]
    pub gateway: Option<String>,
}

impl Workload {
    /// The whole name of the gateway that it serves.
    pub fn served(&self) -> Option<Name> {
        Some(Name::new(self.name.namespace.clone(), self.gateway.clone()?))
    }
}
