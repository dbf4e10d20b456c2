//! Errors as Kubernetes tells them: a Status object with code, reason, message and details, in Kubernetes' own words,
//! because kubectl and client libraries act on them.

use serde_json::{Value, json};

use super::kinds::Kind;
use crate::store::StoreError;

/// One wrong field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    /// Path of the field, such as `spec.replicas`.
    pub field: String,
    /// What is wrong, beginning with Kubernetes' class of error (`Invalid value: …`, `Required value`).
    pub message: String,
}

impl Invalid {
    /// A field with a value it must not have.
    pub fn value(field: impl Into<String>, value: &Value, detail: &str) -> Self {
        Invalid { field: field.into(), message: format!("Invalid value: {value}: {detail}") }
    }

    /// A field that must be set.
    pub fn required(field: impl Into<String>, detail: &str) -> Self {
        let message = if detail.is_empty() { "Required value".to_owned() } else { format!("Required value: {detail}") };
        Invalid { field: field.into(), message }
    }

    /// A list that is too long.
    pub fn too_many(field: impl Into<String>, count: usize, most: usize) -> Self {
        Invalid { field: field.into(), message: format!("Too many: {count}: must have at most {most} items") }
    }

    /// A field that must not be set, or not be changed.
    pub fn forbidden(field: impl Into<String>, detail: &str) -> Self {
        Invalid { field: field.into(), message: format!("Forbidden: {detail}") }
    }

    /// A value that is not one of a few.
    pub fn unsupported(field: impl Into<String>, value: &str, supported: &[&str]) -> Self {
        let list = supported.iter().map(|s| format!("\"{s}\"")).collect::<Vec<_>>().join(", ");
        Invalid { field: field.into(), message: format!("Unsupported value: \"{value}\": supported values: {list}") }
    }

    fn cause(&self) -> Value {
        let reason = match self.message.split(':').next().unwrap_or_default() {
            "Required value" => "FieldValueRequired",
            "Forbidden" => "FieldValueForbidden",
            "Unsupported value" => "FieldValueNotSupported",
            "Duplicate value" => "FieldValueDuplicate",
            "Too many" => "FieldValueTooMany",
            _ => "FieldValueInvalid",
        };
        json!({"reason": reason, "message": self.message, "field": self.field})
    }
}

/// An answer that is not the object asked for.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub code: u16,
    /// Machine-readable reason.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// Kubernetes' details object, or null.
    pub details: Value,
    /// Seconds after which to try again.
    pub retry_after_s: Option<u32>,
}

