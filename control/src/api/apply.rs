//! Server-side apply: who set which field, what of an applied configuration conflicts with others, and what to remove
//! because its manager no longer lists it. Field sets travel in `metadata.managedFields` in Kubernetes' FieldsV1 form.
//!
//! PURE. Ownership is kept for objects that were applied server-side at least once; others carry none, and their fields
//! count as owned by `before-first-apply` when they are first applied.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::lists::{ListRule, ListType};
use super::schema::Shape;

/// Most managers remembered of one object; the oldest updaters are merged into one beyond it, as Kubernetes does at 10.
const MAX_MANAGERS: usize = 32;
/// Deepest field followed.
const MAX_DEPTH: usize = 64;

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// One step of a path, in FieldsV1's own notation (`f:spec`, `k:{"name":"a"}`, `v:"x"`).
type Step = String;
type Path = Vec<Step>;
type FieldSet = BTreeSet<Path>;

/// Metadata that belongs to the server, not to any manager.
const UNOWNED: &[&str] = &[
    "name",
    "generateName",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "managedFields",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "selfLink",
];

/// One manager's entry.
#[derive(Debug, Clone)]
struct Manager {
    name: String,
    operation: String,
    subresource: String,
    api_version: String,
    time: String,
    fields: FieldSet,
}

/// Who writes.
#[derive(Debug, Clone)]
pub struct Writer<'a> {
    /// The field manager's name.
    pub manager: &'a str,
    /// Empty for the object itself.
    pub subresource: &'a str,
    /// `apiVersion` of what was sent.
    pub api_version: &'a str,
    /// The moment, RFC 3339.
    pub time: &'a str,
}

/// A field of the configuration that another manager has set otherwise: (manager's description, field path).
pub type Conflict = (String, String);

/// Applies a configuration to the live object (`None`: there is none). With `force`, conflicting fields change hands.
pub fn apply(
    shape: &Shape,
    live: Option<&Value>,
    config: &Value,
    writer: &Writer<'_>,
    force: bool,
) -> Result<Value, Vec<Conflict>> {
    let mut config = config.clone();
    if let Some(metadata) = config.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    let wanted = leaves(shape, &config);
    let applied: FieldSet = wanted.keys().cloned().collect();
    let Some(live) = live else {
        set_managers(&mut config, vec![entry(writer, "Apply", applied)]);
        return Ok(config);
    };
    let mut managers = read_managers(live);
    if managers.is_empty() {
        managers = first_managers(shape, live, writer);
    }
    let own = |m: &Manager| m.name == writer.manager && m.operation == "Apply" && m.subresource == writer.subresource;
    let before = managers.iter().find(|m| own(m)).map(|m| m.fields.clone()).unwrap_or_default();
    managers.retain(|m| !own(m));
    take_over(shape, live, &wanted, &mut managers, force)?;
    let mut merged = live.clone();
    merge(shape, super::lists::ATOMIC, &mut merged, &config);
    for path in before.difference(&applied) {
        let owned = managers.iter().any(|m| m.fields.iter().any(|other| other.starts_with(path)));
        let extended = applied.iter().any(|other| other.starts_with(path));
        if !owned && !extended {
            remove(&mut merged, path);
        }
    }
    managers.push(entry(writer, "Apply", applied));
    set_managers(&mut merged, managers);
    Ok(merged)
}

/// Managers of an object that was never applied server-side. What kubectl applied client-side is kubectl's own, as its
/// annotation says; the rest was there before.
fn first_managers(shape: &Shape, live: &Value, writer: &Writer<'_>) -> Vec<Manager> {
    let mut before: FieldSet = leaves(shape, live).into_keys().collect();
    let mut managers = Vec::new();
    let applied = live["metadata"]["annotations"].get(LAST_APPLIED).and_then(Value::as_str);
    let applied: Option<Value> = applied.and_then(|text| serde_json::from_str(text).ok());
    if let Some(applied) = applied.filter(|_| writer.manager == "kubectl" && writer.subresource.is_empty()) {
        let mut own: FieldSet = leaves(shape, &applied).into_keys().collect();
        own.insert(vec!["f:metadata".to_owned(), "f:annotations".to_owned(), format!("f:{LAST_APPLIED}")]);
        before.retain(|path| !own.contains(path));
        own.retain(|path| path.last().is_some_and(|step| !step.ends_with(LAST_APPLIED)));
        managers.push(entry(writer, "Apply", own));
    }
    managers.push(entry(&Writer { manager: "before-first-apply", ..writer.clone() }, "Update", before));
    managers
}

