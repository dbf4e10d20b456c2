//! Routes of the Gateway API with a Service or a Gateway of ours as parent → routes, and what their statuses must say: PURE.
//!
//! A route that asks for something Sluice does not do is not accepted as a whole: half a route would send requests where
//! nobody wanted them. A backend that does not resolve keeps its share of the traffic, which is answered with an error,
//! as the Gateway API asks; the shares of the others do not grow.

use super::{
    Objects,
    filters::{self, At},
    gateways::{Attached, Gateways},
    name_of, port,
};
use crate::duration::parse_ms;
use gateway_api::{
    experimental::{
        grpcroutes::{
            GrpcRoute, GrpcRouteRules, GrpcRouteRulesMatches, GrpcRouteRulesMatchesHeadersType,
            GrpcRouteRulesMatchesMethodType,
        },
        httproutes::{
            HttpRoute, HttpRouteRules, HttpRouteRulesMatches, HttpRouteRulesMatchesHeadersType,
            HttpRouteRulesMatchesPathType, HttpRouteRulesMatchesQueryParamsType,
        },
        tcproutes::TcpRoute,
    },
    tlsroutes::TlsRoute,
};
use sluice_model as m;

/// Accepted and resolved, or a reason (CamelCase, of the Gateway API where it has one) and a sentence.
pub type Verdict = Result<(), Refused>;

/// Why not: a reason and a sentence.
pub type Refused = (&'static str, String);

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
    pub kind: ParentKind,
    pub name: String,
    pub namespace: Option<String>,
    pub section: Option<String>,
    pub port: Option<i32>,
    pub accepted: Verdict,
    pub resolved: Verdict,
    /// Name of the compiled route, where it is accepted.
    pub compiled: Option<m::Name>,
    /// Why nobody can come by it, although it is accepted.
    pub unserved: Option<String>,
    pub unmeshed: Unmeshed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParentKind {
    Service,
    Gateway,
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
    /// What the service's own namespace says: this is a route of consumers.
    Producer,
}

pub(super) fn routes(o: &Objects, gateways: &mut Gateways<'_>) -> (Vec<m::Route>, Vec<RouteStatus>) {
    let http = o.http_routes.values().map(|r| http(r, o));
    let grpc = o.grpc_routes.values().map(|r| grpc(r, o));
    let tls = o.tls_routes.values().map(|r| tls(r, o));
    let tcp = o.tcp_routes.values().map(|r| tcp(r, o));
    let compiled = http.chain(grpc).chain(tls).chain(tcp).flatten();
    let (routes, mut statuses): (Vec<_>, Vec<_>) = compiled.map(|c| attach(c, o, gateways)).unzip();
    let routes: Vec<m::Route> = routes.into_iter().flatten().collect();
    settle_unmeshed(&routes, &mut statuses);
    (routes, statuses)
}

/// Of several routes with a rule that takes everything the oldest counts for callers without a sidecar (as agents
/// compile it); the others say so.
fn settle_unmeshed(routes: &[m::Route], statuses: &mut [RouteStatus]) {
    let mut catching: Vec<&m::Route> =
        routes.iter().filter(|r| !r.of_consumer() && r.rules.iter().any(m::Rule::catch_all)).collect();
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
pub(super) struct Reference<'a> {
    pub group: Option<&'a str>,
    pub kind: Option<&'a str>,
    pub name: &'a str,
    pub namespace: Option<&'a str>,
    pub port: Option<i32>,
    /// Of a gateway: its listener.
    pub section: Option<&'a str>,
}

/// The generated types of the kinds of routes have the same fields and no trait for them.
macro_rules! reference {
    ($from:expr) => {
        Reference {
            group: $from.group.as_deref(),
            kind: $from.kind.as_deref(),
            name: &$from.name,
            namespace: $from.namespace.as_deref(),
            port: $from.port,
            section: None,
        }
    };
}

macro_rules! parents {
    ($spec:expr) => {{
        let all = $spec.parent_refs.iter().flatten();
        all.map(|p| Reference { section: p.section_name.as_deref(), ..reference!(p) }).collect()
    }};
}

struct Header<'a> {
    name: m::Name,
    kind: m::RouteKind,
    generation: i64,
    created_s: i64,
    /// Lower case; empty: every name.
    hosts: Vec<String>,
    parents: Vec<Reference<'a>>,
}

