//! What a rule's filters make of a request's head and of its answer's: PURE. Gateway API's HTTPHeaderFilter, HTTPURLRewrite
//! and HTTPRequestRedirect; values that are no header or no target are left out, control having refused them already.

use http::{
    HeaderMap, HeaderName, HeaderValue, Uri, header,
    uri::{Authority, PathAndQuery, Scheme},
};
use sluice_model::{HeaderChanges, Match, PathChange, PathMatch, Redirect, Rewrite};
use sluice_traffic::route::path_matches;

/// Header changes with names and values parsed once.
#[derive(Debug, Default)]
pub struct Changes {
    set: Vec<(HeaderName, HeaderValue)>,
    add: Vec<(HeaderName, HeaderValue)>,
    remove: Vec<HeaderName>,
}

/// These frame a message or belong to its connection; a rule that could change them could smuggle.
const OURS: [HeaderName; 5] =
    [header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::CONNECTION, header::UPGRADE, header::TE];

impl Changes {
    pub fn parse(changes: &HeaderChanges) -> Self {
        let name = |n: &str| n.parse::<HeaderName>().ok().filter(|n| !OURS.contains(n));
        let pair = |(n, v): &(String, String)| Some((name(n)?, v.parse::<HeaderValue>().ok()?));
        Self {
            set: changes.set.iter().filter_map(pair).collect(),
            add: changes.add.iter().filter_map(pair).collect(),
            // Without `Host` a request has no place to go.
            remove: changes.remove.iter().filter_map(|n| name(n)).filter(|n| n != header::HOST).collect(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }

    pub fn apply(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name.clone(), value.clone());
        }
        for name in &self.remove {
            headers.remove(name);
        }
    }
}

/// The longest prefix by which `matches` take `path`; the root where they look at no prefix.
fn matched_prefix<'a>(matches: &'a [Match], path: &str) -> &'a str {
    let prefixes = matches.iter().filter(|m| path_matches(&m.path, path)).filter_map(|m| match &m.path {
        PathMatch::Prefix(p) => Some(p.as_str()),
        _ => None,
    });
    prefixes.max_by_key(|p| p.len()).unwrap_or("/")
}

/// `path` after `change`, for a rule with these matches.
fn changed_path(change: &PathChange, path: &str, matches: &[Match]) -> String {
    let path = match change {
        PathChange::Full(full) => full.clone(),
        PathChange::Prefix(replacement) => {
            let prefix = matched_prefix(matches, path).trim_end_matches('/');
            let rest = path.strip_prefix(prefix).unwrap_or(path);
            match (replacement.trim_end_matches('/'), rest) {
                // `/foo` becomes exactly the replacement, its last slash included.
                (_, "") => replacement.clone(),
                (replacement, rest) => format!("{replacement}{rest}"),
            }
        }
    };
    if path.starts_with('/') { path } else { format!("/{path}") }
}

fn with_query(path: String, query: Option<&str>) -> String {
    match query {
        Some(query) => format!("{path}?{query}"),
        None => path,
    }
}

/// Gives the request another path and host.
pub fn rewrite(rewrite: &Rewrite, matches: &[Match], uri: &mut Uri, headers: &mut HeaderMap) {
    let mut parts = std::mem::take(uri).into_parts();
    if let Some(change) = &rewrite.path {
        let old = parts.path_and_query.take().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let new = with_query(changed_path(change, old.path(), matches), old.query());
        parts.path_and_query = Some(PathAndQuery::try_from(new).unwrap_or(old));
    }
    if let Some(host) = rewrite.host.as_deref() {
        if let (Some(_), Ok(authority)) = (&parts.authority, Authority::try_from(host)) {
            parts.authority = Some(authority);
        }
        if let (true, Ok(value)) = (headers.contains_key(header::HOST) || parts.authority.is_none(), host.parse()) {
            headers.insert(header::HOST, value);
        }
    }
    *uri = Uri::from_parts(parts).unwrap_or_default();
}