/// Finds conflicts; with `force` takes the fields away from the others instead.
fn take_over(
    shape: &Shape,
    live: &Value,
    wanted: &BTreeMap<Path, &Value>,
    managers: &mut [Manager],
    force: bool,
) -> Result<(), Vec<Conflict>> {
    let present = leaves(shape, live);
    let mut conflicts = Vec::new();
    for manager in managers {
        let differing: Vec<Path> = manager
            .fields
            .iter()
            .filter(|path| {
                wanted.get(*path).is_some_and(|value| !is_element(path) && present.get(*path) != Some(value))
            })
            .cloned()
            .collect();
        for path in differing {
            if force {
                manager.fields.remove(&path);
            } else {
                let described = format!("\"{}\" using {}", manager.name, manager.api_version);
                conflicts.push((described, readable(&path)));
            }
        }
    }
    if conflicts.is_empty() { Ok(()) } else { Err(conflicts) }
}

/// After a write other than apply: the fields it changed become the writer's.
pub fn track(shape: &Shape, old: &Value, new: &mut Value, writer: &Writer<'_>) {
    let mut managers = read_managers(old);
    if managers.is_empty() {
        return;
    }
    let (before, after) = (leaves(shape, old), leaves(shape, new));
    let changed: FieldSet = after.iter().filter(|(p, v)| before.get(*p) != Some(v)).map(|(p, _)| p.clone()).collect();
    let gone: FieldSet = before.keys().filter(|path| !after.contains_key(*path)).cloned().collect();
    drop((before, after));
    if changed.is_empty() && gone.is_empty() {
        return;
    }
    let own = |m: &Manager| m.name == writer.manager && m.operation == "Update" && m.subresource == writer.subresource;
    let mut fields = managers.iter().find(|m| own(m)).map(|m| m.fields.clone()).unwrap_or_default();
    managers.retain(|m| !own(m));
    fields.extend(changed.iter().cloned());
    managers.push(entry(writer, "Update", fields));
    for manager in &mut managers {
        let mine = own(manager);
        manager.fields.retain(|path| !gone.contains(path) && (mine || !changed.contains(path)));
    }
    set_managers(new, managers);
}

fn entry(writer: &Writer<'_>, operation: &str, fields: FieldSet) -> Manager {
    Manager {
        name: writer.manager.to_owned(),
        operation: operation.to_owned(),
        subresource: writer.subresource.to_owned(),
        api_version: writer.api_version.to_owned(),
        time: writer.time.to_owned(),
        fields,
    }
}

/// All leaf fields with their values; an element of a keyed list is a leaf of its own besides its fields.
fn leaves<'v>(shape: &Shape, value: &'v Value) -> BTreeMap<Path, &'v Value> {
    let mut out = BTreeMap::new();
    collect(shape, super::lists::ATOMIC, value, &mut Vec::new(), &mut out);
    out
}

fn collect<'v>(shape: &Shape, rule: ListRule, value: &'v Value, path: &mut Path, out: &mut BTreeMap<Path, &'v Value>) {
    let open = matches!(shape, Shape::Object(_) | Shape::Map(_)) && path.len() < MAX_DEPTH;
    match value {
        Value::Object(fields) if open && !fields.is_empty() => {
            for (name, value) in fields {
                if path.is_empty() && matches!(name.as_str(), "apiVersion" | "kind") {
                    continue;
                }
                if path.len() == 1 && path[0] == "f:metadata" && UNOWNED.contains(&name.as_str()) {
                    continue;
                }
                let (inner, rule) = shape.field(name).unwrap_or((&Shape::Any, super::lists::ATOMIC));
                path.push(format!("f:{name}"));
                collect(inner, rule, value, path, out);
                path.pop();
            }
        }
        Value::Array(items) if rule.list_type != ListType::Atomic => {
            for item in items {
                path.push(step_of(rule.list_type, item));
                out.insert(path.clone(), item);
                if matches!(rule.list_type, ListType::Map(_)) {
                    collect(shape.element(), super::lists::ATOMIC, item, path, out);
                }
                path.pop();
            }
        }
        _ if path.is_empty() => {}
        _ => {
            out.insert(path.clone(), value);
        }
    }
}

fn step_of(list_type: ListType, item: &Value) -> Step {
    match list_type {
        ListType::Map(keys) => {
            let id: Map<String, Value> = keys.iter().map(|key| ((*key).to_owned(), key_value(item, key))).collect();
            format!("k:{}", Value::Object(id))
        }
        _ => format!("v:{item}"),
    }
}

