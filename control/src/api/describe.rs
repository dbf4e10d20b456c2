//! What the server says of itself: version, API groups and resources (legacy lists and aggregated discovery), and the
//! OpenAPI v3 documents, all made from the table of kinds.
//!
//! PURE.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::kinds::{Kind, table};
use super::lists::{self, ListType};
use super::schema::DEFINITIONS;

/// The Kubernetes version whose behaviour this server follows.
const MAJOR: &str = "1";
const MINOR: &str = "32";
/// Content type of aggregated discovery.
pub const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// Content type of `/openapi/v2`, whose document is empty: an empty protobuf message. Everything is in v3.
pub const OPENAPI_V2: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// There are no custom resource definitions: the kinds are those of the table.
pub fn no_custom_resources() -> Value {
    json!({"kind": "CustomResourceDefinitionList", "apiVersion": "apiextensions.k8s.io/v1", "metadata": {}, "items": []})
}

/// `/version`.
pub fn version() -> Value {
    json!({
        "major": MAJOR, "minor": MINOR, "gitVersion": format!("v{MAJOR}.{MINOR}.0+sluice.{}", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z", "goVersion": "none",
        "compiler": "rustc", "platform": format!("linux/{}", if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }),
    })
}

/// Groups with their versions, in the table's order; core is the empty group.
fn groups() -> Vec<(&'static str, Vec<&'static str>)> {
    let mut groups: Vec<(&str, Vec<&str>)> = Vec::new();
    for kind in &table().kinds {
        let index = groups.iter().position(|(name, _)| *name == kind.group).unwrap_or_else(|| {
            groups.push((kind.group, Vec::new()));
            groups.len() - 1
        });
        if !groups[index].1.contains(&kind.version) {
            groups[index].1.push(kind.version);
        }
    }
    groups
}

fn kinds_of(group: &str, version: &str) -> impl Iterator<Item = &'static Kind> {
    table().kinds.iter().filter(move |kind| kind.group == group && kind.version == version)
}

fn verbs() -> Value {
    json!(["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"])
}

/// Subresources of a kind: name, kind, group and version of the body, verbs.
fn subresources(kind: &Kind) -> Vec<(String, &'static str, String, Value)> {
    let mut all = Vec::new();
    let own = kind.api_version();
    if kind.status {
        all.push(("status".to_owned(), kind.kind, own.clone(), json!(["get", "patch", "update"])));
    }
    if kind.scale {
        all.push(("scale".to_owned(), "Scale", "autoscaling/v1".to_owned(), json!(["get", "patch", "update"])));
    }
    for (name, body) in kind.subresources {
        let (version, verbs) = match *name {
            "log" | "proxy" => (own.clone(), json!(["get"])),
            "eviction" => ("policy/v1".to_owned(), json!(["create"])),
            "finalize" => (own.clone(), json!(["update"])),
            _ => (own.clone(), json!(["create"])),
        };
        all.push(((*name).to_owned(), body, version, verbs));
    }
    all
}

fn split(api_version: &str) -> (&str, &str) {
    api_version.split_once('/').unwrap_or(("", api_version))
}

/// `/api`.
pub fn api_versions() -> Value {
    json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
}

