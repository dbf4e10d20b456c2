//! Which node a pod goes to. PURE: the cluster as it is seen is a value, placing a pod changes the value, and the caller
//! makes it so in the store.
//!
//! Filters say which nodes can take a pod at all, with kube-scheduler's reasons; scores prefer nodes with more left and
//! nodes that hold fewer pods of the same owner. A pod is never placed where it does not fit.

mod cluster;
mod filter;
mod resources;

pub use cluster::{Cluster, NodeInfo, PodInfo};
pub(crate) use filter::tolerates;
pub use filter::unavailable_message;
pub use resources::{Resources, pod_requests};
