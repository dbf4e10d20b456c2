//! The shape of every object: built once from the types' JSON schemas, it says which fields exist, of which type they
//! are and how lists merge. Decoding a request body against it names the wrong field, finds unknown ones, and drops
//! nulls as Kubernetes does.
//!
//! PURE. What a field's value must satisfy beyond its type is in `validate`.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::lists::{self, ListRule};
use crate::quantity;

/// Where the generated schemas refer to each other.
pub const DEFINITIONS: &str = "#/components/schemas/";
/// Deepest nesting of a body; deeper is refused before it costs stack.
const MAX_DEPTH: usize = 64;

/// The type of a value.
#[derive(Debug)]
pub enum Shape {
    /// Known fields.
    Object(ObjectShape),
    /// Free keys, one type of value.
    Map(Arc<Shape>),
    /// A list; how it merges is at the field that holds it.
    List(Arc<Shape>),
    /// Text.
    Text,
    /// Text that is one of these.
    Choice(Vec<String>),
    /// Whole number of 32 or 64 bits.
    Integer {
        /// Wider than 32 bits.
        long: bool,
    },
    /// Any number.
    Number,
    /// True or false.
    Boolean,
    /// Number or text.
    IntOrString,
    /// A Kubernetes quantity.
    Quantity,
    /// A point in time, RFC 3339.
    Time,
    /// Base64.
    Bytes,
    /// Anything at all.
    Any,
}

/// Fields of an object type.
#[derive(Debug)]
pub struct ObjectShape {
    /// Name of the type, for messages (`DeploymentSpec`).
    pub name: String,
    /// Its fields.
    pub fields: BTreeMap<String, Field>,
    /// Those that must be there.
    pub required: Vec<String>,
}

/// One field.
#[derive(Debug)]
pub struct Field {
    /// Its type.
    pub shape: Arc<Shape>,
    /// How it merges, if a list.
    pub rule: ListRule,
}

impl Shape {
    /// The field's type and rule, for objects; map values for maps.
    pub fn field(&self, name: &str) -> Option<(&Shape, ListRule)> {
        match self {
            Shape::Object(object) => object.fields.get(name).map(|field| (&*field.shape, field.rule)),
            Shape::Map(value) => Some((value, lists::ATOMIC)),
            _ => None,
        }
    }

    /// Type of a list's elements.
    pub fn element(&self) -> &Shape {
        match self {
            Shape::List(element) => element,
            _ => &Shape::Any,
        }
    }

    /// What Go calls it, as clients know it from Kubernetes' messages.
    fn go_name(&self) -> String {
        match self {
            Shape::Object(object) => format!("v1.{}", object.name),
            Shape::Map(value) => format!("map[string]{}", value.go_name()),
            Shape::List(element) => format!("[]{}", element.go_name()),
            Shape::Text | Shape::Choice(_) => "string".to_owned(),
            Shape::Integer { long: false } => "int32".to_owned(),
            Shape::Integer { long: true } => "int64".to_owned(),
            Shape::Number => "float64".to_owned(),
            Shape::Boolean => "bool".to_owned(),
            Shape::IntOrString => "intstr.IntOrString".to_owned(),
            Shape::Quantity => "resource.Quantity".to_owned(),
            Shape::Time => "time.Time".to_owned(),
            Shape::Bytes => "[]byte".to_owned(),
            Shape::Any => "interface {}".to_owned(),
        }
    }
}

/// Builds shapes from generated definitions.
pub struct Builder<'a> {
    definitions: &'a Map<String, Value>,
    known: HashMap<String, Arc<Shape>>,
}

impl<'a> Builder<'a> {
    /// A builder over `components/schemas`.
    pub fn new(definitions: &'a Map<String, Value>) -> Self {
        Builder { definitions, known: HashMap::new() }
    }

    /// The shape of a named definition.
    pub fn named(&mut self, name: &str) -> Arc<Shape> {
        if let Some(known) = self.known.get(name) {
            return known.clone();
        }
        // A type that contains itself (none of ours does) ends here as anything.
        self.known.insert(name.to_owned(), Arc::new(Shape::Any));
        let shape = match name.rsplit('.').next().unwrap_or(name) {
            "Quantity" => Arc::new(Shape::Quantity),
            "IntOrString" => Arc::new(Shape::IntOrString),
            _ => self.definitions.get(name).map_or(Arc::new(Shape::Any), |schema| self.build(schema, name)),
        };
        self.known.insert(name.to_owned(), shape.clone());
        shape
    }