/// Keys that have a default take it, so that an element is the same before and after defaulting.
fn key_value(item: &Value, key: &str) -> Value {
    match (item.get(key), key) {
        (Some(value), _) => value.clone(),
        (None, "protocol") => json!("TCP"),
        (None, _) => Value::Null,
    }
}

fn is_element(path: &[Step]) -> bool {
    path.last().is_some_and(|step| !step.starts_with("f:"))
}

fn readable(path: &[Step]) -> String {
    let mut out = String::new();
    for step in path {
        match step.split_at(2) {
            ("f:", name) => out.push_str(&format!(".{name}")),
            ("k:", id) => {
                let id: Map<String, Value> = serde_json::from_str(id).unwrap_or_default();
                let keys = id.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>();
                out.push_str(&format!("[{}]", keys.join(",")));
            }
            (_, value) => out.push_str(&format!("[={value}]")),
        }
    }
    out
}

/// Lays the configuration over the object.
fn merge(shape: &Shape, rule: ListRule, target: &mut Value, config: &Value) {
    match (config, &mut *target) {
        (Value::Object(changes), Value::Object(fields)) if matches!(shape, Shape::Object(_) | Shape::Map(_)) => {
            for (name, change) in changes {
                let (inner, rule) = shape.field(name).unwrap_or((&Shape::Any, super::lists::ATOMIC));
                merge(inner, rule, fields.entry(name.clone()).or_insert(Value::Null), change);
            }
        }
        (Value::Array(changes), Value::Array(items)) if rule.list_type != ListType::Atomic => {
            for change in changes {
                let step = step_of(rule.list_type, change);
                match items.iter_mut().find(|item| step_of(rule.list_type, item) == step) {
                    Some(item) => merge(shape.element(), super::lists::ATOMIC, item, change),
                    None => items.push(change.clone()),
                }
            }
        }
        _ => *target = config.clone(),
    }
}

fn remove(target: &mut Value, path: &[Step]) {
    let Some((step, rest)) = path.split_first() else { return };
    let (notation, name) = step.split_at(2);
    match (notation, target) {
        ("f:", Value::Object(fields)) => {
            if rest.is_empty() {
                fields.remove(name);
            } else if let Some(inner) = fields.get_mut(name) {
                remove(inner, rest);
                // An object that only held what is gone goes too.
                if inner.as_object().is_some_and(Map::is_empty) || inner.as_array().is_some_and(Vec::is_empty) {
                    fields.remove(name);
                }
            }
        }
        ("k:", Value::Array(items)) => {
            let id: Map<String, Value> = serde_json::from_str(name).unwrap_or_default();
            let is = |item: &Value| id.iter().all(|(key, value)| key_value(item, key) == *value);
            if rest.is_empty() {
                items.retain(|item| !is(item));
            } else if let Some(item) = items.iter_mut().find(|item| is(item)) {
                remove(item, rest);
            }
        }
        ("v:", Value::Array(items)) => {
            let gone: Option<Value> = serde_json::from_str(name).ok();
            items.retain(|item| Some(item) != gone.as_ref());
        }
        _ => {}
    }
}

fn read_managers(object: &Value) -> Vec<Manager> {
    let field = |entry: &Value, name: &str| super::value::text(entry, name).to_owned();
    let read = |entry: &Value| {
        let mut fields = FieldSet::new();
        read_fields(&entry["fieldsV1"], &mut Vec::new(), &mut fields);
        Manager {
            name: field(entry, "manager"),
            operation: field(entry, "operation"),
            subresource: field(entry, "subresource"),
            api_version: field(entry, "apiVersion"),
            time: field(entry, "time"),
            fields,
        }
    };
    super::value::list(object, "metadata.managedFields").iter().map(read).collect()
}

fn read_fields(tree: &Value, path: &mut Path, out: &mut FieldSet) {
    let Some(fields) = tree.as_object().filter(|_| path.len() <= MAX_DEPTH) else { return };
    if fields.is_empty() && !path.is_empty() {
        out.insert(path.clone());
    }
    for (step, inner) in fields {
        if step == "." {
            out.insert(path.clone());
        } else if step.len() > 2 && step.is_char_boundary(2) {
            path.push(step.clone());
            read_fields(inner, path, out);
            path.pop();
        }
    }
}

