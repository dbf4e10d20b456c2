//! What a meshed workload accepts on its inbound side.

use crate::Name;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum InboundMode {
    /// mTLS from meshed peers, plain from the others.
    #[default]
    Permissive,
    /// mTLS only; plain is refused.
    Strict,
}

/// Inbound policy of one workload; it carries the workload's own name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    pub name: Name,
    pub mode: InboundMode,
    /// TCP ports that reach the app without passing the sidecar, also while no sidecar lives.
    #[serde(default)]
    pub excluded_ports: Vec<u16>,
    /// TCP ports whose bytes are never read as HTTP.
    #[serde(default)]
    pub opaque_ports: Vec<u16>,
}
