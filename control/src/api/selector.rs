//! Label and field selectors: parsed once per request, matched against an object's JSON.
//!
//! PURE.

use serde_json::Value;

use super::kinds::Kind;
use super::status::ApiError;
use super::value::{at, text};

/// Longest selector text accepted.
const MAX_SELECTOR: usize = 64 * 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
    Greater(String, i64),
    Less(String, i64),
}

impl Requirement {
    fn matches(&self, get: impl Fn(&str) -> Option<String>) -> bool {
        let number = |key: &str| get(key).and_then(|value| value.parse::<i64>().ok());
        match self {
            Requirement::In(key, values) => get(key).is_some_and(|value| values.contains(&value)),
            Requirement::NotIn(key, values) => get(key).is_none_or(|value| !values.contains(&value)),
            Requirement::Exists(key) => get(key).is_some(),
            Requirement::Absent(key) => get(key).is_none(),
            Requirement::Greater(key, than) => number(key).is_some_and(|n| n > *than),
            Requirement::Less(key, than) => number(key).is_some_and(|n| n < *than),
        }
    }
}

/// Both selectors of a request.
#[derive(Debug, Clone, Default)]
pub struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<Requirement>,
}

impl Selector {
    /// Parses `labelSelector` and `fieldSelector`.
    pub fn parse(kind: &Kind, labels: Option<&str>, fields: Option<&str>) -> Result<Self, ApiError> {
        let labels = parse_labels(labels.unwrap_or_default())?;
        let fields = parse_fields(kind, fields.unwrap_or_default())?;
        Ok(Selector { labels, fields })
    }

    /// Selects everything.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    /// The name, if the selector allows one name only.
    pub fn single_name(&self) -> Option<&str> {
        self.fields.iter().find_map(|requirement| match requirement {
            Requirement::In(key, values) if key == "metadata.name" && values.len() == 1 => Some(values[0].as_str()),
            _ => None,
        })
    }

    /// Whether the object is selected.
    pub fn matches(&self, object: &Value) -> bool {
        let label = |key: &str| object["metadata"]["labels"].get(key).and_then(Value::as_str).map(str::to_owned);
        let field = |path: &str| Some(field_text(object, path));
        self.labels.iter().all(|requirement| requirement.matches(label))
            && self.fields.iter().all(|requirement| requirement.matches(field))
    }
}

/// The text of a field as field selectors compare it; an absent one is empty (false, for booleans).
fn field_text(object: &Value, path: &str) -> String {
    match at(object, path) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Bool(flag)) => flag.to_string(),
        Some(Value::Number(number)) => number.to_string(),
        _ if path == "spec.unschedulable" || path == "spec.hostNetwork" => "false".to_owned(),
        // Events of the newer API keep the old names for selecting.
        _ => match path.strip_prefix("involvedObject.") {
            Some(rest) => text(object, &format!("regarding.{rest}")).to_owned(),
            None => String::new(),
        },
    }
}

fn bad(which: &str, text: &str, why: &str) -> ApiError {
    ApiError::bad_request(format!("unable to parse {which} \"{text}\": {why}"))
}

fn parse_fields(kind: &Kind, text: &str) -> Result<Vec<Requirement>, ApiError> {
    let mut requirements = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (negative, (key, value)) = match (part.split_once("!="), part.split_once("==")) {
            (Some(pair), _) => (true, pair),
            (None, Some(pair)) => (false, pair),
            (None, None) => {
                let pair = part.split_once('=');
                (false, pair.ok_or_else(|| bad("field selector", text, "expected key=value"))?)
            }
        };
        if !matches!(key, "metadata.name" | "metadata.namespace") && !kind.selectable.contains(&key) {
            return Err(ApiError::bad_request(format!("field label not supported: {key}")));
        }
        let values = vec![value.replace("\\,", ",").replace("\\=", "=")];
        requirements.push(if negative {
            Requirement::NotIn(key.to_owned(), values)
        } else {
            Requirement::In(key.to_owned(), values)
        });
    }
    Ok(requirements)
}