/// A route before it is known which of its parents take it.
struct Compiled<'a> {
    header: Header<'a>,
    rules: Result<Vec<m::Rule>, Refused>,
    resolved: Verdict,
}

fn header<'a>(
    meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    kind: m::RouteKind,
    hosts: &[String],
    parents: Vec<Reference<'a>>,
) -> Option<Header<'a>> {
    Some(Header {
        name: name_of(meta)?,
        kind,
        generation: meta.generation.unwrap_or(0),
        created_s: meta.creation_timestamp.as_ref().map_or(0, |t| t.0.as_second()),
        hosts: hosts.to_vec(),
        parents,
    })
}

fn http<'a>(r: &'a HttpRoute, o: &Objects) -> Option<Compiled<'a>> {
    let parents = parents!(r.spec);
    let hosts: Vec<String> = r.spec.hostnames.iter().flatten().map(|h| h.to_ascii_lowercase()).collect();
    let header = header(&r.metadata, m::RouteKind::Http, &hosts, parents)?;
    let mut resolved = Ok(());
    // The default of the API: one rule that takes everything and has no backend.
    let rules = r.spec.rules.as_deref().unwrap_or_default();
    let rules: Result<Vec<_>, _> =
        rules.iter().map(|rule| http_rule(rule, &hosts, &header, o, &mut resolved)).collect();
    Some(Compiled { header, rules, resolved })
}

fn tcp<'a>(r: &'a TcpRoute, o: &Objects) -> Option<Compiled<'a>> {
    let parents = parents!(r.spec);
    let header = header(&r.metadata, m::RouteKind::Tcp, &[], parents)?;
    let mut resolved = Ok(());
    let rules = r.spec.rules.iter().map(|rule| {
        let refs = rule.backend_refs.iter().map(|b| (reference!(b), b.weight, m::Filters::default()));
        m::Rule { backends: backends(refs, &header, o, &mut resolved), ..m::Rule::default() }
    });
    let rules = Ok(rules.collect());
    Some(Compiled { header, rules, resolved })
}

fn tls<'a>(r: &'a TlsRoute, o: &Objects) -> Option<Compiled<'a>> {
    let parents = parents!(r.spec);
    let hosts: Vec<String> = r.spec.hostnames.iter().map(|h| h.to_ascii_lowercase()).collect();
    let header = header(&r.metadata, m::RouteKind::Tls, &hosts, parents)?;
    let mut resolved = Ok(());
    let matches = vec![m::Match { hosts, ..m::Match::default() }];
    let rules = r.spec.rules.iter().map(|rule| {
        let refs = rule.backend_refs.iter().map(|b| (reference!(b), b.weight, m::Filters::default()));
        m::Rule { matches: matches.clone(), backends: backends(refs, &header, o, &mut resolved), ..m::Rule::default() }
    });
    let rules = Ok(rules.collect());
    Some(Compiled { header, rules, resolved })
}

fn grpc<'a>(r: &'a GrpcRoute, o: &Objects) -> Option<Compiled<'a>> {
    let parents = parents!(r.spec);
    let hosts: Vec<String> = r.spec.hostnames.iter().flatten().map(|h| h.to_ascii_lowercase()).collect();
    let header = header(&r.metadata, m::RouteKind::Grpc, &hosts, parents)?;
    let mut resolved = Ok(());
    let rules = r.spec.rules.as_deref().unwrap_or_default();
    let rules: Result<Vec<_>, _> =
        rules.iter().map(|rule| grpc_rule(rule, &hosts, &header, o, &mut resolved)).collect();
    Some(Compiled { header, rules, resolved })
}