impl ApiError {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        ApiError { code, reason, message: message.into(), details: Value::Null, retry_after_s: None }
    }

    fn about(mut self, kind: &Kind, name: &str) -> Self {
        self.details = json!({"name": name, "kind": kind.plural});
        if !kind.group.is_empty() {
            self.details["group"] = json!(kind.group);
        }
        self
    }

    /// No such path or kind.
    pub fn no_such_resource() -> Self {
        ApiError::new(404, "NotFound", "the server could not find the requested resource")
    }

    /// No such object.
    pub fn not_found(kind: &Kind, name: &str) -> Self {
        ApiError::new(404, "NotFound", format!("{} \"{name}\" not found", kind.resource())).about(kind, name)
    }

    /// The name is taken.
    pub fn already_exists(kind: &Kind, name: &str) -> Self {
        let message = format!("{} \"{name}\" already exists", kind.resource());
        ApiError::new(409, "AlreadyExists", message).about(kind, name)
    }

    /// Somebody else changed it first.
    pub fn modified(kind: &Kind, name: &str) -> Self {
        ApiError::conflict(
            kind,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// A precondition does not hold.
    pub fn conflict(kind: &Kind, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {} \"{name}\": {why}", kind.resource());
        ApiError::new(409, "Conflict", message).about(kind, name)
    }

    /// Server-side apply met fields of other managers.
    pub fn apply_conflict(message: String, causes: Vec<Value>) -> Self {
        let mut error = ApiError::new(409, "Conflict", message);
        error.details = json!({ "causes": causes });
        error
    }

    /// Fields that must not be as they are.
    pub fn invalid(kind: &Kind, name: &str, errors: &[Invalid]) -> Self {
        let each = errors.iter().map(|e| format!("{}: {}", e.field, e.message)).collect::<Vec<_>>();
        let list = if let [one] = each.as_slice() { one.clone() } else { format!("[{}]", each.join(", ")) };
        let message = format!("{} \"{name}\" is invalid: {list}", kind.qualified());
        let mut error = ApiError::new(422, "Invalid", message);
        error.details = json!({
            "name": name, "group": kind.group, "kind": kind.kind,
            "causes": errors.iter().map(Invalid::cause).collect::<Vec<_>>(),
        });
        error
    }

    /// The request itself makes no sense.
    pub fn bad_request(message: impl Into<String>) -> Self {
        ApiError::new(400, "BadRequest", message)
    }

    /// Nobody known.
    pub fn unauthorized() -> Self {
        ApiError::new(401, "Unauthorized", "Unauthorized")
    }

    /// Known, but not allowed.
    pub fn forbidden(message: impl Into<String>) -> Self {
        ApiError::new(403, "Forbidden", message)
    }

    /// The verb does not exist there.
    pub fn method_not_allowed() -> Self {
        ApiError::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
    }

    /// Nothing the client accepts can be made.
    pub fn not_acceptable() -> Self {
        let message = "only the following media types are accepted: application/json, application/yaml";
        ApiError::new(406, "NotAcceptable", message)
    }

    /// The history asked for is gone.
    pub fn expired(message: impl Into<String>) -> Self {
        ApiError::new(410, "Expired", message)
    }

    /// The body is too long.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("Request entity too large: limit is {limit}");
        ApiError::new(413, "RequestEntityTooLarge", message)
    }

    /// The body is of a type not understood here.
    pub fn unsupported_media(message: impl Into<String>) -> Self {
        ApiError::new(415, "UnsupportedMediaType", message)
    }

    /// Our own fault.
    pub fn internal(message: impl std::fmt::Display) -> Self {
        ApiError::new(500, "InternalError", format!("Internal error occurred: {message}"))
    }

    /// Another server we need does not answer.
    pub fn bad_gateway(message: impl Into<String>) -> Self {
        ApiError::new(502, "InternalError", message)
    }

    /// For now.
    pub fn too_many_requests(message: impl Into<String>) -> Self {
        let mut error = ApiError::new(429, "TooManyRequests", message);
        error.retry_after_s = Some(1);
        error
    }

    /// The Status object.
    pub fn to_status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if !self.details.is_null() {
            status["details"] = self.details.clone();
        }
        if let Some(seconds) = self.retry_after_s {
            status["details"]["retryAfterSeconds"] = json!(seconds);
        }
        status
    }

    /// A conflict of revisions, as opposed to any other error.
    pub fn is_conflict(&self) -> bool {
        self.code == 409 && self.reason == "Conflict"
    }

    /// The object is not there.
    pub fn is_not_found(&self) -> bool {
        self.code == 404
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Compacted { requested, compacted } => {
                ApiError::expired(format!("too old resource version: {requested} ({compacted})"))
            }
            StoreError::Lagged { .. } => ApiError::expired(error.to_string()),
            StoreError::Future { requested, current } => {
                let message = format!("Too large resource version: {requested}, current: {current}");
                let mut error = ApiError::new(504, "Timeout", message);
                error.details =
                    json!({"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]});
                error.retry_after_s = Some(1);
                error
            }
            StoreError::TooLarge { .. } => ApiError::too_large(crate::store::MAX_VALUE_BYTES),
            StoreError::Engine { .. } => ApiError::internal(error),
        }
    }
}