/// Where a redirect leads: `host` is what was asked for, `port` the one that was dialled.
pub fn location(
    redirect: &Redirect,
    matches: &[Match],
    scheme: &Scheme,
    host: &str,
    port: u16,
    uri: &Uri,
) -> Option<HeaderValue> {
    let scheme = redirect.scheme.as_deref().unwrap_or(scheme.as_str());
    let well_known = if scheme == "https" { 443 } else { 80 };
    // Gateway API, HTTPRequestRedirectFilter.port.
    let port = redirect.port.unwrap_or(if redirect.scheme.is_some() { well_known } else { port });
    let host = redirect.host.as_deref().unwrap_or(host);
    let port = if port == well_known { String::new() } else { format!(":{port}") };
    let path = match &redirect.path {
        Some(change) => changed_path(change, uri.path(), matches),
        None => uri.path().to_owned(),
    };
    format!("{scheme}://{host}{port}{}", with_query(path, uri.query())).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(p: &str) -> Vec<Match> {
        vec![Match { path: PathMatch::Prefix(p.into()), ..Match::default() }]
    }

    #[test]
    fn prefixes_are_replaced_as_gateway_api_says() {
        // The table of HTTPPathModifier.replacePrefixMatch.
        let table = [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/a/b", "/", "/x", "/x/a/b"),
        ];
        for (path, matched, replacement, wanted) in table {
            let got = changed_path(&PathChange::Prefix(replacement.into()), path, &prefix(matched));
            assert_eq!(got, wanted, "{path} by {matched} with {replacement}");
        }
    }

    #[test]
    fn rewrites_keep_the_query_and_change_the_host_of_both_versions() {
        let change = Rewrite { host: Some("b.example".into()), path: Some(PathChange::Full("/new".into())) };
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static("a.example"));
        let mut uri: Uri = "/old?x=1".parse().expect("a target");
        rewrite(&change, &[], &mut uri, &mut headers);
        assert_eq!(
            (uri.to_string().as_str(), &headers[header::HOST]),
            ("/new?x=1", &HeaderValue::from_static("b.example"))
        );
        let (mut headers, mut uri) = (HeaderMap::new(), "http://a.example:81/old".parse().expect("a target"));
        rewrite(&change, &[], &mut uri, &mut headers);
        assert_eq!((uri.to_string().as_str(), headers.len()), ("http://b.example/new", 0));
    }

    #[test]
    fn redirects_name_ports_only_where_they_must() {
        let to = |scheme: Option<&str>, host: Option<&str>, port| {
            let redirect =
                Redirect { scheme: scheme.map(Into::into), host: host.map(Into::into), port, path: None, status: 302 };
            let uri = "/p?q=1".parse().expect("a target");
            let location = location(&redirect, &[], &Scheme::HTTP, "web.shop", 8080, &uri).expect("a location");
            location.to_str().expect("text").to_owned()
        };
        assert_eq!(to(None, None, None), "http://web.shop:8080/p?q=1");
        assert_eq!(to(Some("https"), None, None), "https://web.shop/p?q=1");
        assert_eq!(to(Some("https"), None, Some(8443)), "https://web.shop:8443/p?q=1");
        assert_eq!(to(None, Some("b.example"), Some(80)), "http://b.example/p?q=1");
    }

    #[test]
    fn headers_are_set_added_removed_and_framing_is_not_theirs() {
        let text = |n: &str, v: &str| (n.to_owned(), v.to_owned());
        let changes = Changes::parse(&HeaderChanges {
            set: vec![text("a", "1"), text("content-length", "7"), text("bad name", "x"), text("nl", "a\r\nb: c")],
            add: vec![text("b", "2")],
            remove: vec!["c".into(), "host".into(), "transfer-encoding".into()],
        });
        let mut headers = HeaderMap::new();
        for (name, value) in [("a", "0"), ("b", "1"), ("c", "1"), ("host", "h"), ("transfer-encoding", "chunked")] {
            headers.append(name, HeaderValue::from_static(value));
        }
        changes.apply(&mut headers);
        let mut all: Vec<String> = headers.iter().map(|(n, v)| format!("{n}={}", v.to_str().expect("text"))).collect();
        all.sort();
        assert_eq!(all, ["a=1", "b=1", "b=2", "host=h", "transfer-encoding=chunked"]);
    }
}