    fn build(&mut self, schema: &Value, name: &str) -> Arc<Shape> {
        if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
            return self.named(reference.strip_prefix(DEFINITIONS).unwrap_or(reference));
        }
        for combined in ["anyOf", "oneOf", "allOf"] {
            let real = |part: &&Value| part.get("type").and_then(Value::as_str) != Some("null");
            if let Some(part) = schema.get(combined).and_then(Value::as_array).and_then(|all| all.iter().find(real)) {
                return self.build(part, name);
            }
        }
        if let Some(choices) = schema.get("enum").and_then(Value::as_array) {
            let texts = choices.iter().filter_map(Value::as_str).map(str::to_owned);
            return Arc::new(Shape::Choice(texts.collect()));
        }
        if schema.get("x-kubernetes-int-or-string").is_some() {
            return Arc::new(Shape::IntOrString);
        }
        let format = schema.get("format").and_then(Value::as_str).unwrap_or_default();
        Arc::new(match type_of(schema) {
            "string" if format == "byte" => Shape::Bytes,
            "string" if format == "date-time" => Shape::Time,
            "string" => Shape::Text,
            "integer" => Shape::Integer { long: matches!(format, "int64" | "uint32" | "uint64") },
            "number" => Shape::Number,
            "boolean" => Shape::Boolean,
            "array" => Shape::List(schema.get("items").map_or(Arc::new(Shape::Any), |items| self.build(items, name))),
            _ => self.object(schema, name),
        })
    }

    fn object(&mut self, schema: &Value, name: &str) -> Shape {
        if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
            let field = |(field, schema): (&String, &Value)| {
                let shape = self.build(schema, field);
                (field.clone(), Field { shape, rule: lists::rule(name, field) })
            };
            let fields = properties.iter().map(field).collect();
            let required = schema.get("required").and_then(Value::as_array).into_iter().flatten();
            let required = required.filter_map(Value::as_str).map(str::to_owned).collect();
            return Shape::Object(ObjectShape { name: short(name).to_owned(), fields, required });
        }
        match schema.get("additionalProperties") {
            Some(value @ Value::Object(_)) => Shape::Map(self.build(value, name)),
            _ => Shape::Any,
        }
    }
}

fn short(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

fn type_of(schema: &Value) -> &str {
    match schema.get("type") {
        Some(Value::String(name)) => name,
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).find(|n| *n != "null").unwrap_or_default(),
        _ => "",
    }
}

/// What decoding found.
#[derive(Debug, Default)]
pub struct Findings {
    /// The first value of the wrong type, in Kubernetes' words.
    pub type_error: Option<String>,
    /// Paths of unknown fields.
    pub unknown: Vec<String>,
    /// Required fields that are missing or values not among the choices: (path, message).
    pub invalid: Vec<(String, String)>,
}

/// Brings a body into the shape: drops nulls and unknown fields, makes whole floats integers and numeric quantities
/// text, and reports what does not fit.
pub fn decode(shape: &Shape, value: &mut Value) -> Findings {
    let mut decoder = Decoder { findings: Findings::default(), owner: String::new() };
    decoder.value(shape, value, &mut String::new(), 0);
    decoder.findings
}

struct Decoder {
    findings: Findings,
    owner: String,
}

