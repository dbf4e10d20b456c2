//! Filters of routes: PURE. Those of a rule and of a backend, of HTTPRoute and of GRPCRoute, are types of their own in the
//! generated code, with the same JSON: it is read here once for all of them.

use super::{
    Objects, policies, port,
    routes::{Reference, backend, unsupported},
};
use serde::{Deserialize, Serialize};
use sluice_model as m;

type Refused = (&'static str, String);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Filter {
    r#type: String,
    request_header_modifier: Option<Modifier>,
    response_header_modifier: Option<Modifier>,
    request_redirect: Option<Redirect>,
    url_rewrite: Option<UrlRewrite>,
    request_mirror: Option<RequestMirror>,
    extension_ref: Option<ExtensionRef>,
}

#[derive(Deserialize)]
struct Modifier {
    #[serde(default)]
    set: Vec<Header>,
    #[serde(default)]
    add: Vec<Header>,
    #[serde(default)]
    remove: Vec<String>,
}

#[derive(Deserialize)]
struct Header {
    name: String,
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Redirect {
    scheme: Option<String>,
    hostname: Option<String>,
    port: Option<i32>,
    path: Option<Path>,
    status_code: Option<u16>,
}

#[derive(Deserialize)]
struct UrlRewrite {
    hostname: Option<String>,
    path: Option<Path>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Path {
    replace_full_path: Option<String>,
    replace_prefix_match: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RequestMirror {
    backend_ref: BackendRef,
    percent: Option<u32>,
    fraction: Option<Fraction>,
}

#[derive(Deserialize)]
struct BackendRef {
    group: Option<String>,
    kind: Option<String>,
    name: String,
    namespace: Option<String>,
    port: Option<i32>,
}

#[derive(Deserialize)]
struct Fraction {
    numerator: u32,
    denominator: Option<u32>,
}

#[derive(Deserialize)]
struct ExtensionRef {
    group: String,
    kind: String,
    name: String,
}

/// Where filters stand, for messages and for what they may name.
pub(super) struct At<'a> {
    pub field: &'a str,
    pub route: &'a m::Name,
    pub kind: m::RouteKind,
    pub objects: &'a Objects,
}

/// Reads `filters` into `rule`'s own; a backend's are read by [`of_backend`]. A mirror that does not resolve is left out,
/// and `resolved` says why.
pub(super) fn of_rule<F: Serialize>(
    filters: Option<&[F]>,
    at: &At<'_>,
    rule: &mut m::Rule,
    resolved: &mut super::Verdict,
) -> Result<(), Refused> {
    for filter in read(filters, at)? {
        if filter.r#type == "ExtensionRef" {
            extension(filter.extension_ref.as_ref(), at, rule)?;
            continue;
        }
        add(filter, at, &mut rule.filters, resolved)?;
    }
    if rule.filters.redirect.is_some() && rule.filters.rewrite.is_some() {
        let text = format!("{}: a rule either redirects or rewrites", at.field);
        return Err(("IncompatibleFilters", text));
    }
    Ok(())
}

/// Filters of one backend.
pub(super) fn of_backend<F: Serialize>(
    filters: Option<&[F]>,
    at: &At<'_>,
    resolved: &mut super::Verdict,
) -> Result<m::Filters, Refused> {
    let mut into = m::Filters::default();
    for filter in read(filters, at)? {
        if matches!(filter.r#type.as_str(), "RequestRedirect" | "RequestMirror" | "ExtensionRef") {
            return Err(unsupported(&format!("{} {}", at.field, filter.r#type)));
        }
        add(filter, at, &mut into, resolved)?;
    }
    Ok(into)
}

fn read<F: Serialize>(filters: Option<&[F]>, at: &At<'_>) -> Result<Vec<Filter>, Refused> {
    let Some(filters) = filters.filter(|f| !f.is_empty()) else { return Ok(vec![]) };
    let value = serde_json::to_value(filters).and_then(serde_json::from_value);
    value.map_err(|e| ("UnsupportedValue", format!("{}: {e}", at.field)))
}

fn add(f: Filter, at: &At<'_>, into: &mut m::Filters, resolved: &mut super::Verdict) -> Result<(), Refused> {
    let missing =
        |what: &str| ("UnsupportedValue", format!("{}: a filter of type {} needs {what}", at.field, f.r#type));
    match f.r#type.as_str() {
        "RequestHeaderModifier" => {
            let changes = f.request_header_modifier.as_ref().ok_or_else(|| missing("requestHeaderModifier"))?;
            into.request_headers = changes.to_model();
        }
        "ResponseHeaderModifier" => {
            let changes = f.response_header_modifier.as_ref().ok_or_else(|| missing("responseHeaderModifier"))?;
            into.response_headers = changes.to_model();
        }
        "RequestRedirect" if at.kind == m::RouteKind::Http => {
            let redirect = f.request_redirect.as_ref().ok_or_else(|| missing("requestRedirect"))?;
            into.redirect = Some(m::Redirect {
                scheme: redirect.scheme.clone(),
                host: redirect.hostname.clone(),
                port: redirect.port.and_then(port),
                path: redirect.path.as_ref().and_then(Path::to_model),
                status: redirect.status_code.unwrap_or(302),
            });
        }
        "URLRewrite" if at.kind == m::RouteKind::Http => {
            let rewrite = f.url_rewrite.as_ref().ok_or_else(|| missing("urlRewrite"))?;
            let path = rewrite.path.as_ref().and_then(Path::to_model);
            into.rewrite = Some(m::Rewrite { host: rewrite.hostname.clone(), path });
        }
        "RequestMirror" => {
            let mirror = f.request_mirror.as_ref().ok_or_else(|| missing("requestMirror"))?;
            match backend(&mirror.backend_ref.reference(), at.route, at.kind, at.objects) {
                Ok((service, port)) => into.mirrors.push(m::Mirror { service, port, share: mirror.share(at)? }),
                Err(why) if resolved.is_ok() => *resolved = Err(why),
                Err(_) => {}
            }
        }
        other => return Err(unsupported(&format!("{} {other}", at.field))),
    }
    Ok(())
}

fn extension(reference: Option<&ExtensionRef>, at: &At<'_>, rule: &mut m::Rule) -> Result<(), Refused> {
    let Some(r) = reference.filter(|r| r.group == crate::own::GROUP && r.kind == "RouteFilter") else {
        let text = format!("{}: an ExtensionRef must be a RouteFilter of {}", at.field, crate::own::GROUP);
        return Err(("UnsupportedValue", text));
    };
    let name = m::Name::new(at.route.namespace.clone(), r.name.clone());
    let Some(filter) = at.objects.route_filters.get(&name) else {
        // Without it the rule would do something else than was asked for.
        return Err(("FilterNotFound", format!("{}: RouteFilter {name} does not exist", at.field)));
    };
    policies::route_filter(&filter.spec, rule)
        .map_err(|(field, why)| ("UnsupportedValue", format!("RouteFilter {name}: {field}: {why}")))
}

impl Modifier {
    fn to_model(&self) -> m::HeaderChanges {
        let pair = |h: &Header| (h.name.to_ascii_lowercase(), h.value.clone());
        m::HeaderChanges {
            set: self.set.iter().map(pair).collect(),
            add: self.add.iter().map(pair).collect(),
            remove: self.remove.iter().map(|n| n.to_ascii_lowercase()).collect(),
        }
    }
}

impl Path {
    fn to_model(&self) -> Option<m::PathChange> {
        let full = self.replace_full_path.clone().map(m::PathChange::Full);
        full.or_else(|| self.replace_prefix_match.clone().map(m::PathChange::Prefix))
    }
}

impl RequestMirror {
    fn share(&self, at: &At<'_>) -> Result<m::Fraction, Refused> {
        let share = match (self.percent, &self.fraction) {
            (Some(percent), _) => m::Fraction::new(percent, 100),
            (None, Some(f)) => m::Fraction::new(f.numerator, f.denominator.unwrap_or(100)),
            (None, None) => Some(m::Fraction::ALL),
        };
        share.ok_or_else(|| ("UnsupportedValue", format!("{}: a mirror's denominator is 0", at.field)))
    }
}

impl BackendRef {
    fn reference(&self) -> Reference<'_> {
        Reference {
            group: self.group.as_deref(),
            kind: self.kind.as_deref(),
            name: &self.name,
            namespace: self.namespace.as_deref(),
            port: self.port,
            section: None,
        }
    }
}
