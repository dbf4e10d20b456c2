//! What a request asks: its path taken apart, its query, what the client accepts and what its body is.
//!
//! PURE, apart from reading nothing.

use std::collections::HashMap;

use http::HeaderMap;
use http::header::{ACCEPT, CONTENT_TYPE, USER_AGENT};
use serde_json::Value;

use super::kinds::{self, Kind};
use super::nodes;
use super::prepare::FieldValidation;
use super::registry::{DeleteOptions, Patch};
use super::status::ApiError;
use super::value::text;

/// A path to objects.
#[derive(Debug, Clone)]
pub struct Target {
    /// Of this kind.
    pub kind: &'static Kind,
    /// In this namespace; `None` = all, or cluster-wide.
    pub namespace: Option<String>,
    /// This one; empty = the collection.
    pub name: String,
    /// Empty = the object itself.
    pub subresource: String,
}

/// Takes a path apart; `None` if it leads nowhere.
pub fn target(path: &str) -> Option<Target> {
    let mut parts: Vec<String> = Vec::new();
    for part in path.trim_matches('/').split('/') {
        parts.push(percent_decode(part)?);
    }
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let (group, version, rest) = match parts.as_slice() {
        ["api", version, rest @ ..] => ("", *version, rest),
        ["apis", group, version, rest @ ..] if !group.is_empty() => (*group, *version, rest),
        _ => return None,
    };
    let make = |namespace: Option<&str>, plural: &str, rest: &[&str]| -> Option<Target> {
        let kind = kinds::find(group, version, plural)?;
        let (name, subresource) = match rest {
            [] => ("", String::new()),
            [name] => (*name, String::new()),
            [name, subresource] => (*name, (*subresource).to_owned()),
            // A node's own paths: one part more.
            [name, nodes::PROXY, path] if kind.plural == "nodes" => (*name, format!("{}/{path}", nodes::PROXY)),
            _ => return None,
        };
        let namespace = namespace.map(str::to_owned);
        Some(Target { kind, namespace, name: name.to_owned(), subresource })
    };
    match rest {
        ["namespaces", rest @ ..]
            if group.is_empty() && (rest.len() < 2 || matches!(rest[1..], ["status" | "finalize"])) =>
        {
            make(None, "namespaces", rest)
        }
        ["namespaces", namespace, plural, rest @ ..] if !namespace.is_empty() => {
            make(Some(namespace), plural, rest).filter(|target| target.kind.namespaced)
        }
        [plural, rest @ ..] => {
            // A namespaced object has its namespace in the path; without it there is only the list of all.
            make(None, plural, rest).filter(|target| !target.kind.namespaced || rest.is_empty())
        }
        [] => None,
    }
}

fn percent_decode(part: &str) -> Option<String> {
    if !part.contains('%') {
        return Some(part.to_owned());
    }
    let mut out = Vec::with_capacity(part.len());
    let mut bytes = part.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let pair = [bytes.next()?, bytes.next()?];
            out.push(u8::from_str_radix(std::str::from_utf8(&pair).ok()?, 16).ok()?);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok()
}

/// Query parameters; of several with one name the last counts.
#[derive(Debug, Default)]
pub struct Query(HashMap<String, String>);

impl Query {
    /// Parses the query of a URI.
    pub fn parse(query: &str) -> Self {
        let pair = |part: &str| {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            Some((percent_decode(&key.replace('+', " "))?, percent_decode(&value.replace('+', " "))?))
        };
        Query(query.split('&').filter(|part| !part.is_empty()).filter_map(pair).collect())
    }

    /// A parameter, if it is there and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// A flag: there, and not `false` or `0`.
    pub fn flag(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| !matches!(value.as_str(), "false" | "0"))
    }

    /// A number, if it is one.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.get(name)?.parse().ok()
    }

    /// What to do with unknown fields.
    pub fn field_validation(&self) -> Result<FieldValidation, ApiError> {
        match self.get("fieldValidation") {
            None | Some("Warn") => Ok(FieldValidation::Warn),
            Some("Strict") => Ok(FieldValidation::Strict),
            Some("Ignore") => Ok(FieldValidation::Ignore),
            Some(other) => Err(ApiError::bad_request(format!(
                "fieldValidation: Unsupported value: \"{other}\": supported values: \"\", \"Ignore\", \"Strict\", \"Warn\""
            ))),
        }
    }

    fn include(&self) -> Result<Include, ApiError> {
        match self.get("includeObject") {
            None | Some("Metadata") => Ok(Include::Metadata),
            Some("None") => Ok(Include::Nothing),
            Some("Object") => Ok(Include::Object),
            Some(other) => Err(ApiError::bad_request(format!(
                "includeObject: Unsupported value: \"{other}\": supported values: \"Metadata\", \"None\", \"Object\""
            ))),
        }
    }

    /// Whether nothing is to be stored.
    pub fn dry_run(&self) -> Result<bool, ApiError> {
        match self.get("dryRun") {
            None => Ok(false),
            Some("All") => Ok(true),
            Some(other) => {
                Err(ApiError::bad_request(format!("dryRun: Unsupported value: \"{other}\": supported values: \"All\"")))
            }
        }
    }
}

