//! The data plane's nouns and nothing else: what a workload, a service, a set of endpoints, a route, a policy,
//! an identity and a node are, and the immutable [`Snapshot`] that holds them.
//!
//! PURE: no async, no clock, no socket, no global, no randomness. Control compiles objects into these types, the
//! discovery protocol carries them, agents and sidecars turn them into map entries and routing tables.

mod backend_policy;
mod filter;
mod gateway;
mod identity;
mod name;
mod node;
mod pattern;
mod policy;
mod range;
mod resource;
mod route;
mod service;
mod snapshot;
mod workload;

pub use backend_policy::{BackendPolicy, Balance, Circuit, HashKey, Locality, Outlier, RetryBudget};
pub use filter::{
    Fault, Filters, Fraction, HeaderChanges, Mirror, PathChange, RateLimit, Redirect, Retry, Rewrite, Sticky, Timeouts,
};
pub use gateway::{Certificate, Gateway, Listener, ListenerMode, Secret, common_host};
pub use identity::{Identity, IdentityError};
pub use name::{Name, NameError, Revision};
pub use node::Node;
pub use pattern::{Pattern, PatternError};
pub use policy::{AccessRule, Action, Caller, InboundLimit, InboundMode, Operation, Policy};
pub use range::{SourceRange, SourceRangeError};
pub use resource::{Kind, Resource, ResourceKey};
pub use route::{Backend, HeaderMatch, Match, PathMatch, QueryMatch, Route, RouteKind, Rule, StringMatch};
pub use service::{
    Announcement, AppProtocol, Distribution, Endpoint, EndpointPort, EndpointSet, ExternalPolicy, InternalPolicy, Mesh,
    Place, Protocol, Service, ServicePort,
};
pub use snapshot::{Delta, Snapshot};
pub use workload::Workload;
