//! Small readings of objects held as JSON, and the two texts every object is told by: its age and its timestamps.
//!
//! PURE: the present moment is an argument.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value};

/// The value at a dotted path.
pub fn at<'v>(object: &'v Value, path: &str) -> Option<&'v Value> {
    path.split('.').try_fold(object, |value, name| value.get(name))
}

/// The text at a dotted path, empty if there is none.
pub fn text<'v>(object: &'v Value, path: &str) -> &'v str {
    at(object, path).and_then(Value::as_str).unwrap_or_default()
}

/// The number at a dotted path, 0 if there is none.
pub fn number(object: &Value, path: &str) -> i64 {
    at(object, path).and_then(Value::as_i64).unwrap_or_default()
}

/// The list at a dotted path, empty if there is none.
pub fn list<'v>(object: &'v Value, path: &str) -> &'v [Value] {
    at(object, path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The object's fields, made an object first if it is none.
pub fn fields(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("made an object above")
}

/// Sets a field that is absent.
pub fn default(value: &mut Value, name: &str, to: impl Into<Value>) {
    let fields = fields(value);
    if !fields.contains_key(name) {
        fields.insert(name.to_owned(), to.into());
    }
}

/// The object's name.
pub fn name(object: &Value) -> &str {
    text(object, "metadata.name")
}

/// The object's namespace, empty for cluster-wide ones.
pub fn namespace(object: &Value) -> &str {
    text(object, "metadata.namespace")
}

/// A condition of the object's status.
pub fn condition<'v>(object: &'v Value, kind: &str) -> Option<&'v Value> {
    list(object, "status.conditions").iter().find(|c| text(c, "type") == kind)
}

/// A timestamp as Kubernetes writes it.
pub fn rfc3339(now: Timestamp) -> String {
    k8s_openapi::jiff::fmt::strtime::format("%Y-%m-%dT%H:%M:%SZ", now).expect("a valid format of a valid time")
}

/// A timestamp with microseconds.
pub fn rfc3339_micro(now: Timestamp) -> String {
    let micros = now.subsec_nanosecond() / 1_000;
    let seconds = k8s_openapi::jiff::fmt::strtime::format("%Y-%m-%dT%H:%M:%S", now);
    format!("{}.{micros:06}Z", seconds.expect("a valid format of a valid time"))
}

/// Whole seconds since a timestamp in the object; `None` if it is absent or malformed.
pub fn seconds_since(object: &Value, path: &str, now: Timestamp) -> Option<i64> {
    let then: Timestamp = text(object, path).parse().ok()?;
    Some(now.as_second() - then.as_second())
}

/// How long ago, as kubectl prints it.
pub fn age(object: &Value, path: &str, now: Timestamp) -> String {
    seconds_since(object, path, now).map_or("<unknown>".to_owned(), human_duration)
}

/// `45s`, `3m20s`, `5h10m`, `3d`, …: Kubernetes' rounding.
pub fn human_duration(seconds: i64) -> String {
    let (minutes, hours) = (seconds / 60, seconds / 3_600);
    let days = hours / 24;
    let pair = |big: i64, big_unit: &str, small: i64, small_unit: &str| {
        if small == 0 { format!("{big}{big_unit}") } else { format!("{big}{big_unit}{small}{small_unit}") }
    };
    match seconds {
        s if s < -1 => "<invalid>".to_owned(),
        s if s < 0 => "0s".to_owned(),
        s if s < 120 => format!("{s}s"),
        s if s < 600 => pair(minutes, "m", s % 60, "s"),
        s if s < 3 * 3_600 => format!("{minutes}m"),
        s if s < 8 * 3_600 => pair(hours, "h", minutes % 60, "m"),
        s if s < 48 * 3_600 => format!("{hours}h"),
        s if s < 192 * 3_600 => pair(days, "d", hours % 24, "h"),
        s if s < 2 * 365 * 86_400 => format!("{days}d"),
        s if s < 8 * 365 * 86_400 => pair(days / 365, "y", days % 365, "d"),
        _ => format!("{}y", days / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_like_kubectl() {
        let cases = [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (200, "3m20s"),
            (3_600, "60m"),
            (4 * 3_600 + 600, "4h10m"),
            (9 * 3_600, "9h"),
            (3 * 86_400, "3d"),
            (3 * 86_400 + 3_600, "3d1h"),
            (30 * 86_400, "30d"),
        ];
        for (seconds, want) in cases {
            assert_eq!(human_duration(seconds), want);
        }
    }
}