fn parse_labels(text: &str) -> Result<Vec<Requirement>, ApiError> {
    if text.len() > MAX_SELECTOR {
        return Err(bad("label selector", "", "it is too long"));
    }
    split_outside_parentheses(text).into_iter().map(|part| parse_label(part.trim(), text)).collect()
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (index, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts.retain(|part| !part.trim().is_empty());
    parts
}

fn parse_label(part: &str, whole: &str) -> Result<Requirement, ApiError> {
    let error = |why: &str| bad("requirement", whole, why);
    let key = |text: &str| -> Result<String, ApiError> {
        let text = text.trim();
        let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
        if text.is_empty() || !text.chars().all(valid) { Err(error("invalid label key")) } else { Ok(text.to_owned()) }
    };
    if let Some(open) = part.find('(') {
        let list = part[open + 1..].strip_suffix(')').ok_or_else(|| error("expected ')'"))?;
        let values = list.split(',').map(|value| value.trim().to_owned()).collect();
        let head = part[..open].trim();
        return match head.rsplit_once(char::is_whitespace) {
            Some((name, "in")) => Ok(Requirement::In(key(name)?, values)),
            Some((name, "notin")) => Ok(Requirement::NotIn(key(name)?, values)),
            _ => Err(error("expected in or notin")),
        };
    }
    if let Some((name, value)) = part.split_once("!=") {
        return Ok(Requirement::NotIn(key(name)?, vec![value.trim().to_owned()]));
    }
    if let Some((name, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return Ok(Requirement::In(key(name)?, vec![value.trim().to_owned()]));
    }
    if let Some((name, value)) = part.split_once('>') {
        return Ok(Requirement::Greater(key(name)?, value.trim().parse().map_err(|_| error("expected a number"))?));
    }
    if let Some((name, value)) = part.split_once('<') {
        return Ok(Requirement::Less(key(name)?, value.trim().parse().map_err(|_| error("expected a number"))?));
    }
    match part.strip_prefix('!') {
        Some(name) => Ok(Requirement::Absent(key(name)?)),
        None => Ok(Requirement::Exists(key(part)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::kinds;
    use serde_json::json;

    #[test]
    fn label_selectors_select() {
        let kind = kinds::find("", "v1", "pods").expect("pods exist");
        let pod = json!({"metadata": {"name": "a", "labels": {"app": "web", "n": "5"}}, "spec": {"nodeName": "n1"}});
        let cases = [
            ("app=web", true),
            ("app==web,n=5", true),
            ("app!=web", false),
            ("app in (db, web)", true),
            ("app notin (db,web)", false),
            ("tier notin (a)", true),
            ("app", true),
            ("!app", false),
            ("!tier", true),
            ("n>4", true),
            ("n<5", false),
        ];
        for (text, want) in cases {
            let selector = Selector::parse(kind, Some(text), None).expect(text);
            assert_eq!(selector.matches(&pod), want, "{text}");
        }
        for text in ["app in web", "=x", "a b=c", "n>x"] {
            assert!(Selector::parse(kind, Some(text), None).is_err(), "{text}");
        }
    }

    #[test]
    fn field_selectors_select_known_fields_only() {
        let kind = kinds::find("", "v1", "pods").expect("pods exist");
        let pod = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n1"}});
        let matches = |text| Selector::parse(kind, None, Some(text)).expect(text).matches(&pod);
        assert!(matches("spec.nodeName=n1,metadata.name=a"));
        assert!(!matches("spec.nodeName!=n1"));
        assert!(matches("status.phase="));
        let error = Selector::parse(kind, None, Some("spec.foo=1")).expect_err("unknown field");
        assert_eq!(error.message, "field label not supported: spec.foo");
    }
}
