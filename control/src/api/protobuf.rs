//! Bodies in Kubernetes' protobuf encoding, which `kubectl create`, `drain` and typed Go clients send. A body is turned
//! into the JSON it stands for, by the field numbers in `protobuf_fields.txt` and the JSON names of the kinds' own types;
//! everything after that is the same as for JSON. Answers are always JSON, which these clients accept.
//!
//! PURE. Nothing in a body can cost more than its length: depth is bounded, and lengths are checked before use.

use std::collections::HashMap;
use std::sync::LazyLock;

use base64::Engine as _;
use serde_json::{Map, Value, json};

use super::kinds;
use super::schema::Shape;
use super::status::ApiError;
use super::value::{rfc3339, rfc3339_micro};

const MAGIC: &[u8] = b"k8s\0";
const MAX_DEPTH: usize = 48;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Count {
    One,
    List,
    Map,
}

#[derive(Debug)]
struct Field {
    name: &'static str,
    count: Count,
    /// A scalar's type, or `@` and a message's name.
    ty: &'static str,
}

type Message = HashMap<u64, Field>;

static MESSAGES: LazyLock<HashMap<&'static str, Message>> = LazyLock::new(|| {
    let mut messages: HashMap<&str, Message> = HashMap::new();
    let mut current = "";
    for line in include_str!("protobuf_fields.txt").lines().filter(|line| !line.starts_with('#')) {
        let mut parts = line.split_whitespace();
        match (line.starts_with(' '), parts.next()) {
            (false, Some(name)) => {
                current = name;
                messages.insert(name, Message::new());
            }
            (true, Some(number)) => {
                let (Ok(number), Some(name), Some(count), Some(ty)) =
                    (number.parse(), parts.next(), parts.next(), parts.next())
                else {
                    continue;
                };
                let count = match count {
                    "list" => Count::List,
                    "map" => Count::Map,
                    _ => Count::One,
                };
                messages.entry(current).or_default().insert(number, Field { name, count, ty });
            }
            _ => {}
        }
    }
    messages
});

