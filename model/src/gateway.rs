//! What a gateway listens for: the data plane's form of `Gateway` of the Gateway API.

use crate::Name;
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;

/// Goes to the gateway's own pods and to the nodes that they are on, because of the keys in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gateway {
    pub name: Name,
    /// Several may share a port where their host names differ.
    pub listeners: Vec<Listener>,
}

impl Gateway {
    /// What the routes of the gateway called `name` have as their parent: no service can be called so, for `/` is in no
    /// object's name.
    pub fn parent(name: &Name) -> Name {
        Name::new(name.namespace.clone(), format!("{}/gateway", name.name))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    pub name: String,
    pub port: u16,
    pub mode: ListenerMode,
    /// Lower case; a leading `*.` matches one or more labels. Absent: every name.
    #[serde(default)]
    pub hostname: Option<String>,
    /// Of [`ListenerMode::Https`], in the order of preference.
    #[serde(default)]
    pub certificates: Vec<Certificate>,
    /// The routes attached to it, by their own names.
    #[serde(default)]
    pub routes: Vec<Name>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ListenerMode {
    /// Requests in plain.
    Http,
    /// Requests within TLS that ends here.
    Https,
    /// TLS that passes through, by the server's name that it asks for.
    Passthrough,
}

impl ListenerMode {
    /// The client says the host in its ClientHello.
    pub fn is_tls(self) -> bool {
        self != Self::Http
    }
}

/// A chain, leaf first, and its key, both as PEM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    pub chain_pem: String,
    pub key_pem: Secret,
}

/// Text that is shown to nobody: neither when printed for debugging nor in the file form, which dumps are made of.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

/// Stands for every secret.
const WITHHELD: &str = "(withheld)";

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(WITHHELD)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(WITHHELD)
    }
}

/// The host names that both `a` and `b` take, as one of them (lower case, a leading `*.` for one or more labels); `None`
/// where no name is of both. An absent one takes every name.
pub fn common_host<'a>(a: Option<&'a str>, b: Option<&'a str>) -> Option<Option<&'a str>> {
    let (Some(x), Some(y)) = (a, b) else { return Some(a.or(b)) };
    match (x.strip_prefix('*'), y.strip_prefix('*')) {
        (Some(s), Some(t)) if s.ends_with(t) => Some(a),
        (Some(s), Some(t)) if t.ends_with(s) => Some(b),
        (Some(suffix), None) if y.len() > suffix.len() && y.ends_with(suffix) => Some(b),
        (None, Some(suffix)) if x.len() > suffix.len() && x.ends_with(suffix) => Some(a),
        (None, None) if x == y => Some(a),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_have_names_in_common() {
        let table = [
            (None, None, Some(None)),
            (Some("a.example"), None, Some(Some("a.example"))),
            (None, Some("*.example"), Some(Some("*.example"))),
            (Some("a.example"), Some("a.example"), Some(Some("a.example"))),
            (Some("a.example"), Some("b.example"), None),
            (Some("*.example"), Some("a.example"), Some(Some("a.example"))),
            (Some("*.example"), Some("a.b.example"), Some(Some("a.b.example"))),
            (Some("*.example"), Some("example"), None),
            (Some("*.example"), Some("aexample"), None),
            (Some("*.example"), Some("*.b.example"), Some(Some("*.b.example"))),
            (Some("*.b.example"), Some("*.c.example"), None),
            (Some("*.b.example"), Some("b.example"), None),
        ];
        for (a, b, want) in table {
            assert_eq!(common_host(a, b), want, "{a:?} and {b:?}");
            assert_eq!(common_host(b, a), want, "{b:?} and {a:?}");
        }
    }

    #[test]
    fn keys_are_read_and_never_written() {
        let text = r#"{"chain_pem": "c", "key_pem": "k"}"#;
        let certificate: Certificate = serde_json::from_str(text).expect("parses");
        assert_eq!(certificate.key_pem.0, "k");
        for shown in [format!("{certificate:?}"), serde_json::to_string(&certificate).expect("serializes")] {
            assert!(shown.contains(WITHHELD) && !shown.contains("\"k\""), "{shown}");
        }
    }
}
