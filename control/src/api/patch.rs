//! The three kinds of patch that change an object by difference: JSON merge patch, JSON patch, and Kubernetes'
//! strategic merge patch with its directives (`$patch`, `$retainKeys`, `$setElementOrder/…`, `$deleteFromPrimitiveList/…`).
//!
//! PURE. Server-side apply is in `apply`.

use serde_json::{Map, Value};

use super::lists::ListRule;
use super::schema::Shape;

/// Most operations of one JSON patch.
const MAX_OPERATIONS: usize = 10_000;
/// Most bytes that the copy operations of one JSON patch make: each could double the object (Kubernetes' limit).
const MAX_COPIED: usize = 3 << 20;

/// JSON merge patch, RFC 7386.
pub fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *target = patch.clone();
        return;
    };
    let fields = super::value::fields(target);
    for (name, change) in changes {
        if change.is_null() {
            fields.remove(name);
        } else {
            merge(fields.entry(name.clone()).or_insert(Value::Null), change);
        }
    }
}

/// JSON patch, RFC 6902. On an error the target is not to be used.
pub fn json(target: &mut Value, patch: &Value) -> Result<(), String> {
    let operations: json_patch::Patch =
        serde_json::from_value(patch.clone()).map_err(|e| format!("error decoding patch: {e}"))?;
    if operations.0.len() > MAX_OPERATIONS {
        return Err(format!("the patch has more than {MAX_OPERATIONS} operations"));
    }
    let mut copied = 0;
    for operation in operations.0 {
        if let json_patch::PatchOperation::Copy(copy) = &operation {
            copied += target.pointer(copy.from.as_str()).map_or(0, size);
            if copied > MAX_COPIED {
                return Err(format!("the patch's copy operations make more than {MAX_COPIED} bytes"));
            }
        }
        json_patch::patch(target, &[operation]).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// About how many bytes of JSON.
fn size(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
        Value::String(s) => s.len() + 2,
        Value::Array(items) => 2 + items.iter().map(|v| size(v) + 1).sum::<usize>(),
        Value::Object(fields) => 2 + fields.iter().map(|(k, v)| k.len() + size(v) + 4).sum::<usize>(),
    }
}

/// Strategic merge patch of an object of the given shape.
pub fn strategic(shape: &Shape, target: &mut Value, patch: &Value) -> Result<(), String> {
    let Value::Object(changes) = patch else { return Err("a strategic merge patch must be an object".to_owned()) };
    merge_object(shape, super::value::fields(target), changes)
}

fn merge_object(shape: &Shape, target: &mut Map<String, Value>, patch: &Map<String, Value>) -> Result<(), String> {
    match patch.get("$patch").and_then(Value::as_str) {
        Some("replace") => {
            *target = patch.iter().filter(|(name, _)| *name != "$patch").map(|(n, v)| (n.clone(), v.clone())).collect();
            return Ok(());
        }
        Some("delete") => {
            target.clear();
            return Ok(());
        }
        Some("merge") | None => {}
        Some(other) => return Err(format!("unknown $patch directive {other:?}")),
    }
    if let Some(retained) = patch.get("$retainKeys").and_then(Value::as_array) {
        target.retain(|name, _| retained.iter().any(|kept| kept == name));
    }
    for (name, change) in patch.iter().filter(|(name, _)| !name.starts_with('$')) {
        merge_field(shape, target, name, change, patch)?;
    }
    // Directives whose list the patch does not touch otherwise.
    for (directive, values) in patch {
        if let Some(name) = directive.strip_prefix("$deleteFromPrimitiveList/") {
            delete_values(target, name, values);
        }
        if let Some(name) = directive.strip_prefix("$setElementOrder/") {
            let rule = shape.field(name).map_or(super::lists::ATOMIC, |(_, rule)| rule);
            if let (Some(Value::Array(items)), Some(order)) = (target.get_mut(name), values.as_array()) {
                reorder(items, order, rule.patch_key.unwrap_or_default());
            }
        }
    }
    Ok(())
}

fn merge_field(
    shape: &Shape,
    target: &mut Map<String, Value>,
    name: &str,
    change: &Value,
    patch: &Map<String, Value>,
) -> Result<(), String> {
    if change.is_null() {
        target.remove(name);
        return Ok(());
    }
    let (inner, rule) = shape.field(name).unwrap_or((&Shape::Any, super::lists::ATOMIC));
    match (change, target.get_mut(name)) {
        (Value::Object(changes), existing) => {
            let whole_delete = changes.get("$patch").and_then(Value::as_str) == Some("delete");
            if whole_delete {
                target.remove(name);
                return Ok(());
            }
            let mut fields = existing.and_then(|value| value.as_object().cloned()).unwrap_or_default();
            merge_object(inner, &mut fields, changes)?;
            target.insert(name.to_owned(), Value::Object(fields));
        }
        (Value::Array(changes), existing) if rule.patch_key.is_some() => {
            let mut items = existing.and_then(|value| value.as_array().cloned()).unwrap_or_default();
            merge_list(inner.element(), rule, &mut items, changes, name)?;
            let ordered = patch.contains_key(&format!("$setElementOrder/{name}"));
            if !ordered && rule.patch_key == Some("") {
                items.dedup();
            }
            target.insert(name.to_owned(), Value::Array(items));
        }
        (Value::Array(changes), _) => {
            let plain = changes.iter().filter(|item| item.get("$patch").is_none()).cloned().collect();
            target.insert(name.to_owned(), Value::Array(plain));
        }
        (plain, _) => {
            target.insert(name.to_owned(), plain.clone());
        }
    }
    Ok(())
}

fn merge_list(
    element: &Shape,
    rule: ListRule,
    items: &mut Vec<Value>,
    changes: &[Value],
    name: &str,
) -> Result<(), String> {
    let key = rule.patch_key.unwrap_or_default();
    let directive = |change: &Value| change.get("$patch").and_then(Value::as_str).map(str::to_owned);
    if changes.iter().any(|change| directive(change).as_deref() == Some("replace") && change.get(key).is_none()) {
        *items = changes.iter().filter(|change| directive(change).is_none()).cloned().collect();
        return Ok(());
    }
    for change in changes {
        if key.is_empty() {
            if !items.contains(change) {
                items.push(change.clone());
            }
            continue;
        }
        let id = change
            .get(key)
            .ok_or_else(|| format!("map: {change} does not contain declared merge key: {key} (in list {name})"))?;
        let position = items.iter().position(|item| item.get(key) == Some(id));
        match (directive(change).as_deref(), position) {
            (Some("delete"), _) => items.retain(|item| item.get(key) != Some(id)),
            (_, Some(index)) => {
                let Value::Object(changes) = change else { continue };
                merge_object(element, super::value::fields(&mut items[index]), changes)?;
            }
            (_, None) => items.push(without_directives(element, change)?),
        }
    }
    Ok(())
}

/// A new element: the patch applied to nothing, so that directives and nulls leave no trace.
fn without_directives(element: &Shape, change: &Value) -> Result<Value, String> {
    let Value::Object(changes) = change else { return Ok(change.clone()) };
    let mut fields = Map::new();
    merge_object(element, &mut fields, changes)?;
    Ok(Value::Object(fields))
}

fn delete_values(target: &mut Map<String, Value>, name: &str, values: &Value) {
    if let (Some(Value::Array(items)), Some(gone)) = (target.get_mut(name), values.as_array()) {
        items.retain(|item| !gone.contains(item));
    }
}

/// Brings the named elements into the given order; others keep their place relative to what precedes them.
fn reorder(items: &mut Vec<Value>, order: &[Value], key: &str) {
    let id = |item: &Value| if key.is_empty() { Some(item.clone()) } else { item.get(key).cloned() };
    let rank = |item: &Value| order.iter().position(|wanted| id(wanted).is_some() && id(wanted) == id(item));
    let mut listed: Vec<Value> = items.iter().filter(|item| rank(item).is_some()).cloned().collect();
    listed.sort_by_key(|item| rank(item));
    let mut listed = listed.into_iter();
    let mut result = Vec::with_capacity(items.len());
    for item in std::mem::take(items) {
        if rank(&item).is_some() {
            result.extend(listed.next());
        } else {
            result.push(item);
        }
    }
    *items = result;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::kinds;
    use serde_json::json;

    fn patched(start: Value, change: &Value) -> Value {
        let kind = kinds::find("apps", "v1", "deployments").expect("deployments exist");
        let mut value = start;
        strategic(&kind.shape, &mut value, change).expect("patch applies");
        value
    }

    fn with_containers(containers: Value) -> Value {
        json!({"spec": {"template": {"spec": {"containers": containers}}}})
    }

    #[test]
    fn copies_that_double_the_object_are_refused() {
        let copy = |i: usize| json!({"op": "copy", "from": "/m", "path": format!("/m/x{i}")});
        let mut few = json!({"m": {"a": "b"}});
        json(&mut few, &Value::Array((0..3).map(copy).collect())).expect("a few are fine");
        let mut many = json!({"m": {"a": "b"}});
        let error = json(&mut many, &Value::Array((0..60).map(copy).collect())).expect_err("2^60 copies are not");
        assert!(error.contains("copy operations"), "{error}");
    }

    #[test]
    fn strategic_merge_table() {
        let two = with_containers(json!([{"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "1"}]));
        let cases = [
            (
                "merge by name",
                with_containers(json!([{"name": "a", "image": "2"}])),
                with_containers(json!([{"name": "a", "image": "2", "args": ["x"]}, {"name": "b", "image": "1"}])),
            ),
            (
                "delete by name",
                with_containers(json!([{"name": "a", "$patch": "delete"}])),
                with_containers(json!([{"name": "b", "image": "1"}])),
            ),
            (
                "null deletes a field",
                with_containers(json!([{"name": "a", "args": null}])),
                with_containers(json!([{"name": "a", "image": "1"}, {"name": "b", "image": "1"}])),
            ),
            (
                "replace the list",
                with_containers(json!([{"$patch": "replace"}, {"name": "c"}])),
                with_containers(json!([{"name": "c"}])),
            ),
            (
                "atomic list",
                with_containers(json!([{"name": "a", "args": ["y"]}])),
                with_containers(json!([{"name": "a", "image": "1", "args": ["y"]}, {"name": "b", "image": "1"}])),
            ),
            (
                "order",
                json!({"spec": {"template": {"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}}}}),
                with_containers(json!([{"name": "b", "image": "1"}, {"name": "a", "image": "1", "args": ["x"]}])),
            ),
            (
                "add in order",
                json!({"spec": {"template": {"spec": {"$setElementOrder/containers": [{"name": "c"}, {"name": "a"}, {"name": "b"}],
                    "containers": [{"name": "c", "image": null}]}}}}),
                with_containers(
                    json!([{"name": "c"}, {"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "1"}]),
                ),
            ),
        ];
        for (name, change, want) in cases {
            assert_eq!(patched(two.clone(), &change), want, "{name}");
        }
    }

    #[test]
    fn retain_keys_replaces_the_strategy() {
        let start = json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}});
        let change = json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}});
        assert_eq!(patched(start, &change), json!({"spec": {"strategy": {"type": "Recreate"}}}));
    }

    #[test]
    fn element_without_key_is_refused() {
        let kind = kinds::find("apps", "v1", "deployments").expect("deployments exist");
        let change = with_containers(json!([{"image": "2"}]));
        assert!(strategic(&kind.shape, &mut json!({}), &change).is_err());
    }

    #[test]
    fn merge_patch_deletes_with_null() {
        let mut value = json!({"a": {"b": 1, "c": 2}, "l": [1]});
        merge(&mut value, &json!({"a": {"b": null}, "l": [2]}));
        assert_eq!(value, json!({"a": {"c": 2}, "l": [2]}));
    }
}