/// Decodes a body: the magic, an envelope with apiVersion and kind, and the object.
pub fn decode(bytes: &[u8]) -> Result<Value, ApiError> {
    let broken = || ApiError::bad_request("the object provided is unrecognized (must be valid protobuf)");
    let envelope = bytes.strip_prefix(MAGIC).ok_or_else(broken)?;
    let (mut meta, mut raw) = (&[][..], &[][..]);
    for item in Items(envelope) {
        match item.ok_or_else(broken)? {
            (1, Wire::Bytes(bytes)) => meta = bytes,
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let (mut api_version, mut kind) = (String::new(), String::new());
    for item in Items(meta) {
        match item.ok_or_else(broken)? {
            (1, Wire::Bytes(bytes)) => api_version = String::from_utf8_lossy(bytes).into_owned(),
            (2, Wire::Bytes(bytes)) => kind = String::from_utf8_lossy(bytes).into_owned(),
            _ => {}
        }
    }
    let name = message_name(&api_version, &kind);
    let Some(name) = name.filter(|name| MESSAGES.contains_key(name.as_str())) else {
        return Err(ApiError::unsupported_media(format!(
            "protobuf is not understood for {kind} in {api_version}; send application/json"
        )));
    };
    let mut object = message(&name, &shape_of(&api_version, &kind), raw, 0).ok_or_else(broken)?;
    (object["apiVersion"], object["kind"]) = (json!(api_version), json!(kind));
    Ok(object)
}

/// `apps/v1` and `Deployment` → `apps.v1.Deployment`.
fn message_name(api_version: &str, kind: &str) -> Option<String> {
    if kind == "DeleteOptions" {
        return Some("apis.meta.v1.DeleteOptions".to_owned());
    }
    let (group, version) = api_version.split_once('/').unwrap_or(("core", api_version));
    Some(format!("{}.{version}.{kind}", group.split('.').next()?))
}

enum ShapeRef {
    Known(std::sync::Arc<Shape>),
    Unknown,
}

/// The JSON names of the kind's fields, if it is one of the table.
fn shape_of(api_version: &str, kind: &str) -> ShapeRef {
    let found = kinds::table().kinds.iter().find(|known| known.kind == kind && known.api_version() == api_version);
    found.map_or(ShapeRef::Unknown, |kind| ShapeRef::Known(kind.shape.clone()))
}

fn message(name: &str, shape: &ShapeRef, bytes: &[u8], depth: usize) -> Option<Value> {
    let shape = match shape {
        ShapeRef::Known(shape) => shape,
        ShapeRef::Unknown => &Shape::Any,
    };
    let mut out = Map::new();
    read(name, shape, bytes, depth, &mut out)?;
    Some(Value::Object(out))
}

/// Reads a message's fields into an object.
fn read(name: &str, shape: &Shape, bytes: &[u8], depth: usize, out: &mut Map<String, Value>) -> Option<()> {
    let fields = MESSAGES.get(name).filter(|_| depth < MAX_DEPTH)?;
    for item in Items(bytes) {
        let (number, wire) = item?;
        let Some(field) = fields.get(&number) else { continue };
        let Some(json_name) = json_name(shape, field.name) else {
            // Embedded in the Go type: its fields are the parent's own.
            if let (Some(inner), Wire::Bytes(bytes)) = (field.ty.strip_prefix('@'), &wire) {
                read(inner, shape, bytes, depth + 1, out)?;
            }
            continue;
        };
        let inner = shape.field(&json_name).map_or(&Shape::Any, |(inner, _)| inner);
        match field.count {
            Count::One => {
                let value = value(field.ty, inner, &wire, depth)?;
                if !is_default(&json_name, &value) {
                    out.insert(json_name, value);
                }
            }
            Count::List => {
                let value = value(field.ty, inner.element(), &wire, depth)?;
                if let Value::Array(items) = out.entry(json_name).or_insert_with(|| json!([])) {
                    items.push(value);
                }
            }
            Count::Map => {
                let (key, value) = entry(field.ty, &wire, depth)?;
                if let Value::Object(entries) = out.entry(json_name).or_insert_with(|| json!({})) {
                    entries.insert(key, value);
                }
            }
        }
    }
    Some(())
}

/// `pod_ip` → `podIP`: the JSON name is the type's; without a type, plain camel case. `None` = no field of that name.
fn json_name(shape: &Shape, name: &str) -> Option<String> {
    let plain = name.replace('_', "");
    match shape {
        Shape::Object(object) => object.fields.keys().find(|known| known.eq_ignore_ascii_case(&plain)).cloned(),
        _ => {
            let mut parts = name.split('_').filter(|part| !part.is_empty());
            let mut camel = parts.next()?.to_owned();
            for part in parts {
                let mut letters = part.chars();
                camel.extend(letters.next().map(|first| first.to_ascii_uppercase()));
                camel.push_str(letters.as_str());
            }
            Some(camel)
        }
    }
}

fn entry(ty: &str, wire: &Wire<'_>, depth: usize) -> Option<(String, Value)> {
    let Wire::Bytes(bytes) = wire else { return None };
    let (mut key, mut found) = (String::new(), None);
    for item in Items(bytes) {
        match item? {
            (1, Wire::Bytes(bytes)) => key = String::from_utf8(bytes.to_vec()).ok()?,
            (2, wire) => found = Some(value(ty, &Shape::Any, &wire, depth)?),
            _ => {}
        }
    }
    let absent = || if ty.starts_with('@') && ty.ends_with("Quantity") { json!("0") } else { json!("") };
    Some((key, found.unwrap_or_else(absent)))
}

#[allow(clippy::cast_possible_wrap)] // two's complement is how the encoding has negative numbers
fn value(ty: &str, shape: &Shape, wire: &Wire<'_>, depth: usize) -> Option<Value> {
    Some(match (ty, wire) {
        ("bool", Wire::Number(number)) => json!(*number != 0),
        ("int32" | "int64" | "uint32" | "uint64", Wire::Number(number)) => json!(*number as i64),
        ("double", Wire::Number(bits)) => json!(f64::from_bits(*bits)),
        ("string", Wire::Bytes(bytes)) => json!(std::str::from_utf8(bytes).ok()?),
        ("bytes", Wire::Bytes(bytes)) => json!(base64::engine::general_purpose::STANDARD.encode(bytes)),
        (ty, Wire::Bytes(bytes)) => {
            let name = ty.strip_prefix('@')?;
            match name.rsplit('.').next()? {
                "Time" => time(bytes, false)?,
                "MicroTime" => time(bytes, true)?,
                "Quantity" => text_field(bytes, 1)?,
                "IntOrString" => int_or_string(bytes)?,
                "FieldsV1" | "RawExtension" => raw_json(bytes),
                _ => {
                    let mut out = Map::new();
                    read(name, shape, bytes, depth + 1, &mut out)?;
                    Value::Object(out)
                }
            }
        }
        _ => return None,
    })
}

fn time(bytes: &[u8], micro: bool) -> Option<Value> {
    let (mut seconds, mut nanos) = (None, 0_i32);
    for item in Items(bytes) {
        #[allow(clippy::cast_possible_wrap)] // two's complement
        match item? {
            (1, Wire::Number(number)) => seconds = Some(number as i64),
            (2, Wire::Number(number)) => nanos = i32::try_from(number as i64).ok()?,
            _ => {}
        }
    }
    // An empty message is Go's zero time, which JSON leaves out.
    let Some(seconds) = seconds else { return Some(Value::Null) };
    let moment = k8s_openapi::jiff::Timestamp::new(seconds, nanos).ok()?;
    Some(json!(if micro { rfc3339_micro(moment) } else { rfc3339(moment) }))
}

fn text_field(bytes: &[u8], wanted: u64) -> Option<Value> {
    for item in Items(bytes) {
        if let (number, Wire::Bytes(text)) = item?
            && number == wanted
        {
            return Some(json!(std::str::from_utf8(text).ok()?));
        }
    }
    Some(json!("0"))
}

fn int_or_string(bytes: &[u8]) -> Option<Value> {
    let (mut is_text, mut number, mut text) = (false, 0_i64, String::new());
    for item in Items(bytes) {
        #[allow(clippy::cast_possible_wrap)] // two's complement
        match item? {
            (1, Wire::Number(kind)) => is_text = kind == 1,
            (2, Wire::Number(value)) => number = value as i64,
            (3, Wire::Bytes(value)) => text = String::from_utf8(value.to_vec()).ok()?,
            _ => {}
        }
    }
    Some(if is_text { json!(text) } else { json!(number) })
}

fn raw_json(bytes: &[u8]) -> Value {
    let raw = Items(bytes).flatten().find_map(|item| match item {
        (1, Wire::Bytes(raw)) => serde_json::from_slice(raw).ok(),
        _ => None,
    });
    raw.unwrap_or(Value::Null)
}

/// Go's encoder writes fields that are not set, where the type is not a pointer; JSON leaves them out. Numbers and flags
/// for which nothing and zero differ are pointers in Go, and are kept.
fn is_default(name: &str, value: &Value) -> bool {
    const KEPT: &[&str] = &[
        "replicas",
        "terminationGracePeriodSeconds",
        "gracePeriodSeconds",
        "activeDeadlineSeconds",
        "tolerationSeconds",
        "revisionHistoryLimit",
        "progressDeadlineSeconds",
        "runAsUser",
        "runAsGroup",
        "fsGroup",
        "priority",
        "defaultMode",
        "mode",
        "expirationSeconds",
        "deletionGracePeriodSeconds",
        "leaseTransitions",
        "restartCount",
        "exitCode",
        "controller",
        "blockOwnerDeletion",
        "automountServiceAccountToken",
        "allowPrivilegeEscalation",
        "runAsNonRoot",
        "readOnlyRootFilesystem",
        "enableServiceLinks",
        "immutable",
        "optional",
        "ready",
        "serving",
        "terminating",
        "orphanDependents",
        "allocateLoadBalancerNodePorts",
        "started",
        "privileged",
        "hostUsers",
    ];
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Bool(flag) => !flag && !KEPT.contains(&name),
        Value::Number(number) => number.as_f64() == Some(0.0) && !KEPT.contains(&name),
        _ => false,
    }
}

enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of an encoded message; `None` inside once it is malformed.
struct Items<'a>(&'a [u8]);