/// The route under each parent that takes it, and the statuses.
fn attach(c: Compiled<'_>, o: &Objects, gateways: &mut Gateways<'_>) -> (Vec<m::Route>, RouteStatus) {
    let Compiled { header: h, rules, resolved } = c;
    let mut routes = vec![];
    let mut parents = vec![];
    for (i, p) in h.parents.iter().enumerate() {
        let name = compiled_name(&h, i);
        let Some((kind, taken)) = take(p, &h, &name, rules.is_ok(), (o, gateways)) else { continue };
        let accepted = rules.as_ref().map(|_| ()).map_err(Clone::clone).and(taken);
        let (mut compiled, mut unserved) = (None, None);
        let mut unmeshed = Unmeshed::Endpoints;
        if let (Ok(rules), Ok(())) = (&rules, &accepted) {
            compiled = Some(name.clone());
            let of_service = kind == ParentKind::Service;
            let parent = parent_name(p, &h);
            unserved = if of_service { None } else { gateways.unserved(&parent, &name) };
            let route = m::Route {
                name,
                kind: h.kind,
                parent: if of_service { parent } else { m::Gateway::parent(&parent) },
                parent_port: p.port.and_then(port).filter(|_| of_service),
                created_s: h.created_s,
                generation: h.generation,
                rules: rules.clone(),
            };
            unmeshed = match rules.iter().position(m::Rule::catch_all).filter(|_| of_service) {
                _ if of_service && route.of_consumer() => Unmeshed::Producer,
                Some(rule) => Unmeshed::Rule(rule),
                None => Unmeshed::Endpoints,
            };
            routes.push(route);
        }
        parents.push(ParentStatus {
            kind,
            name: p.name.to_owned(),
            namespace: p.namespace.map(str::to_owned),
            section: p.section.map(str::to_owned),
            port: p.port,
            accepted,
            resolved: resolved.clone(),
            compiled,
            unserved,
            unmeshed,
        });
    }
    (routes, RouteStatus { name: h.name, kind: h.kind, generation: h.generation, parents })
}