/// `/apis`.
pub fn group_list() -> Value {
    let groups: Vec<Value> = groups().iter().filter(|(g, _)| !g.is_empty()).map(|(g, v)| group(g, v)).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

fn group(name: &str, versions: &[&str]) -> Value {
    let version = |v: &&str| json!({"groupVersion": format!("{name}/{v}"), "version": v});
    let all: Vec<Value> = versions.iter().map(version).collect();
    json!({"name": name, "versions": all, "preferredVersion": all[0]})
}

/// `/apis/<group>`.
pub fn one_group(name: &str) -> Option<Value> {
    let (_, versions) = groups().into_iter().find(|(group, _)| *group == name && !name.is_empty())?;
    let mut object = group(name, &versions);
    (object["kind"], object["apiVersion"]) = (json!("APIGroup"), json!("v1"));
    Some(object)
}

/// `/api/v1` and `/apis/<group>/<version>`.
pub fn resource_list(group: &str, version: &str) -> Option<Value> {
    let mut resources = Vec::new();
    for kind in kinds_of(group, version) {
        let mut own = json!({
            "name": kind.plural, "singularName": kind.singular(), "namespaced": kind.namespaced, "kind": kind.kind,
            "verbs": verbs(),
        });
        if !kind.short.is_empty() {
            own["shortNames"] = json!(kind.short);
        }
        if kind.in_all {
            own["categories"] = json!(["all"]);
        }
        resources.push(own);
        for (name, body, api_version, verbs) in subresources(kind) {
            let mut sub = json!({
                "name": format!("{}/{name}", kind.plural), "singularName": "", "namespaced": kind.namespaced,
                "kind": body, "verbs": verbs,
            });
            if api_version != kind.api_version() {
                let (group, version) = split(&api_version);
                (sub["group"], sub["version"]) = (json!(group), json!(version));
            }
            resources.push(sub);
        }
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    let list =
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources});
    (!resources.is_empty()).then_some(list)
}

/// Aggregated discovery: of core for `/api`, of all other groups for `/apis`.
pub fn aggregated(core: bool) -> Value {
    let items: Vec<Value> = groups()
        .iter()
        .filter(|(group, _)| group.is_empty() == core)
        .map(|(group, versions)| {
            let versions: Vec<Value> = versions.iter().map(|version| aggregated_version(group, version)).collect();
            let metadata = if core {
                json!({"creationTimestamp": null})
            } else {
                json!({"name": group, "creationTimestamp": null})
            };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items})
}

fn aggregated_version(group: &str, version: &str) -> Value {
    let resources: Vec<Value> = kinds_of(group, version)
        .map(|kind| {
            let subresources: Vec<Value> = subresources(kind)
                .into_iter()
                .map(|(name, body, api_version, verbs)| {
                    let (group, version) = split(&api_version);
                    json!({"subresource": name, "verbs": verbs,
                           "responseKind": {"group": group, "version": version, "kind": body}})
                })
                .collect();
            let mut resource = json!({
                "resource": kind.plural, "singularResource": kind.singular(), "verbs": verbs(),
                "responseKind": {"group": kind.group, "version": kind.version, "kind": kind.kind},
                "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
            });
            if !kind.short.is_empty() {
                resource["shortNames"] = json!(kind.short);
            }
            if kind.in_all {
                resource["categories"] = json!(["all"]);
            }
            if !subresources.is_empty() {
                resource["subresources"] = json!(subresources);
            }
            resource
        })
        .collect();
    json!({"version": version, "freshness": "Current", "resources": resources})
}

/// `/openapi/v3`: the documents there are. The hash names the program's version, so that clients may cache.
pub fn openapi_index() -> Value {
    let hash = env!("CARGO_PKG_VERSION");
    let mut paths = Map::new();
    for (group, versions) in groups() {
        for version in versions {
            let path = if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") };
            let url = format!("/openapi/v3/{path}?hash={hash}");
            paths.insert(path, json!({ "serverRelativeURL": url }));
        }
    }
    json!({ "paths": paths })
}

/// One group's OpenAPI v3 document.
pub fn openapi(group: &str, version: &str) -> Option<Value> {
    let mut paths = Map::new();
    let mut roots = BTreeSet::new();
    for kind in kinds_of(group, version) {
        roots.insert(kind.schema_name.clone());
        add_paths(kind, &mut paths);
    }
    if paths.is_empty() {
        return None;
    }
    roots.insert("io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions".to_owned());
    roots.insert("io.k8s.apimachinery.pkg.apis.meta.v1.Status".to_owned());
    let mut schemas = reachable(&roots);
    for kind in kinds_of(group, version) {
        let gvk = json!([{"group": kind.group, "version": kind.version, "kind": kind.kind}]);
        if let Some(schema) = schemas.get_mut(&kind.schema_name) {
            schema["x-kubernetes-group-version-kind"] = gvk;
        }
        schemas.insert(list_name(kind), list_schema(kind));
    }
    let list_meta = "io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta";
    schemas.extend(reachable(&BTreeSet::from([list_meta.to_owned()])));
    let info = json!({"title": "Sluice", "version": format!("v{MAJOR}.{MINOR}.0")});
    Some(json!({"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": schemas}}))
}

