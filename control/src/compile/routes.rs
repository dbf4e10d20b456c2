//! HTTPRoute and TCPRoute with a Service as parent → routes, and what their statuses must say: PURE.
//!
//! A route that asks for something Sluice does not do is not accepted as a whole: half a route would send requests where
//! nobody wanted them. A backend that does not resolve keeps its share of the traffic, which is answered with an error,
//! as the Gateway API asks; the shares of the others do not grow.

use super::{Objects, name_of, port};
use gateway_api::{
    experimental::tcproutes::TcpRoute,
    httproutes::{
        HttpRoute, HttpRouteRules, HttpRouteRulesMatches, HttpRouteRulesMatchesHeadersType,
        HttpRouteRulesMatchesPathType,
    },
};
use sluice_model as m;

/// Accepted and resolved, or a reason (CamelCase, of the Gateway API where it has one) and a sentence.
pub type Verdict = Result<(), (&'static str, String)>;

/// What a route's status says besides whether it is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteStatus {
    pub name: m::Name,
    pub kind: m::RouteKind,
    pub generation: i64,
    pub parents: Vec<ParentStatus>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentStatus {
    /// The parent as the route names it.
    pub service: String,
    pub namespace: Option<String>,
    pub port: Option<i32>,
    pub accepted: Verdict,
    pub resolved: Verdict,
    /// Name of the compiled route, where it is accepted.
    pub compiled: Option<m::Name>,
    pub unmeshed: Unmeshed,
}

/// What callers without a sidecar follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unmeshed {
    /// The weights of this rule, by its index.
    Rule(usize),
    /// Those of an older route.
    Older(m::Name),
    /// The service's own endpoints: no rule takes every request.
    Endpoints,
}

pub(super) fn routes(o: &Objects) -> (Vec<m::Route>, Vec<RouteStatus>) {
    let http = o.http_routes.values().map(|r| http(r, o));
    let tcp = o.tcp_routes.values().map(|r| tcp(r, o));
    let (routes, mut statuses): (Vec<_>, Vec<_>) = http.chain(tcp).flatten().unzip();
    let routes: Vec<m::Route> = routes.into_iter().flatten().collect();
    settle_unmeshed(&routes, &mut statuses);
    (routes, statuses)
}

/// Of several routes with a rule that takes everything the oldest counts for callers without a sidecar (as agents
/// compile it); the others say so.
fn settle_unmeshed(routes: &[m::Route], statuses: &mut [RouteStatus]) {
    let mut catching: Vec<&m::Route> = routes.iter().filter(|r| r.rules.iter().any(m::Rule::catch_all)).collect();
    catching.sort_by_key(|r| (r.created_s, &r.name));
    let rank = |name: &m::Name| catching.iter().position(|r| r.name == *name);
    for p in statuses.iter_mut().flat_map(|s| &mut s.parents) {
        let Some(at) = p.compiled.as_ref().and_then(rank) else { continue };
        let own = catching[at];
        let ports = |a: Option<u16>, b: Option<u16>| a.is_none() || b.is_none() || a == b;
        let older = catching[..at].iter().find(|r| r.parent == own.parent && ports(r.parent_port, own.parent_port));
        if let Some(older) = older {
            p.unmeshed = Unmeshed::Older(older.name.clone());
        }
    }
}

/// A compiled route's name: the object's for an HTTPRoute under its first parent. `/` is in no object's name, so no two
/// of them collide.
fn compiled_name(h: &Header<'_>, parent: usize) -> m::Name {
    let kind = match h.kind {
        m::RouteKind::Http => "",
        m::RouteKind::Grpc => "/grpc",
        m::RouteKind::Tls => "/tls",
        m::RouteKind::Tcp => "/tcp",
    };
    let place = if parent == 0 { String::new() } else { format!("/{parent}") };
    m::Name::new(h.name.namespace.clone(), format!("{}{kind}{place}", h.name.name))
}

/// A parent or a backend as a route names it.
struct Reference<'a> {
    group: Option<&'a str>,
    kind: Option<&'a str>,
    name: &'a str,
    namespace: Option<&'a str>,
    port: Option<i32>,
}

/// The generated types of HTTPRoute and TCPRoute have the same fields and no trait for them.
macro_rules! reference {
    ($from:expr) => {
        Reference {
            group: $from.group.as_deref(),
            kind: $from.kind.as_deref(),
            name: &$from.name,
            namespace: $from.namespace.as_deref(),
            port: $from.port,
        }
    };
}

struct Header<'a> {
    name: m::Name,
    kind: m::RouteKind,
    generation: i64,
    created_s: i64,
    parents: Vec<Reference<'a>>,
}