/// In which form objects go out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As they are.
    Object,
    /// Rows for people.
    Table(Include),
    /// Metadata only.
    Metadata,
}

/// What of its object each row carries (`includeObject`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Include {
    Nothing,
    Metadata,
    /// All of it: clients sort by any of its fields.
    Object,
}

/// The first form of the Accept header that can be made.
pub fn form(headers: &HeaderMap, query: &Query) -> Result<Form, ApiError> {
    let accept = header(headers, &ACCEPT);
    if accept.is_empty() {
        return Ok(Form::Object);
    }
    for part in accept.split(',').map(str::trim) {
        let mut parameters = part.split(';').map(str::trim);
        let media = parameters.next().unwrap_or_default();
        if !matches!(media, "application/json" | "*/*" | "application/*" | "application/yaml" | "text/plain") {
            continue;
        }
        let transformed = parameters.find_map(|parameter| parameter.strip_prefix("as="));
        match transformed {
            None => return Ok(Form::Object),
            Some("Table") if part.contains("g=meta.k8s.io") => return Ok(Form::Table(query.include()?)),
            Some("PartialObjectMetadata" | "PartialObjectMetadataList") => return Ok(Form::Metadata),
            Some(_) => {}
        }
    }
    Err(ApiError::not_acceptable())
}

/// Whether the client takes aggregated discovery.
pub fn wants_aggregated(headers: &HeaderMap) -> bool {
    let accept = header(headers, &ACCEPT);
    accept
        .split(',')
        .any(|part| part.contains("as=APIGroupDiscoveryList") && part.contains("v=v2") && !part.contains("v2beta"))
}

/// A header as text, empty if there is none.
pub fn header<'h>(headers: &'h HeaderMap, name: &http::header::HeaderName) -> &'h str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

