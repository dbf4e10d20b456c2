//! What a meshed workload accepts on its inbound side.

use crate::{Identity, Name, PathMatch, RateLimit};
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    pub name: Name,
    pub mode: InboundMode,
    /// TCP ports that reach the app without passing the sidecar, also while no sidecar lives.
    #[serde(default)]
    pub excluded_ports: Vec<u16>,
    /// TCP ports whose bytes are never read as HTTP.
    #[serde(default)]
    pub opaque_ports: Vec<u16>,
    /// Who may call what. Deny beats allow; with any [`Action::Allow`] that is not only audited, what none of them allows
    /// is denied. Empty: everybody may call everything.
    #[serde(default)]
    pub access: Vec<AccessRule>,
    /// All that match must have room.
    #[serde(default)]
    pub rate_limits: Vec<InboundLimit>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Action {
    Allow,
    Deny,
}

/// A rule of an `AccessPolicy` that selects the workload: it speaks of requests from any of `from` for any of `to`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessRule {
    /// The object it is of, for logs and counters.
    pub policy: Name,
    pub action: Action,
    /// What it would do is logged and counted, and not done.
    #[serde(default)]
    pub audit: bool,
    /// Empty: everybody.
    #[serde(default)]
    pub from: Vec<Caller>,
    /// Empty: everything.
    #[serde(default)]
    pub to: Vec<Operation>,
}

/// All parts that are given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// Proven by mTLS.
    #[serde(default)]
    pub identity: Option<Identity>,
    /// Of the proven identity.
    #[serde(default)]
    pub namespace: Option<String>,
}

impl Caller {
    /// Whether it is who called; without mTLS nobody in particular did.
    pub fn is(&self, caller: Option<&Identity>) -> bool {
        self.identity.as_ref().is_none_or(|i| caller == Some(i))
            && self.namespace.as_ref().is_none_or(|n| caller.is_some_and(|c| c.namespace == *n))
    }
}

/// All parts that are given must hold. Methods and paths hold of no connection whose bytes are not HTTP.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Any of these; upper case.
    #[serde(default)]
    pub methods: Vec<String>,
    /// Any of these.
    #[serde(default)]
    pub paths: Vec<PathMatch>,
    /// Any of these: the app's own ports.
    #[serde(default)]
    pub ports: Vec<u16>,
}

/// A limit on what reaches the app by one sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InboundLimit {
    /// The object it is of.
    pub policy: Name,
    #[serde(default)]
    pub from: Vec<Caller>,
    #[serde(default)]
    pub to: Vec<Operation>,
    pub limit: RateLimit,
    /// Each caller has a bucket of its own; callers without a proven identity share one.
    #[serde(default)]
    pub per_identity: bool,
}