fn set_managers(object: &mut Value, mut managers: Vec<Manager>) {
    managers.retain(|manager| !manager.fields.is_empty());
    while managers.len() > MAX_MANAGERS {
        let oldest = managers.remove(0);
        managers[0].fields.extend(oldest.fields);
    }
    let write = |manager: &Manager| {
        let mut tree = Value::Object(Map::new());
        for path in &manager.fields {
            insert_path(&mut tree, path);
        }
        let mut entry = json!({
            "manager": manager.name, "operation": manager.operation, "apiVersion": manager.api_version,
            "time": manager.time, "fieldsType": "FieldsV1", "fieldsV1": tree,
        });
        if !manager.subresource.is_empty() {
            entry["subresource"] = json!(manager.subresource);
        }
        entry
    };
    object["metadata"]["managedFields"] = managers.iter().map(write).collect();
}

fn insert_path(tree: &mut Value, path: &[Step]) {
    let mut node = tree;
    for step in path {
        node = super::value::fields(node).entry(step.clone()).or_insert_with(|| json!({}));
    }
    if is_element(path) {
        super::value::fields(node).insert(".".to_owned(), json!({}));
    }
}

/// Equal but for the times at which managers wrote: such a write changes nothing.
pub fn same_but_times(old: &Value, new: &Value) -> bool {
    let timeless = |object: &Value| {
        let mut object = object.clone();
        if let Some(entries) = object["metadata"]["managedFields"].as_array_mut() {
            for fields in entries.iter_mut().filter_map(Value::as_object_mut) {
                fields.remove("time");
            }
            entries.sort_by_key(Value::to_string);
        }
        object
    };
    old == new || timeless(old) == timeless(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::kinds;

    fn writer(manager: &str) -> Writer<'_> {
        Writer { manager, subresource: "", api_version: "apps/v1", time: "2026-01-01T00:00:00Z" }
    }

    fn config(replicas: Option<i64>, containers: Value) -> Value {
        let mut value = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"},
            "spec": {"template": {"spec": {"containers": containers}}}});
        if let Some(replicas) = replicas {
            value["spec"]["replicas"] = json!(replicas);
        }
        value
    }

    #[test]
    fn one_manager_owns_and_removes() {
        let shape = &kinds::find("apps", "v1", "deployments").expect("deployments").shape;
        let first = config(Some(3), json!([{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]));
        let live = apply(shape, None, &first, &writer("me"), false).expect("creates");
        let second = config(None, json!([{"name": "a", "image": "2"}]));
        let live = apply(shape, Some(&live), &second, &writer("me"), false).expect("applies");
        assert_eq!(live["spec"].get("replicas"), None);
        assert_eq!(live["spec"]["template"]["spec"]["containers"], json!([{"name": "a", "image": "2"}]));
        let again = apply(shape, Some(&live), &second, &writer("me"), false).expect("applies");
        assert!(same_but_times(&live, &again));
    }

    #[test]
    fn another_managers_field_conflicts_unless_forced_or_equal() {
        let shape = &kinds::find("apps", "v1", "deployments").expect("deployments").shape;
        let containers = json!([{"name": "a", "image": "1"}]);
        let live = apply(shape, None, &config(Some(3), containers.clone()), &writer("me"), false).expect("creates");
        let conflicts = apply(shape, Some(&live), &config(Some(5), containers.clone()), &writer("you"), false);
        let conflicts = conflicts.expect_err("replicas are mine");
        assert_eq!(conflicts, [("\"me\" using apps/v1".to_owned(), ".spec.replicas".to_owned())]);
        let same = apply(shape, Some(&live), &config(Some(3), containers.clone()), &writer("you"), false);
        assert!(same.is_ok());
        let forced = apply(shape, Some(&live), &config(Some(5), containers.clone()), &writer("you"), true);
        let forced = forced.expect("forced");
        assert_eq!(forced["spec"]["replicas"], 5);
        // It is no longer mine: leaving it out removes nothing.
        let mine = apply(shape, Some(&forced), &config(None, containers), &writer("me"), false).expect("applies");
        assert_eq!(mine["spec"]["replicas"], 5);
    }

    #[test]
    fn an_update_takes_what_it_changes() {
        let shape = &kinds::find("apps", "v1", "deployments").expect("deployments").shape;
        let containers = json!([{"name": "a", "image": "1"}]);
        let live = apply(shape, None, &config(Some(3), containers.clone()), &writer("me"), false).expect("creates");
        let mut scaled = live.clone();
        scaled["spec"]["replicas"] = json!(7);
        track(shape, &live, &mut scaled, &writer("scaler"));
        let conflicts = apply(shape, Some(&scaled), &config(Some(3), containers), &writer("me"), false);
        assert_eq!(conflicts.expect_err("scaler owns it")[0].1, ".spec.replicas");
    }
}