fn list_name(kind: &Kind) -> String {
    format!("{}List", kind.schema_name)
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("{DEFINITIONS}{name}")})
}

fn list_schema(kind: &Kind) -> Value {
    let gvk = json!([{"group": kind.group, "version": kind.version, "kind": kind.list_kind()}]);
    json!({
        "type": "object", "required": ["items"], "x-kubernetes-group-version-kind": gvk,
        "properties": {
            "apiVersion": {"type": "string"}, "kind": {"type": "string"},
            "items": {"type": "array", "items": reference(&kind.schema_name)},
            "metadata": reference("io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta"),
        },
    })
}

/// The named definitions and all they refer to, with how lists merge.
fn reachable(roots: &BTreeSet<String>) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    let mut waiting: Vec<String> = roots.iter().cloned().collect();
    while let Some(name) = waiting.pop() {
        if found.contains_key(&name) {
            continue;
        }
        let Some(schema) = table().definitions.get(&name) else { continue };
        let mut schema = schema.clone();
        collect_references(&schema, &mut waiting);
        annotate(&name, &mut schema);
        found.insert(name, schema);
    }
    found
}

fn collect_references(schema: &Value, out: &mut Vec<String>) {
    match schema {
        Value::Object(fields) => {
            if let Some(name) = fields.get("$ref").and_then(Value::as_str).and_then(|r| r.strip_prefix(DEFINITIONS)) {
                out.push(name.to_owned());
            }
            fields.values().for_each(|value| collect_references(value, out));
        }
        Value::Array(items) => items.iter().for_each(|item| collect_references(item, out)),
        _ => {}
    }
}

fn annotate(name: &str, schema: &mut Value) {
    let simple = name.rsplit('.').next().unwrap_or(name);
    if matches!(simple, "IntOrString" | "Quantity") {
        *schema = json!({"oneOf": [{"type": "string"}, {"type": "number"}], "x-kubernetes-int-or-string": true});
        return;
    }
    let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) else { return };
    for (field, property) in properties {
        let rule = lists::rule(name, field);
        // A reference must stand alone in OpenAPI 3.0; what is said of the field goes beside it.
        let special = rule != lists::ATOMIC;
        if special && property.get("$ref").is_some() {
            *property = json!({"allOf": [property.clone()], "default": {}});
        }
        if let Some(key) = rule.patch_key {
            let strategy = if rule.retain_keys { "merge,retainKeys" } else { "merge" };
            property["x-kubernetes-patch-strategy"] = json!(strategy);
            if !key.is_empty() {
                property["x-kubernetes-patch-merge-key"] = json!(key);
            }
        } else if rule.retain_keys {
            property["x-kubernetes-patch-strategy"] = json!("retainKeys");
        }
        match rule.list_type {
            ListType::Map(keys) => {
                (property["x-kubernetes-list-type"], property["x-kubernetes-list-map-keys"]) =
                    (json!("map"), json!(keys));
            }
            ListType::Set => property["x-kubernetes-list-type"] = json!("set"),
            ListType::Atomic if property.get("type") == Some(&json!("array")) => {
                property["x-kubernetes-list-type"] = json!("atomic");
            }
            ListType::Atomic => {}
        }
    }
}