/// What the parent says of the route; `None` for parents that belong to other controllers, which are left alone. A route
/// whose rules are not `good` is attached to nothing.
fn take(
    p: &Reference<'_>,
    h: &Header<'_>,
    compiled: &m::Name,
    good: bool,
    (o, gateways): (&Objects, &mut Gateways<'_>),
) -> Option<(ParentKind, Verdict)> {
    const GROUP: &str = "gateway.networking.k8s.io";
    match (p.group.unwrap_or(GROUP), p.kind.unwrap_or("Gateway")) {
        ("", "Service") => Some((ParentKind::Service, parent(p, h, o))),
        (GROUP, "Gateway") => {
            let route = Attached { namespace: &h.name.namespace, kind: h.kind, hosts: &h.hosts };
            let verdict = if good { gateways.attach(p, &route, compiled, o) } else { gateways.takes(p, &route, o) };
            Some((ParentKind::Gateway, verdict?))
        }
        _ => None,
    }
}

fn parent_name(p: &Reference<'_>, h: &Header<'_>) -> m::Name {
    m::Name::new(p.namespace.unwrap_or(&h.name.namespace), p.name)
}

/// A service of another namespace will do: the route is for that service's callers in the route's own (GEP-1426).
fn parent(p: &Reference<'_>, h: &Header<'_>, o: &Objects) -> Verdict {
    let name = parent_name(p, h);
    let Some(service) = o.services.get(&name) else {
        return Err(("NoMatchingParent", format!("service {name} does not exist")));
    };
    let has = |n: i32| service.spec.iter().flat_map(|s| s.ports.iter().flatten()).any(|x| x.port == n);
    match p.port {
        Some(n) if !has(n) => Err(("NoMatchingParent", format!("service {name} has no port {n}"))),
        _ => Ok(()),
    }
}

pub(super) fn unsupported(what: &str) -> Refused {
    ("UnsupportedValue", format!("{what}: this version of Sluice does not do that; remove it from the route"))
}

fn http_rule(
    r: &HttpRouteRules,
    hosts: &[String],
    route: &Header<'_>,
    o: &Objects,
    resolved: &mut Verdict,
) -> Result<m::Rule, Refused> {
    let at = |field| At { field, route: &route.name, kind: route.kind, objects: o };
    let mut rule = m::Rule::default();
    filters::of_rule(r.filters.as_deref(), &at("rules.filters"), &mut rule, resolved)?;
    let mut refs = vec![];
    for b in r.backend_refs.iter().flatten() {
        let filters = filters::of_backend(b.filters.as_deref(), &at("rules.backendRefs.filters"), resolved)?;
        refs.push((reference!(b), b.weight, filters));
    }
    rule.backends = backends(refs.into_iter(), route, o, resolved);
    if let Some(t) = &r.timeouts {
        rule.timeouts.request_ms = timeout("rules.timeouts.request", t.request.as_deref())?;
        rule.timeouts.backend_request_ms = timeout("rules.timeouts.backendRequest", t.backend_request.as_deref())?;
    }
    if let Some(r) = &r.retry {
        let code = |c: &i64| u16::try_from(*c).ok().filter(|c| (400..600).contains(c));
        let backoff_ms =
            r.backoff.as_deref().map(|text| parse_ms(text).ok_or_else(|| wrong("rules.retry.backoff", text)));
        rule.retry = Some(m::Retry {
            codes: r.codes.iter().flatten().filter_map(code).collect(),
            attempts: r.attempts.and_then(|n| u32::try_from(n).ok()),
            backoff_ms: backoff_ms.transpose()?,
        });
    }
    if let Some(s) = &r.session_persistence {
        let kind = s.r#type.as_ref().map(|t| format!("{t:?}"));
        rule.sticky = Some(sticky(s.session_name.as_deref(), kind.as_deref(), route)?);
    }
    let given = r.matches.as_deref().unwrap_or_default();
    rule.matches = given.iter().map(|x| http_match(x, hosts)).collect::<Result<Vec<_>, _>>()?;
    if rule.matches.is_empty() && !hosts.is_empty() {
        rule.matches.push(m::Match { hosts: hosts.to_vec(), ..m::Match::default() });
    }
    Ok(rule)
}

fn grpc_rule(
    r: &GrpcRouteRules,
    hosts: &[String],
    route: &Header<'_>,
    o: &Objects,
    resolved: &mut Verdict,
) -> Result<m::Rule, Refused> {
    let at = |field| At { field, route: &route.name, kind: route.kind, objects: o };
    let mut rule = m::Rule::default();
    filters::of_rule(r.filters.as_deref(), &at("rules.filters"), &mut rule, resolved)?;
    let mut refs = vec![];
    for b in r.backend_refs.iter().flatten() {
        let filters = filters::of_backend(b.filters.as_deref(), &at("rules.backendRefs.filters"), resolved)?;
        refs.push((reference!(b), b.weight, filters));
    }
    rule.backends = backends(refs.into_iter(), route, o, resolved);
    if let Some(s) = &r.session_persistence {
        let kind = s.r#type.as_ref().map(|t| format!("{t:?}"));
        rule.sticky = Some(sticky(s.session_name.as_deref(), kind.as_deref(), route)?);
    }
    let given = r.matches.as_deref().unwrap_or_default();
    rule.matches = given.iter().map(|x| grpc_match(x, hosts)).collect::<Result<Vec<_>, _>>()?;
    if rule.matches.is_empty() && !hosts.is_empty() {
        rule.matches.push(m::Match { hosts: hosts.to_vec(), ..m::Match::default() });
    }
    Ok(rule)
}

fn wrong(field: &str, text: &str) -> Refused {
    ("UnsupportedValue", format!("{field}: {text:?} is no duration such as 10s or 500ms"))
}

/// `0s` asks for no limit (GEP-1742).
fn timeout(field: &str, text: Option<&str>) -> Result<Option<u64>, Refused> {
    let Some(text) = text else { return Ok(None) };
    parse_ms(text).map(|ms| Some(ms).filter(|ms| *ms > 0)).ok_or_else(|| wrong(field, text))
}

/// By a cookie where nothing else is said (GEP-1619); its name is the route's where none is given.
fn sticky(name: Option<&str>, kind: Option<&str>, route: &Header<'_>) -> Result<m::Sticky, Refused> {
    match (kind, name) {
        (None | Some("Cookie"), Some(name)) => Ok(m::Sticky::Cookie(name.to_owned())),
        (None | Some("Cookie"), None) => Ok(m::Sticky::Cookie(format!("sluice-{}", route.name.name))),
        (Some("Header"), Some(name)) => Ok(m::Sticky::Header(name.to_ascii_lowercase())),
        _ => Err(("UnsupportedValue", "rules.sessionPersistence: a header needs its sessionName".into())),
    }
}

fn pattern(field: &str, text: &str) -> Result<m::Pattern, Refused> {
    text.parse().map_err(|e| ("UnsupportedValue", format!("{field}: {e}")))
}

/// A gRPC method as the path it travels as (`/service/method`).
fn grpc_match(x: &GrpcRouteRulesMatches, hosts: &[String]) -> Result<m::Match, Refused> {
    let mut headers: Vec<m::HeaderMatch> = vec![];
    for h in x.headers.iter().flatten() {
        let regex = h.r#type == Some(GrpcRouteRulesMatchesHeadersType::RegularExpression);
        add_header(&mut headers, &h.name, &h.value, regex)?;
    }
    let method = x.method.clone().unwrap_or_default();
    let (service, name) = (method.service.as_deref(), method.method.as_deref());
    let path = if method.r#type == Some(GrpcRouteRulesMatchesMethodType::RegularExpression) {
        let text = format!("/(?:{})/(?:{})", service.unwrap_or("[^/]+"), name.unwrap_or("[^/]+"));
        m::PathMatch::Regex(pattern("matches.method", &text)?)
    } else {
        match (service, name) {
            (None, None) => m::PathMatch::default(),
            (Some(service), None) => m::PathMatch::Prefix(format!("/{service}")),
            (Some(service), Some(name)) => m::PathMatch::Exact(format!("/{service}/{name}")),
            (None, Some(name)) => {
                let name: String = name
                    .chars()
                    .flat_map(|c| if c.is_alphanumeric() || c == '_' { vec![c] } else { vec!['\\', c] })
                    .collect();
                m::PathMatch::Regex(pattern("matches.method", &format!("/[^/]+/{name}"))?)
            }
        }
    };
    Ok(m::Match { hosts: hosts.to_vec(), path, headers, ..m::Match::default() })
}

