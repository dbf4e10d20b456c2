//! The data plane's nouns and nothing else: what a workload, a service, a set of endpoints, a route, a policy,
//! an identity and a node are, and the immutable [`Snapshot`] that holds them.
//!
//! PURE: no async, no clock, no socket, no global, no randomness. Control compiles objects into these types, the
//! discovery protocol carries them, agents and sidecars turn them into map entries and routing tables.

mod identity;
mod name;
mod node;
mod policy;
mod range;
mod resource;
mod route;
mod service;
mod snapshot;
mod workload;

pub use identity::{Identity, IdentityError};
pub use name::{Name, NameError, Revision};
pub use node::Node;
pub use policy::{InboundMode, Policy};
pub use range::{SourceRange, SourceRangeError};
pub use resource::{Kind, Resource, ResourceKey};
pub use route::{Backend, HeaderMatch, Match, PathMatch, Route, RouteKind, Rule, StringMatch};
pub use service::{
    Announcement, AppProtocol, Distribution, Endpoint, EndpointPort, EndpointSet, ExternalPolicy, InternalPolicy, Mesh,
    Place, Protocol, Service, ServicePort,
};
pub use snapshot::{Delta, Snapshot};
pub use workload::Workload;