fn header<'a>(
    meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    kind: m::RouteKind,
    parents: Vec<Reference<'a>>,
) -> Option<Header<'a>> {
    Some(Header {
        name: name_of(meta)?,
        kind,
        generation: meta.generation.unwrap_or(0),
        created_s: meta.creation_timestamp.as_ref().map_or(0, |t| t.0.as_second()),
        parents,
    })
}

fn http(r: &HttpRoute, o: &Objects) -> Option<(Vec<m::Route>, RouteStatus)> {
    let parents = r.spec.parent_refs.iter().flatten().map(|p| reference!(p)).collect();
    let header = header(&r.metadata, m::RouteKind::Http, parents)?;
    let hosts: Vec<String> = r.spec.hostnames.iter().flatten().map(|h| h.to_ascii_lowercase()).collect();
    let mut resolved = Ok(());
    // The default of the API: one rule that takes everything and has no backend.
    let rules = r.spec.rules.as_deref().unwrap_or_default();
    let rules: Result<Vec<_>, _> =
        rules.iter().map(|rule| http_rule(rule, &hosts, &header.name, o, &mut resolved)).collect();
    Some(attach(header, rules, resolved, o))
}

fn tcp(r: &TcpRoute, o: &Objects) -> Option<(Vec<m::Route>, RouteStatus)> {
    let parents = r.spec.parent_refs.iter().flatten().map(|p| reference!(p)).collect();
    let header = header(&r.metadata, m::RouteKind::Tcp, parents)?;
    let mut resolved = Ok(());
    let rules = r.spec.rules.iter().map(|rule| {
        let refs = rule.backend_refs.iter().map(|b| (reference!(b), b.weight));
        m::Rule { backends: backends(refs, &header.name, o, &mut resolved), ..m::Rule::default() }
    });
    let rules = Ok(rules.collect());
    Some(attach(header, rules, resolved, o))
}

/// The route under each parent that takes it, and the statuses.
fn attach(
    h: Header<'_>,
    rules: Result<Vec<m::Rule>, (&'static str, String)>,
    resolved: Verdict,
    o: &Objects,
) -> (Vec<m::Route>, RouteStatus) {
    let mut routes = vec![];
    let mut parents = vec![];
    for (i, p) in h.parents.iter().enumerate().filter(|(_, p)| of_service(p)) {
        let accepted = rules.as_ref().map(|_| ()).map_err(Clone::clone).and_then(|()| parent(p, &h, o));
        let mut compiled = None;
        let mut unmeshed = Unmeshed::Endpoints;
        if let (Ok(rules), Ok(())) = (&rules, &accepted) {
            let name = compiled_name(&h, i);
            compiled = Some(name.clone());
            unmeshed = rules.iter().position(m::Rule::catch_all).map_or(Unmeshed::Endpoints, Unmeshed::Rule);
            routes.push(m::Route {
                name,
                kind: h.kind,
                parent: m::Name::new(h.name.namespace.clone(), p.name),
                parent_port: p.port.and_then(port),
                created_s: h.created_s,
                generation: h.generation,
                rules: rules.clone(),
            });
        }
        parents.push(ParentStatus {
            service: p.name.to_owned(),
            namespace: p.namespace.map(str::to_owned),
            port: p.port,
            accepted,
            resolved: resolved.clone(),
            compiled,
            unmeshed,
        });
    }
    (routes, RouteStatus { name: h.name, kind: h.kind, generation: h.generation, parents })
}

/// Parents of other kinds (gateways) belong to other controllers: they are left alone.
fn of_service(p: &Reference<'_>) -> bool {
    p.kind == Some("Service") && p.group.unwrap_or("gateway.networking.k8s.io").is_empty()
}

fn parent(p: &Reference<'_>, h: &Header<'_>, o: &Objects) -> Verdict {
    if p.namespace.is_some_and(|n| n != h.name.namespace) {
        let text =
            format!("service {} is in another namespace than the route; only its own namespace's routes apply", p.name);
        return Err(("NotAllowedByParent", text));
    }
    let name = m::Name::new(h.name.namespace.clone(), p.name);
    let Some(service) = o.services.get(&name) else {
        return Err(("NoMatchingParent", format!("service {name} does not exist")));
    };
    let has = |n: i32| service.spec.iter().flat_map(|s| s.ports.iter().flatten()).any(|x| x.port == n);
    match p.port {
        Some(n) if !has(n) => Err(("NoMatchingParent", format!("service {name} has no port {n}"))),
        _ => Ok(()),
    }
}

fn unsupported(what: &str) -> (&'static str, String) {
    ("UnsupportedValue", format!("{what}: this version of Sluice does not do that; remove it from the route"))
}

fn http_rule(
    r: &HttpRouteRules,
    hosts: &[String],
    route: &m::Name,
    o: &Objects,
    resolved: &mut Verdict,
) -> Result<m::Rule, (&'static str, String)> {
    if r.filters.as_ref().is_some_and(|f| !f.is_empty()) {
        return Err(unsupported("rules.filters"));
    }
    if r.timeouts.is_some() {
        return Err(unsupported("rules.timeouts"));
    }
    let refs = r.backend_refs.as_deref().unwrap_or_default();
    if refs.iter().any(|b| b.filters.as_ref().is_some_and(|f| !f.is_empty())) {
        return Err(unsupported("rules.backendRefs.filters"));
    }
    let refs = refs.iter().map(|b| (reference!(b), b.weight));
    let backends = backends(refs, route, o, resolved);
    let given = r.matches.as_deref().unwrap_or_default();
    let mut matches = given.iter().map(|x| http_match(x, hosts)).collect::<Result<Vec<_>, _>>()?;
    if matches.is_empty() && !hosts.is_empty() {
        matches.push(m::Match { hosts: hosts.to_vec(), ..m::Match::default() });
    }
    Ok(m::Rule { matches, backends, ..m::Rule::default() })
}

fn http_match(x: &HttpRouteRulesMatches, hosts: &[String]) -> Result<m::Match, (&'static str, String)> {
    if x.query_params.as_ref().is_some_and(|q| !q.is_empty()) {
        return Err(unsupported("matches.queryParams"));
    }
    let mut headers = vec![];
    for h in x.headers.iter().flatten() {
        if h.r#type == Some(HttpRouteRulesMatchesHeadersType::RegularExpression) {
            return Err(unsupported("matches.headers.type RegularExpression"));
        }
        let name = h.name.to_ascii_lowercase();
        // Only the first of equal names counts (Gateway API, HTTPHeaderMatch.name).
        if !headers.iter().any(|k: &m::HeaderMatch| k.name == name) {
            headers.push(m::HeaderMatch { name, value: m::StringMatch::Exact(h.value.clone()) });
        }
    }
    let value = x.path.as_ref().and_then(|p| p.value.clone()).unwrap_or_else(|| "/".to_owned());
    let path = match x.path.as_ref().and_then(|p| p.r#type.as_ref()) {
        Some(HttpRouteRulesMatchesPathType::Exact) => m::PathMatch::Exact(value),
        Some(HttpRouteRulesMatchesPathType::RegularExpression) => {
            return Err(unsupported("matches.path.type RegularExpression"));
        }
        _ => m::PathMatch::Prefix(value),
    };
    let method = x.method.as_ref().map(|m| format!("{m:?}").to_ascii_uppercase());
    Ok(m::Match { hosts: hosts.to_vec(), path, method, headers, ..m::Match::default() })
}