impl Decoder {
    fn value(&mut self, shape: &Shape, value: &mut Value, path: &mut String, depth: usize) {
        if depth > MAX_DEPTH {
            self.findings.type_error.get_or_insert_with(|| format!("json: exceeded max depth at {path}"));
            return;
        }
        match (shape, &mut *value) {
            (Shape::Any, _) | (Shape::Text, Value::String(_)) | (Shape::Boolean, Value::Bool(_)) => {}
            (Shape::Number, Value::Number(_)) | (Shape::IntOrString, Value::String(_)) => {}
            (Shape::Object(object), Value::Object(fields)) => self.object(object, fields, path, depth),
            (Shape::Map(element), Value::Object(fields)) => {
                fields.retain(|_, value| !value.is_null());
                for (key, value) in fields {
                    self.nested(path, key, |this, path| this.value(element, value, path, depth + 1));
                }
            }
            (Shape::List(element), Value::Array(items)) => {
                for (index, item) in items.iter_mut().enumerate() {
                    let length = path.len();
                    path.push_str(&format!("[{index}]"));
                    self.value(element, item, path, depth + 1);
                    path.truncate(length);
                }
            }
            (Shape::Choice(choices), Value::String(text)) => {
                if !choices.contains(text) {
                    let supported: Vec<String> = choices.iter().map(|choice| format!("\"{choice}\"")).collect();
                    let list = supported.join(", ");
                    let message = format!("Unsupported value: \"{text}\": supported values: {list}");
                    self.findings.invalid.push((path.clone(), message));
                }
            }
            (Shape::Integer { .. } | Shape::IntOrString, Value::Number(_)) => self.integer(shape, value, path),
            (Shape::Quantity, Value::String(text)) => {
                if quantity::parse_milli(text).is_none() {
                    let message = "quantities must match the regular expression \
                                   '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";
                    self.findings.type_error.get_or_insert_with(|| format!("{path}: {message}"));
                }
            }
            (Shape::Quantity, Value::Number(number)) => *value = Value::String(number.to_string()),
            (Shape::Time, Value::String(text)) => {
                if text.parse::<k8s_openapi::jiff::Timestamp>().is_err() {
                    let message =
                        format!("{path}: parsing time \"{text}\" as \"2006-01-02T15:04:05Z07:00\": cannot parse");
                    self.findings.type_error.get_or_insert(message);
                }
            }
            (Shape::Bytes, Value::String(text)) => {
                use base64::Engine as _;
                if base64::engine::general_purpose::STANDARD.decode(text.as_bytes()).is_err() {
                    let message = format!("{path}: illegal base64 data");
                    self.findings.type_error.get_or_insert(message);
                }
            }
            _ => self.wrong_type(shape, value, path),
        }
    }

    fn object(&mut self, object: &ObjectShape, fields: &mut Map<String, Value>, path: &mut String, depth: usize) {
        let mut unknown = Vec::new();
        fields.retain(|name, value| {
            let known = object.fields.contains_key(name);
            if !known {
                unknown.push(join(path, name));
            }
            known && !value.is_null()
        });
        self.findings.unknown.extend(unknown);
        for (name, value) in fields.iter_mut() {
            let Some(field) = object.fields.get(name) else { continue };
            let owner = std::mem::replace(&mut self.owner, object.name.clone());
            self.nested(path, name, |this, path| this.value(&field.shape, value, path, depth + 1));
            self.owner = owner;
        }
        // A status is written by programs that leave out what is empty.
        if !path.starts_with("status") && !path.is_empty() {
            for name in object.required.iter().filter(|name| !fields.contains_key(*name)) {
                self.findings.invalid.push((join(path, name), "Required value".to_owned()));
            }
        }
    }

    fn nested(&mut self, path: &mut String, name: &str, run: impl FnOnce(&mut Self, &mut String)) {
        let length = path.len();
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(name);
        run(self, path);
        path.truncate(length);
    }

    fn integer(&mut self, shape: &Shape, value: &mut Value, path: &str) {
        let whole = value.as_i64().or_else(|| {
            let float = value.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 9e15)?;
            #[allow(clippy::cast_possible_truncation)] // whole and in range, checked above
            Some(float as i64)
        });
        let fits = |n: &i64| matches!(shape, Shape::Integer { long: true }) || i32::try_from(*n).is_ok();
        match whole.filter(fits) {
            Some(number) => *value = Value::from(number),
            None => self.wrong_type(shape, value, path),
        }
    }

    fn wrong_type(&mut self, shape: &Shape, value: &Value, path: &str) {
        let found = match value {
            Value::Null => return,
            Value::Bool(_) => "bool".to_owned(),
            Value::Number(number) => format!("number {number}"),
            Value::String(_) => "string".to_owned(),
            Value::Array(_) => "array".to_owned(),
            Value::Object(_) => "object".to_owned(),
        };
        let (owner, want) = (&self.owner, shape.go_name());
        let message = format!("json: cannot unmarshal {found} into Go struct field {owner}.{path} of type {want}");
        self.findings.type_error.get_or_insert(message);
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}
