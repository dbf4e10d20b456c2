//! The `scale` subresource: how many replicas are wanted and there are, in the shape every scaler knows.
//!
//! PURE.

use serde_json::{Value, json};

use super::status::ApiError;
use super::value::{at, list, number, text};

/// The Scale of a workload.
pub fn of(object: &Value) -> Value {
    let metadata = &object["metadata"];
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"], "creationTimestamp": metadata["creationTimestamp"],
        },
        "spec": {"replicas": number(object, "spec.replicas")},
        "status": {"replicas": number(object, "status.replicas"), "selector": selector(&object["spec"]["selector"])},
    })
}

/// The workload's difference that a written Scale asks for.
pub fn difference(scale: &Value) -> Result<Value, ApiError> {
    let replicas = match at(scale, "spec.replicas") {
        None => 0,
        Some(value) => value.as_i64().filter(|n| i32::try_from(*n).is_ok()).ok_or_else(|| {
            let found = if value.is_string() { "string" } else { "value" };
            ApiError::bad_request(format!(
                "Scale in version \"v1\" cannot be handled as a Scale: json: cannot unmarshal {found} into Go struct \
                 field ScaleSpec.spec.replicas of type int32"
            ))
        })?,
    };
    let mut patch = json!({"spec": {"replicas": replicas}});
    let version = text(scale, "metadata.resourceVersion");
    if !version.is_empty() {
        patch["metadata"] = json!({ "resourceVersion": version });
    }
    Ok(patch)
}

fn selector(selector: &Value) -> String {
    let labels = at(selector, "matchLabels").and_then(Value::as_object).into_iter().flatten();
    let mut parts: Vec<String> = labels.map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
    for expression in list(selector, "matchExpressions") {
        let key = text(expression, "key");
        let values: Vec<&str> = list(expression, "values").iter().filter_map(Value::as_str).collect();
        parts.push(match text(expression, "operator") {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    parts.join(",")
}