/// Only the first of equal names counts (Gateway API, HTTPHeaderMatch.name).
fn add_header(headers: &mut Vec<m::HeaderMatch>, name: &str, value: &str, regex: bool) -> Result<(), Refused> {
    let name = name.to_ascii_lowercase();
    if !headers.iter().any(|k| k.name == name) {
        headers.push(m::HeaderMatch { name, value: string_match("matches.headers", value, regex)? });
    }
    Ok(())
}

fn string_match(field: &str, value: &str, regex: bool) -> Result<m::StringMatch, Refused> {
    Ok(match regex {
        true => m::StringMatch::Regex(pattern(field, value)?),
        false => m::StringMatch::Exact(value.to_owned()),
    })
}

fn http_match(x: &HttpRouteRulesMatches, hosts: &[String]) -> Result<m::Match, Refused> {
    let mut headers = vec![];
    for h in x.headers.iter().flatten() {
        let regex = h.r#type == Some(HttpRouteRulesMatchesHeadersType::RegularExpression);
        add_header(&mut headers, &h.name, &h.value, regex)?;
    }
    let mut query: Vec<m::QueryMatch> = vec![];
    for q in x.query_params.iter().flatten() {
        let regex = q.r#type == Some(HttpRouteRulesMatchesQueryParamsType::RegularExpression);
        if !query.iter().any(|k| k.name == q.name) {
            let value = string_match("matches.queryParams", &q.value, regex)?;
            query.push(m::QueryMatch { name: q.name.clone(), value });
        }
    }
    let value = x.path.as_ref().and_then(|p| p.value.clone()).unwrap_or_else(|| "/".to_owned());
    let path = match x.path.as_ref().and_then(|p| p.r#type.as_ref()) {
        Some(HttpRouteRulesMatchesPathType::Exact) => m::PathMatch::Exact(value),
        Some(HttpRouteRulesMatchesPathType::RegularExpression) => m::PathMatch::Regex(pattern("matches.path", &value)?),
        _ => m::PathMatch::Prefix(value),
    };
    let method = x.method.as_ref().map(|m| format!("{m:?}").to_ascii_uppercase());
    Ok(m::Match { hosts: hosts.to_vec(), path, method, headers, query })
}