fn backends<'a>(
    refs: impl Iterator<Item = (Reference<'a>, Option<i32>)>,
    route: &m::Name,
    o: &Objects,
    resolved: &mut Verdict,
) -> Vec<m::Backend> {
    refs.map(|(b, weight)| {
        let weight = weight.and_then(|w| u32::try_from(w).ok()).unwrap_or(1);
        match backend(&b, route, o) {
            Ok((service, port)) => m::Backend { service, port, weight, ..m::Backend::default() },
            Err(wrong) => {
                if resolved.is_ok() {
                    *resolved = Err(wrong);
                }
                // A name no service can have: its share of the traffic is answered with an error.
                let name = format!("{}:unresolved", b.name);
                let service = m::Name::new(route.namespace.clone(), name);
                m::Backend { service, port: 1, weight, ..m::Backend::default() }
            }
        }
    })
    .collect()
}

fn backend(b: &Reference<'_>, route: &m::Name, o: &Objects) -> Result<(m::Name, u16), (&'static str, String)> {
    if b.kind.unwrap_or("Service") != "Service" || !b.group.unwrap_or_default().is_empty() {
        return Err((
            "InvalidKind",
            format!("backend {} is of kind {}; only services can be backends", b.name, b.kind.unwrap_or_default()),
        ));
    }
    if b.namespace.is_some_and(|n| n != route.namespace) {
        return Err((
            "RefNotPermitted",
            format!("backend {} is in another namespace, which no ReferenceGrant permits", b.name),
        ));
    }
    let name = m::Name::new(route.namespace.clone(), b.name);
    let Some(service) = o.services.get(&name) else {
        return Err(("BackendNotFound", format!("backend service {name} does not exist")));
    };
    let Some(port) = b.port.and_then(port) else {
        return Err(("UnsupportedValue", format!("backend service {name}: spec.rules.backendRefs.port is required")));
    };
    let has = service.spec.iter().flat_map(|s| s.ports.iter().flatten()).any(|p| p.port == i32::from(port));
    if has { Ok((name, port)) } else { Err(("BackendNotFound", format!("backend service {name} has no port {port}"))) }
}