fn media(headers: &HeaderMap) -> String {
    header(headers, &CONTENT_TYPE).split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// Parses a body by its content type; without one it is JSON.
pub fn body(headers: &HeaderMap, bytes: &[u8]) -> Result<Value, ApiError> {
    match media(headers).as_str() {
        "" | "application/json" | "text/plain" | "application/x-www-form-urlencoded" => json(bytes),
        "application/yaml" => yaml(bytes),
        "application/vnd.kubernetes.protobuf" => super::protobuf::decode(bytes),
        other => Err(ApiError::unsupported_media(format!(
            "the body of the request was in an unknown format ({other}) - accepted media types include: \
             application/json, application/yaml, application/vnd.kubernetes.protobuf"
        ))),
    }
}

/// Parses a difference by its content type.
pub fn patch(headers: &HeaderMap, bytes: &[u8], force: bool) -> Result<Patch, ApiError> {
    match media(headers).as_str() {
        "application/merge-patch+json" => Ok(Patch::Merge(json(bytes)?)),
        "application/json-patch+json" => Ok(Patch::Json(json(bytes)?)),
        "application/strategic-merge-patch+json" => Ok(Patch::Strategic(json(bytes)?)),
        "application/apply-patch+yaml" => Ok(Patch::Apply { config: yaml(bytes)?, force }),
        _ => Err(ApiError::unsupported_media(
            "the body of the request was in an unknown format - accepted media types include: \
             application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, \
             application/apply-patch+yaml",
        )),
    }
}

fn json(bytes: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(bytes)
        .map_err(|e| ApiError::bad_request(format!("the object provided is unrecognized (must be valid JSON): {e}")))
}

fn yaml(bytes: &[u8]) -> Result<Value, ApiError> {
    // JSON is YAML, and the JSON parser is the stricter one.
    if let Ok(value) = serde_json::from_slice(bytes) {
        return Ok(value);
    }
    serde_yaml_ng::from_slice(bytes)
        .map_err(|e| ApiError::bad_request(format!("the object provided is unrecognized (must be valid YAML): {e}")))
}

/// Options of a delete: body first, then query.
pub fn delete_options(headers: &HeaderMap, bytes: &[u8], query: &Query) -> Result<DeleteOptions, ApiError> {
    let body = if bytes.is_empty() { Value::Null } else { body(headers, bytes)? };
    let grace_s = body.get("gracePeriodSeconds").and_then(Value::as_i64);
    let propagation = match text(&body, "propagationPolicy") {
        "" => query.get("propagationPolicy").unwrap_or_default(),
        given => given,
    };
    if !matches!(propagation, "" | "Background" | "Foreground" | "Orphan") {
        return Err(ApiError::bad_request(format!(
            "propagationPolicy: Unsupported value: \"{propagation}\": supported values: \"Foreground\", \"Background\", \
             \"Orphan\""
        )));
    }
    let orphan = body.get("orphanDependents").and_then(Value::as_bool) == Some(true);
    Ok(DeleteOptions {
        grace_s: grace_s.or_else(|| query.get("gracePeriodSeconds").and_then(|s| s.parse().ok())),
        propagation: if orphan { "Orphan".to_owned() } else { propagation.to_owned() },
        uid: text(&body, "preconditions.uid").to_owned(),
        resource_version: text(&body, "preconditions.resourceVersion").to_owned(),
    })
}

/// The field manager: the query's, else the program's name from the user agent.
pub fn manager(headers: &HeaderMap, query: &Query) -> String {
    let agent = header(headers, &USER_AGENT).split('/').next().unwrap_or_default();
    let name = query.get("fieldManager").unwrap_or(if agent.is_empty() { "unknown" } else { agent });
    name.chars().take(128).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let parts =
            |path: &str| target(path).map(|t| (t.kind.plural, t.namespace.unwrap_or_default(), t.name, t.subresource));
        let want =
            |plural, ns: &str, name: &str, sub: &str| Some((plural, ns.to_owned(), name.to_owned(), sub.to_owned()));
        assert_eq!(parts("/api/v1/namespaces"), want("namespaces", "", "", ""));
        assert_eq!(parts("/api/v1/namespaces/a"), want("namespaces", "", "a", ""));
        assert_eq!(parts("/api/v1/namespaces/a/finalize"), want("namespaces", "", "a", "finalize"));
        assert_eq!(parts("/api/v1/namespaces/a/pods"), want("pods", "a", "", ""));
        assert_eq!(parts("/api/v1/namespaces/a/pods/b/log"), want("pods", "a", "b", "log"));
        assert_eq!(parts("/api/v1/pods"), want("pods", "", "", ""));
        assert_eq!(parts("/api/v1/nodes/n/status"), want("nodes", "", "n", "status"));
        assert_eq!(parts("/api/v1/nodes/n/proxy/flows"), want("nodes", "", "n", "proxy/flows"));
        assert_eq!(parts("/apis/apps/v1/namespaces/a/deployments/d/scale"), want("deployments", "a", "d", "scale"));
        for nowhere in [
            "/",
            "/api/v1",
            "/api/v1/widgets",
            "/api/v2/pods",
            "/api/v1/pods/x",
            "/apis/apps/v1/namespaces/a/pods",
            "/api/v1/namespaces/a/nodes",
            "/api/v1/namespaces/a/pods/b/c/d",
            "/api/v1/namespaces/a/pods/b/proxy/flows",
            "/api/v1/nodes/n/proxy/containerLogs/a/b/c",
            "/api/v1/pods/%zz",
        ] {
            assert_eq!(parts(nowhere), None, "{nowhere}");
        }
    }

    #[test]
    fn accepts() {
        let form_of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, text.parse().expect("a header"));
            form(&headers, &Query::default())
        };
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(form_of(kubectl).expect("a form"), Form::Table(Include::Metadata));
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, kubectl.parse().expect("a header"));
        let including = |what: &str| form(&headers, &Query::parse(&format!("includeObject={what}")));
        assert_eq!(including("Object").expect("a form"), Form::Table(Include::Object));
        assert_eq!(including("None").expect("a form"), Form::Table(Include::Nothing));
        assert_eq!(including("Some").expect_err("none").code, 400);
        assert_eq!(form_of("application/json").expect("a form"), Form::Object);
        assert_eq!(form_of("application/vnd.kubernetes.protobuf,application/json").expect("a form"), Form::Object);
        assert_eq!(form_of("application/vnd.kubernetes.protobuf").expect_err("none").code, 406);
    }
}