fn add_paths(kind: &Kind, paths: &mut Map<String, Value>) {
    let root = match kind.group {
        "" => format!("/api/{}", kind.version),
        group => format!("/apis/{group}/{}", kind.version),
    };
    let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
    let collection = format!("{root}{scope}/{}", kind.plural);
    let item = format!("{collection}/{{name}}");
    let list = list_name(kind);
    let all = json!({
        "get": operation(kind, "list", &list), "post": operation(kind, "post", &kind.schema_name),
        "delete": operation(kind, "deletecollection", "io.k8s.apimachinery.pkg.apis.meta.v1.Status"),
        "parameters": path_parameters(kind, false),
    });
    paths.insert(collection, all);
    if kind.namespaced {
        paths.insert(format!("{root}/{}", kind.plural), json!({ "get": operation(kind, "list", &list) }));
    }
    paths.insert(item.clone(), item_path(kind, true));
    if kind.status {
        paths.insert(format!("{item}/status"), item_path(kind, false));
    }
}

fn item_path(kind: &Kind, whole: bool) -> Value {
    let mut path = json!({
        "get": operation(kind, "get", &kind.schema_name), "put": operation(kind, "put", &kind.schema_name),
        "patch": operation(kind, "patch", &kind.schema_name), "parameters": path_parameters(kind, true),
    });
    if whole {
        path["delete"] = operation(kind, "delete", "io.k8s.apimachinery.pkg.apis.meta.v1.Status");
    }
    path
}

fn path_parameters(kind: &Kind, named: bool) -> Value {
    let parameter = |name: &str| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "uniqueItems": true}});
    let mut all = Vec::new();
    if kind.namespaced {
        all.push(parameter("namespace"));
    }
    if named {
        all.push(parameter("name"));
    }
    json!(all)
}

/// One operation. The query parameters must be there: kubectl looks for `fieldValidation` and `dryRun` before it uses
/// them, and refuses to apply otherwise.
fn operation(kind: &Kind, action: &str, answer: &str) -> Value {
    let query =
        |name: &str, ty: &str| json!({"name": name, "in": "query", "schema": {"type": ty, "uniqueItems": true}});
    let parameters = match action {
        "list" | "deletecollection" => vec![
            query("labelSelector", "string"),
            query("fieldSelector", "string"),
            query("limit", "integer"),
            query("continue", "string"),
            query("watch", "boolean"),
            query("resourceVersion", "string"),
            query("resourceVersionMatch", "string"),
            query("allowWatchBookmarks", "boolean"),
            query("sendInitialEvents", "boolean"),
            query("timeoutSeconds", "integer"),
            query("dryRun", "string"),
        ],
        "get" => Vec::new(),
        _ => vec![
            query("dryRun", "string"),
            query("fieldManager", "string"),
            query("fieldValidation", "string"),
            query("force", "boolean"),
        ],
    };
    let content = json!({"application/json": {"schema": reference(answer)}});
    let mut operation = json!({
        "operationId": format!("{action}{}{}", kind.kind, kind.version), "parameters": parameters,
        "responses": {"200": {"description": "OK", "content": content}},
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": {"group": kind.group, "version": kind.version, "kind": kind.kind},
    });
    let own = json!({"schema": reference(&kind.schema_name)});
    match action {
        "post" | "put" => operation["requestBody"] = json!({"content": {"application/json": own}}),
        "patch" => {
            let mut content = json!({"application/json-patch+json": own, "application/merge-patch+json": own,
                "application/apply-patch+yaml": own});
            if kind.strategic {
                content["application/strategic-merge-patch+json"] = own;
            }
            operation["requestBody"] = json!({ "content": content });
        }
        _ => {}
    }
    operation
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_complete() {
        for kind in &table().kinds {
            let document = openapi(kind.group, kind.version).expect(kind.kind);
            let text = document.to_string();
            for part in text.split("\"$ref\":\"").skip(1) {
                let name = part.split('"').next().and_then(|r| r.strip_prefix(DEFINITIONS)).expect("a reference");
                assert!(document["components"]["schemas"].get(name).is_some(), "{} refers to {name}", kind.kind);
            }
        }
        let core = openapi("", "v1").expect("core");
        let containers = &core["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
    }
}
