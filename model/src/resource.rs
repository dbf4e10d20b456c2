//! One of the things that discovery carries, and its key.

use crate::{EndpointSet, Gateway, Name, Node, Policy, Route, Service, Workload};
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    Service,
    EndpointSet,
    Route,
    Policy,
    Workload,
    Node,
    Gateway,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ResourceKey {
    pub kind: Kind,
    pub name: Name,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind")]
pub enum Resource {
    Service(Service),
    EndpointSet(EndpointSet),
    Route(Route),
    Policy(Policy),
    Workload(Workload),
    Node(Node),
    Gateway(Gateway),
}

impl Resource {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Service(_) => Kind::Service,
            Self::EndpointSet(_) => Kind::EndpointSet,
            Self::Route(_) => Kind::Route,
            Self::Policy(_) => Kind::Policy,
            Self::Workload(_) => Kind::Workload,
            Self::Node(_) => Kind::Node,
            Self::Gateway(_) => Kind::Gateway,
        }
    }

    pub fn name(&self) -> &Name {
        match self {
            Self::Service(r) => &r.name,
            Self::EndpointSet(r) => &r.name,
            Self::Route(r) => &r.name,
            Self::Policy(r) => &r.name,
            Self::Workload(r) => &r.name,
            Self::Node(r) => &r.name,
            Self::Gateway(r) => &r.name,
        }
    }

    pub fn key(&self) -> ResourceKey {
        ResourceKey { kind: self.kind(), name: self.name().clone() }
    }
}