fn backends<'a>(
    refs: impl Iterator<Item = (Reference<'a>, Option<i32>, m::Filters)>,
    route: &Header<'_>,
    o: &Objects,
    resolved: &mut Verdict,
) -> Vec<m::Backend> {
    refs.map(|(b, weight, filters)| {
        let weight = weight.and_then(|w| u32::try_from(w).ok()).unwrap_or(1);
        match backend(&b, &route.name, route.kind, o) {
            Ok((service, port)) => m::Backend { service, port, weight, filters },
            Err(wrong) => {
                if resolved.is_ok() {
                    *resolved = Err(wrong);
                }
                // A name no service can have: its share of the traffic is answered with an error.
                let service = m::Name::new(route.name.namespace.clone(), format!("{}:unresolved", b.name));
                m::Backend { service, port: 1, weight, filters }
            }
        }
    })
    .collect()
}

/// The kind as a ReferenceGrant names it.
pub(super) fn kind_name(kind: m::RouteKind) -> &'static str {
    match kind {
        m::RouteKind::Http => "HTTPRoute",
        m::RouteKind::Grpc => "GRPCRoute",
        m::RouteKind::Tls => "TLSRoute",
        m::RouteKind::Tcp => "TCPRoute",
    }
}

/// Whether some ReferenceGrant in the namespace of `to`, a `to_kind` of the core group, lets objects of the Gateway API of
/// this kind in this namespace name it.
pub(super) fn granted(o: &Objects, (kind, from): (&str, &str), to_kind: &str, to: &m::Name) -> bool {
    let start = m::Name::new(to.namespace.clone(), "");
    let own = o.grants.range(start..).take_while(|(n, _)| n.namespace == to.namespace);
    own.map(|(_, g)| &g.spec).any(|g| {
        let from =
            g.from.iter().any(|f| f.group == "gateway.networking.k8s.io" && f.kind == kind && f.namespace == from);
        let named = |n: &Option<String>| n.as_ref().is_none_or(|n| *n == to.name);
        from && g.to.iter().any(|t| t.group.is_empty() && t.kind == to_kind && named(&t.name))
    })
}

pub(super) fn backend(
    b: &Reference<'_>,
    route: &m::Name,
    route_kind: m::RouteKind,
    o: &Objects,
) -> Result<(m::Name, u16), Refused> {
    if b.kind.unwrap_or("Service") != "Service" || !b.group.unwrap_or_default().is_empty() {
        return Err((
            "InvalidKind",
            format!("backend {} is of kind {}; only services can be backends", b.name, b.kind.unwrap_or_default()),
        ));
    }
    let name = m::Name::new(b.namespace.unwrap_or(&route.namespace), b.name);
    if name.namespace != route.namespace && !granted(o, (kind_name(route_kind), &route.namespace), "Service", &name) {
        let text = format!(
            "backend {name} is in another namespace, and no ReferenceGrant there lets a {} of {} name it",
            kind_name(route_kind),
            route.namespace
        );
        return Err(("RefNotPermitted", text));
    }
    let Some(service) = o.services.get(&name) else {
        return Err(("BackendNotFound", format!("backend service {name} does not exist")));
    };
    let Some(port) = b.port.and_then(port) else {
        return Err(("UnsupportedValue", format!("backend service {name}: spec.rules.backendRefs.port is required")));
    };
    let has = service.spec.iter().flat_map(|s| s.ports.iter().flatten()).any(|p| p.port == i32::from(port));
    if has { Ok((name, port)) } else { Err(("BackendNotFound", format!("backend service {name} has no port {port}"))) }
}
