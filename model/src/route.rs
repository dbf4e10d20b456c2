//! How traffic to a service is divided: matches and weighted backends (Gateway API, a Service as parent: GEP-1426).

use crate::{Fault, Filters, Name, Pattern, RateLimit, Retry, Sticky, Timeouts};
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RouteKind {
    Http,
    /// HTTP, with a service and a method instead of a path.
    Grpc,
    /// TLS that passes through: connections by the server's name that they ask for.
    Tls,
    Tcp,
}

impl RouteKind {
    /// Its rules look at requests, not at connections.
    pub fn of_requests(self) -> bool {
        matches!(self, Self::Http | Self::Grpc)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    pub name: Name,
    /// Not called `kind` in the file form: that names the kind of resource there.
    #[serde(rename = "routeKind")]
    pub kind: RouteKind,
    /// The service whose traffic this route takes.
    pub parent: Name,
    /// Only this port of the parent; all ports when absent.
    #[serde(default)]
    pub parent_port: Option<u16>,
    /// Creation time in seconds since 1970: of two equal matches the older route wins (Gateway API precedence).
    pub created_s: i64,
    /// `metadata.generation` of the object this was compiled from.
    pub generation: i64,
    pub rules: Vec<Rule>,
}

impl Route {
    /// For callers of its own namespace alone: its parent is in another one (a consumer route, GEP-1426).
    pub fn of_consumer(&self) -> bool {
        self.name.namespace != self.parent.namespace
    }

    /// Whether it takes traffic to this port of this service.
    pub fn attached(&self, service: &Name, port: u16) -> bool {
        self.parent == *service && self.parent_port.is_none_or(|p| p == port)
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Any of these; empty means every request.
    #[serde(default)]
    pub matches: Vec<Match>,
    /// Empty: requests that match are answered 500 (HTTP) or refused (TCP), as the Gateway API asks.
    pub backends: Vec<Backend>,
    #[serde(default)]
    pub filters: Filters,
    #[serde(default)]
    pub timeouts: Timeouts,
    #[serde(default)]
    pub retry: Option<Retry>,
    /// A user stays with the version that took its first request. Raising a version's share never moves a user back.
    #[serde(default)]
    pub sticky: Option<Sticky>,
    #[serde(default)]
    pub fault: Fault,
    /// Of each worker that uses the route.
    #[serde(default)]
    pub rate_limit: Option<RateLimit>,
    /// Requests with a larger body are answered 413.
    #[serde(default)]
    pub max_body_bytes: Option<u64>,
}

impl Rule {
    /// Takes every request, and connections that are not HTTP: path prefix `/` and nothing else asked. A redirect is an
    /// answer to requests; connections cannot follow it.
    pub fn catch_all(&self) -> bool {
        let all = self.matches.is_empty() || self.matches.iter().any(Match::catch_all);
        all && self.filters.redirect.is_none()
    }
}

/// All parts must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Match {
    /// `Host` names without port; empty means any. A leading `*.` matches one or more labels.
    #[serde(default)]
    pub hosts: Vec<String>,
    #[serde(default)]
    pub path: PathMatch,
    /// Upper case, exact.
    #[serde(default)]
    pub method: Option<String>,
    #[serde(default)]
    pub headers: Vec<HeaderMatch>,
    #[serde(default)]
    pub query: Vec<QueryMatch>,
}

impl Match {
    pub fn catch_all(&self) -> bool {
        let whole = self.hosts.is_empty() && self.path.is_any() && self.method.is_none();
        whole && self.headers.is_empty() && self.query.is_empty()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PathMatch {
    Exact(String),
    /// Whole path elements: `/foo` takes `/foo` and `/foo/bar`, not `/foobar`.
    Prefix(String),
    Regex(Pattern),
}

impl PathMatch {
    pub fn is_any(&self) -> bool {
        matches!(self, Self::Prefix(p) if p == "/")
    }
}

impl Default for PathMatch {
    fn default() -> Self {
        Self::Prefix("/".to_owned())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderMatch {
    /// Lower case.
    pub name: String,
    pub value: StringMatch,
}

/// A parameter of the query, by its exact name; of several of that name the first counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueryMatch {
    pub name: String,
    pub value: StringMatch,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StringMatch {
    Exact(String),
    Regex(Pattern),
}

/// A service port and its share of the traffic: `weight` over the sum of the rule's weights.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Backend {
    pub service: Name,
    pub port: u16,
    /// 0 stops new requests, streams and connections at once.
    pub weight: u32,
    /// After the rule's own. Redirects of backends are not known to Gateway API.
    #[serde(default)]
    pub filters: Filters,
}
