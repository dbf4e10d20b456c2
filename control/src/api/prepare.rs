//! From what a client sent to what is stored: decoding, defaults, what only the server may set, what a subresource may
//! change, checks. One path for every kind; the differences are in the table.
//!
//! PURE: the moment, the uid and the name suffix are arguments.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::families;
use super::kinds::Kind;
use super::schema::{Findings, decode};
use super::services;
use super::status::{ApiError, Invalid};
use super::validate;
use super::value::{default, fields, list, name, number, rfc3339, text};

/// What to do with fields nobody knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FieldValidation {
    /// Refuse the request.
    Strict,
    /// Drop them and warn.
    #[default]
    Warn,
    /// Drop them.
    Ignore,
}

/// How the body came: it decides how a wrong type is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The client sent the object.
    Body,
    /// The client sent a difference.
    Patch,
}

/// What is fresh in a new object.
#[derive(Debug, Clone)]
pub struct Fresh {
    /// The moment.
    pub now: Timestamp,
    /// Its uid.
    pub uid: String,
    /// Ends a generated name.
    pub suffix: String,
}

/// A prepared object and what to warn the client of.
pub type Prepared = Result<(Value, Vec<String>), ApiError>;

/// Checks that the body says it is what its path says.
pub fn check_type(kind: &Kind, body: &Value) -> Result<(), ApiError> {
    if !body.is_object() {
        return Err(ApiError::bad_request("the body of the request must be an object"));
    }
    let (got_kind, got_version) = (text(body, "kind"), text(body, "apiVersion"));
    if got_kind.is_empty() && got_version.is_empty() {
        return Ok(());
    }
    let (want, version) = (kind.kind, kind.api_version());
    if got_version != version {
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({got_version}) does not match the expected API version ({version})"
        )));
    }
    if got_kind != want {
        let message = format!(
            "{got_kind} in version \"{}\" cannot be handled as a {want}: converting is not possible",
            kind.version
        );
        return Err(ApiError::bad_request(message));
    }
    Ok(())
}

/// Decodes into the kind's shape; the messages are warnings.
fn decoded(kind: &Kind, mut body: Value, mode: FieldValidation, origin: Origin) -> Prepared {
    body["apiVersion"] = json!(kind.api_version());
    body["kind"] = json!(kind.kind);
    default(&mut body, "metadata", json!({}));
    let Findings { type_error, unknown, invalid } = decode(&kind.shape, &mut body);
    if let Some(error) = type_error {
        if origin == Origin::Patch {
            let detail = Invalid { field: "patch".to_owned(), message: format!("Invalid value: {error}") };
            return Err(ApiError::invalid(kind, name(&body), &[detail]));
        }
        let (version, kind) = (kind.version, kind.kind);
        let message = format!("{kind} in version \"{version}\" cannot be handled as a {kind}: {error}");
        return Err(ApiError::bad_request(message));
    }
    let unknown: Vec<String> = unknown.iter().map(|path| format!("unknown field \"{path}\"")).collect();
    if mode == FieldValidation::Strict && !unknown.is_empty() {
        let (version, name) = (kind.version, kind.kind);
        let error = format!("strict decoding error: {}", unknown.join(", "));
        let message = match origin {
            Origin::Body => format!("{name} in version \"{version}\" cannot be handled as a {name}: {error}"),
            Origin::Patch => error,
        };
        return Err(ApiError::bad_request(message));
    }
    if !invalid.is_empty() {
        let errors: Vec<Invalid> = invalid.into_iter().map(|(field, message)| Invalid { field, message }).collect();
        return Err(ApiError::invalid(kind, name(&body), &errors));
    }
    Ok((body, if mode == FieldValidation::Warn { unknown } else { Vec::new() }))
}

fn check(kind: &Kind, new: &Value, old: Option<&Value>) -> Result<(), ApiError> {
    let mut errors = validate::metadata(new, kind.name_rule);
    errors.extend((kind.validate)(new, old));
    refuse(kind, new, &errors)
}

fn refuse(kind: &Kind, new: &Value, errors: &[Invalid]) -> Result<(), ApiError> {
    if errors.is_empty() { Ok(()) } else { Err(ApiError::invalid(kind, name(new), errors)) }
}

