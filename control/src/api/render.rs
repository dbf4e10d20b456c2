//! Objects, lists and watch events in the form a client accepts: as they are, as rows for people, or metadata only.
//!
//! PURE: the present moment is an argument.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::kinds::Kind;
use super::registry::Listed;
use super::request::{Form, Include};

/// One object.
pub fn object(kind: &Kind, form: Form, object: Value, now: Timestamp) -> Value {
    match form {
        Form::Object => object,
        Form::Metadata => metadata_only(object, "PartialObjectMetadata"),
        Form::Table(include) => {
            let version = object["metadata"]["resourceVersion"].clone();
            table(kind, include, &[object], json!({ "resourceVersion": version }), true, now)
        }
    }
}

/// A list.
pub fn list(kind: &Kind, form: Form, listed: Listed, now: Timestamp) -> Value {
    let mut metadata = json!({"resourceVersion": listed.revision.to_string()});
    if !listed.continue_token.is_empty() {
        metadata["continue"] = json!(listed.continue_token);
        if let Some(remaining) = listed.remaining {
            metadata["remainingItemCount"] = json!(remaining);
        }
    }
    match form {
        Form::Table(include) => table(kind, include, &listed.items, metadata, true, now),
        Form::Metadata => {
            let items = listed.items.into_iter().map(|item| metadata_only(item, "PartialObjectMetadata"));
            json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
                   "items": items.collect::<Vec<_>>()})
        }
        Form::Object => {
            json!({"kind": kind.list_kind(), "apiVersion": kind.api_version(), "metadata": metadata, "items": listed.items})
        }
    }
}

/// One event of a watch. Columns are told with the first row only.
pub fn watched(kind: &Kind, form: Form, object: &Value, first: bool, now: Timestamp) -> Value {
    match form {
        Form::Object => object.clone(),
        Form::Metadata => metadata_only(object.clone(), "PartialObjectMetadata"),
        Form::Table(include) => {
            let version = object["metadata"]["resourceVersion"].clone();
            table(kind, include, std::slice::from_ref(object), json!({ "resourceVersion": version }), first, now)
        }
    }
}

fn table(kind: &Kind, include: Include, objects: &[Value], metadata: Value, columns: bool, now: Timestamp) -> Value {
    let carried = |object: &Value| match include {
        Include::Nothing => Value::Null,
        Include::Metadata => metadata_only(without_managers(object), "PartialObjectMetadata"),
        Include::Object => object.clone(),
    };
    let definitions: Vec<Value> = kind
        .columns
        .iter()
        .map(|column| {
            let format = if column.name == "Name" { "name" } else { "" };
            json!({"name": column.name, "type": column.kind, "format": format, "description": column.name,
                   "priority": i32::from(column.wide)})
        })
        .collect();
    let rows: Vec<Value> =
        objects.iter().map(|object| json!({"cells": (kind.cells)(object, now), "object": carried(object)})).collect();
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": if columns { definitions } else { Vec::new() }, "rows": rows,
    })
}

/// A row carries its object's identity; who set which field is of no use there.
fn without_managers(object: &Value) -> Value {
    let mut metadata = object["metadata"].clone();
    super::value::fields(&mut metadata).remove("managedFields");
    json!({ "metadata": metadata })
}

fn metadata_only(mut object: Value, kind: &str) -> Value {
    json!({"kind": kind, "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"].take()})
}