impl<'a> Iterator for Items<'a> {
    type Item = Option<(u64, Wire<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let item = self.take_field();
        if item.is_none() {
            self.0 = &[];
        }
        Some(item)
    }
}

impl<'a> Items<'a> {
    fn take_field(&mut self) -> Option<(u64, Wire<'a>)> {
        let tag = self.varint()?;
        let wire = match tag & 7 {
            0 => Wire::Number(self.varint()?),
            1 => Wire::Number(u64::from_le_bytes(self.take(8)?.try_into().ok()?)),
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => Wire::Number(u64::from(u32::from_le_bytes(self.take(4)?.try_into().ok()?))),
            _ => return None,
        };
        Some((tag >> 3, wire))
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_field(number: u8, content: &[u8]) -> Vec<u8> {
        let length = u8::try_from(content.len()).expect("short");
        [&[number << 3 | 2, length][..], content].concat()
    }

    fn body(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let meta = [bytes_field(1, api_version.as_bytes()), bytes_field(2, kind.as_bytes())].concat();
        [MAGIC, &bytes_field(1, &meta), &bytes_field(2, raw)].concat()
    }

    #[test]
    fn a_deployment_decodes() {
        let metadata = [bytes_field(1, b"web"), bytes_field(2, b"")].concat();
        let spec = [&[8, 0][..], &bytes_field(4, &bytes_field(1, b"Recreate"))].concat();
        let raw = [bytes_field(1, &metadata), bytes_field(2, &spec)].concat();
        let object = decode(&body("apps/v1", "Deployment", &raw)).expect("decodes");
        let want = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
            "spec": {"replicas": 0, "strategy": {"type": "Recreate"}}});
        assert_eq!(object, want);
    }

    #[test]
    fn every_kind_of_the_table_that_clients_encode_is_known() {
        for kind in kinds::table().kinds.iter().filter(|kind| kind.strategic) {
            let name = message_name(&kind.api_version(), kind.kind).expect("a name");
            assert!(MESSAGES.contains_key(name.as_str()), "{name}");
        }
        for message in MESSAGES.values() {
            for field in message.values() {
                let special = ["Time", "MicroTime", "Quantity", "IntOrString", "FieldsV1", "RawExtension"];
                let Some(inner) = field.ty.strip_prefix('@') else { continue };
                assert!(
                    MESSAGES.contains_key(inner) || special.contains(&inner.rsplit('.').next().unwrap_or_default()),
                    "{inner}"
                );
            }
        }
    }

    #[test]
    fn nothing_malformed_panics() {
        use rand::{Rng, SeedableRng};
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let good = body("v1", "Pod", &bytes_field(2, &bytes_field(2, &bytes_field(1, b"c"))));
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            let at = rng.random_range(0..bytes.len());
            bytes[at] = rng.random();
            bytes.truncate(rng.random_range(0..=bytes.len()));
            drop(decode(&bytes));
        }
        assert_eq!(decode(&body("v1", "Widget", b"")).expect_err("unknown").code, 415);
    }
}