/// A new object.
pub fn create(kind: &Kind, namespace: &str, body: Value, mode: FieldValidation, fresh: &Fresh) -> Prepared {
    check_type(kind, &body)?;
    let (mut object, warnings) = decoded(kind, body, mode, Origin::Body)?;
    let given = text(&object, "metadata.namespace");
    if kind.namespaced && !given.is_empty() && given != namespace {
        return Err(ApiError::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    if !text(&object, "metadata.resourceVersion").is_empty() {
        return Err(ApiError::bad_request("resourceVersion should not be set on objects to be created"));
    }
    let metadata = &mut object["metadata"];
    if text(metadata, "name").is_empty() && !text(metadata, "generateName").is_empty() {
        let stem: String = text(metadata, "generateName").chars().take(58).collect();
        metadata["name"] = json!(format!("{stem}{}", fresh.suffix));
    }
    for name in ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "resourceVersion", "generation"] {
        fields(metadata).remove(name);
    }
    metadata["uid"] = json!(fresh.uid);
    metadata["creationTimestamp"] = json!(rfc3339(fresh.now));
    if kind.namespaced {
        metadata["namespace"] = json!(namespace);
    } else {
        fields(metadata).remove("namespace");
    }
    if kind.generation {
        metadata["generation"] = json!(1);
    }
    // A node registers with its status; every other status starts empty.
    if kind.status && kind.kind != "Node" {
        fields(&mut object).remove("status");
    }
    (kind.default)(&mut object);
    check(kind, &object, None)?;
    Ok((object, warnings))
}

/// The next state of an existing object. `subresource` is empty or `status`.
pub fn update(
    kind: &Kind,
    subresource: &str,
    old: &Value,
    body: Value,
    mode: FieldValidation,
    origin: Origin,
) -> Prepared {
    check_type(kind, &body)?;
    let (body, warnings) = decoded(kind, body, mode, origin)?;
    check_identity(kind, old, &body)?;
    let mut new = match subresource {
        "status" => {
            let mut new = old.clone();
            replace_field(&mut new, "status", &body);
            new
        }
        _ => {
            let mut new = body;
            if kind.status {
                replace_field(&mut new, "status", old);
            }
            new
        }
    };
    keep_metadata(&mut new, old);
    let service = kind.plural == "services";
    if subresource.is_empty() {
        if service {
            keep_allocated(&mut new, old);
            services::drop_dependent(&mut new, old);
        }
        (kind.default)(&mut new);
        check(kind, &new, Some(old))?;
    } else if service {
        refuse(kind, &new, &services::validate_status(&new))?;
    }
    if kind.generation && differs_in_spec(old, &new) {
        new["metadata"]["generation"] = json!(number(old, "metadata.generation") + 1);
    }
    Ok((new, warnings))
}

fn check_identity(kind: &Kind, old: &Value, body: &Value) -> Result<(), ApiError> {
    for field in ["name", "namespace"] {
        let (was, is) = (text(&old["metadata"], field), text(&body["metadata"], field));
        if !is.is_empty() && was != is {
            return Err(ApiError::bad_request(format!(
                "the {field} of the object ({is}) does not match the {field} on the URL ({was})"
            )));
        }
    }
    let (was, is) = (text(old, "metadata.uid"), text(body, "metadata.uid"));
    if !is.is_empty() && was != is {
        let why = format!("Precondition failed: UID in precondition: {is}, UID in object meta: {was}");
        return Err(ApiError::conflict(kind, name(old), &why));
    }
    let (was, is) = (text(old, "metadata.resourceVersion"), text(body, "metadata.resourceVersion"));
    if !is.is_empty() && was != is {
        return Err(ApiError::modified(kind, name(old)));
    }
    Ok(())
}

fn replace_field(target: &mut Value, field: &str, from: &Value) {
    match from.get(field) {
        Some(value) => target[field] = value.clone(),
        None => drop(fields(target).remove(field)),
    }
}

/// What only the server sets stays as it was.
fn keep_metadata(new: &mut Value, old: &Value) {
    for field in [
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "generation",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generateName",
    ] {
        match old["metadata"].get(field) {
            Some(value) => new["metadata"][field] = value.clone(),
            None => drop(fields(&mut new["metadata"]).remove(field)),
        }
    }
    fields(&mut new["metadata"]).remove("selfLink");
    let empty = |value: Option<&Value>| value.is_some_and(|v| v.as_object().is_some_and(serde_json::Map::is_empty));
    for field in ["labels", "annotations"] {
        if empty(new["metadata"].get(field)) {
            fields(&mut new["metadata"]).remove(field);
        }
    }
    // Nobody adds a finalizer to what is already going.
    if old["metadata"].get("deletionTimestamp").is_some() {
        let before = list(old, "metadata.finalizers").to_vec();
        if let Some(finalizers) = new["metadata"].get_mut("finalizers").and_then(Value::as_array_mut) {
            finalizers.retain(|finalizer| before.contains(finalizer));
        }
    }
    if list(new, "metadata.finalizers").is_empty() {
        fields(&mut new["metadata"]).remove("finalizers");
    }
    // An update that says nothing of managers leaves them as they were.
    if new["metadata"].get("managedFields").is_none_or(|m| m.as_array().is_some_and(Vec::is_empty)) {
        replace_field(&mut new["metadata"], "managedFields", &old["metadata"]);
    }
}

/// A replaced service keeps the addresses and ports it was given.
fn keep_allocated(new: &mut Value, old: &Value) {
    families::carry_over(new, old);
    let health_check = number(old, "spec.healthCheckNodePort");
    if services::wants_health_check(new) && number(new, "spec.healthCheckNodePort") == 0 && health_check != 0 {
        new["spec"]["healthCheckNodePort"] = json!(health_check);
    }
    // Who wants none gives those back that it does not name.
    if !services::wants_node_ports(new) {
        return;
    }
    let same = |a: &Value, b: &Value| a["port"] == b["port"] && text(a, "protocol") == text(b, "protocol");
    for port in new["spec"].get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        default(port, "protocol", "TCP");
        if number(port, "nodePort") == 0
            && let Some(before) = list(old, "spec.ports").iter().find(|before| same(before, port))
            && number(before, "nodePort") != 0
        {
            port["nodePort"] = before["nodePort"].clone();
        }
    }
}

fn differs_in_spec(old: &Value, new: &Value) -> bool {
    let own = |object: &Value| {
        let fields = object.as_object().cloned().unwrap_or_default();
        fields.into_iter().filter(|(name, _)| name != "metadata" && name != "status").collect::<Vec<_>>()
    };
    own(old) != own(new)
}
